"""The magnitudes of each layer's gradients, as a heat map of layer by exponent."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tfmixed.formats import HALF
from tfmixed.plotting import zones
from tfmixed.plotting.style import WIDE, Style, Theme, is_narrow, sheet, shorten
from tfmixed.records import GradientRange, RangesRecord, short

_LEAST = 1e-4  # a share, below which all colours are the same
_NONE = 3  # octaves between the smallest magnitude drawn and the column of what is exactly 0


def plot_layers(record: RangesRecord, scale: float = 1.0, *, theme: Theme = "light", width: float = WIDE) -> Figure:
    """Draws which magnitudes each layer's gradients have: a row a layer in the model's order, a column an exponent.

    Args:
        record: What was measured.
        scale: The loss scale at which float16's limits are drawn, as lines.
        theme: `"light"` or `"dark"`.
        width: Inches; below 6 it is laid out for a phone.

    Returns:
        A matplotlib figure; save it with `save`. It grows with the layers. What is exactly 0 has a column of its own,
        and rounding noise is left out.

    Example:
    >>> ranges = [GradientRange("d/kernel", "weight", "d", "float16", 1, 0, 2.0**-30, 2.0**-30, {-30: (4, 0, 0, 0)})]
    >>> figure = plot_layers(RangesRecord(0, 0, "float32", 1.0, 1, "model", ranges))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['d']
    """
    layers = list(dict.fromkeys(each.layer for each in record.ranges))
    kinds = [kind for kind in zones.KINDS if any(each.kind == kind for each in record.ranges)] or list(zones.KINDS)
    height = 2.2 + max(len(layers), 4) * (0.2 if len(layers) <= 40 else 0.14)
    with sheet(theme, width, height) as (figure, style):
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        span = _span(record, scale)
        for axes, kind in zip(panels, kinds, strict=True):
            drawn = _paint(axes, [_row(record, kind, layer) for layer in layers], span, style)
            _lines(axes, scale, style)
            axes.set_title(zones.KINDS[kind], pad=18)
            axes.set_xlabel("log2 of the magnitude" if not is_narrow(width) else "log2(magnitude)")
        _name(panels[0], record, layers, is_narrow(width))
        look: dict[str, Any] = {"location": "bottom", "shrink": 0.7, "aspect": 40, "extend": "min"}
        bar = figure.colorbar(drawn, ax=list(panels), fraction=0.5 / height, pad=0.1 / height, **look)
        bar.set_label("share of the row's values (%)")
        words = ["Gradients by layer", f"lines: the limits of float16 at loss scale {short(scale)}"]
        figure.suptitle(("\n" if is_narrow(width) else "; ").join(words), fontsize=10)
    return figure


def _row(record: RangesRecord, kind: str, layer: str) -> list[GradientRange]:
    return [each for each in record.ranges if (each.kind, each.layer) == (kind, layer) and not each.noise]


def _span(record: RangesRecord, scale: float) -> tuple[int, int]:
    """Returns the first octave that is drawn, and the one after the last: all values, and all limits."""
    octaves = [
        octave for octave in zones.pooled(each for each in record.ranges if not each.noise) if -80 <= octave < 40
    ]
    limits = [limit - math.log2(scale) for limit in zones.LIMITS]
    return math.floor(min([limits[0] - 4, *octaves])), math.ceil(max([limits[-1] + 4, *(each + 1 for each in octaves)]))


def _paint(axes: Axes, rows: list[list[GradientRange]], span: tuple[int, int], style: Style) -> QuadMesh:
    low, high = span
    cells = numpy.zeros((len(rows), high - low))
    zeros = numpy.zeros((len(rows), 1))
    for index, row in enumerate(rows):
        octaves, none = zones.pooled(row), sum(each.zeros for each in row)
        count = max(sum(map(sum, octaves.values())) + none, 1)
        zeros[index] = 100 * none / count
        for octave, parts in octaves.items():
            cells[index, min(max(octave, low), high - 1) - low] += 100 * sum(parts) / count
    look: dict[str, Any] = {"norm": LogNorm(100 * _LEAST, 100), "cmap": style.shades, "rasterized": True}
    edges = numpy.arange(len(rows) + 1) - 0.5
    left = numpy.array([low - _NONE - 2.0, low - _NONE + 0.0])
    axes.pcolormesh(left, edges, numpy.ma.masked_equal(zeros, 0), **look)
    drawn = axes.pcolormesh(numpy.arange(low, high + 1), edges, numpy.ma.masked_equal(cells, 0), **look)
    axes.axvline(low - _NONE / 2, color=style.faint, linewidth=0.6)
    axes.set(xlim=(left[0] - 0.5, high), ylim=(max(len(rows), 1) - 0.5, -0.5))
    ticks = [tick for tick in range(-80, 41, 20 if high - low > 40 else 10) if low + (high - low) / 8 <= tick < high]
    axes.set_xticks([left.mean(), *ticks], ["zero", *map(str, ticks)])
    return drawn


def _lines(axes: Axes, scale: float, style: Style) -> None:
    edges = [axes.get_xlim()[0] + 2 + _NONE, *(limit - math.log2(scale) for limit in zones.LIMITS), axes.get_xlim()[1]]
    for limit in edges[1:-1]:
        # Cells have all shades from paper to ink: a line of ink within one of paper is seen on each.
        axes.axvline(limit, color=style.paper, linewidth=3, alpha=0.85)
        axes.axvline(limit, color=style.ink, linewidth=1, linestyle=(0, (4, 2)))
    for name, (left, right) in zip(("→ 0", "sub", "normal", "→ inf"), pairwise(edges), strict=True):
        place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7, "transform": axes.get_xaxis_transform()}
        axes.text((left + right) / 2, 1.0, name, **place)


def _name(axes: Axes, record: RangesRecord, layers: list[str], narrow: bool) -> None:
    full = {each.layer for each in record.ranges} - {each.layer for each in record.ranges if each.dtype in HALF}
    names = [shorten(layer, 20 if narrow else 34) + (" *" if layer in full else "") for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=7 if len(layers) <= 40 else 6)
    axes.set_ylabel("layer, from the input" + (" (*: not in half precision)" if full else ""))
