"""Heat map of gradient magnitudes: layers by exponents."""

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

_LEAST = 1e-4  # smaller shares have the same color
_GAP = 3  # octaves between the column of zeros and the smallest magnitude


def plot_layers(record: RangesRecord, scale: float = 1.0, *, theme: Theme = "light", width: float = WIDE) -> Figure:
    """Draws the magnitudes of the gradients of each layer: a row per layer in the model's order, a column per exponent.

    Values that are exactly 0 have a column of their own. Rounding noise is left out.

    Args:
        record: The measured gradients.
        scale: The loss scale of float16's limits, which are drawn as lines. Defaults to 1.
        theme: `"light"` or `"dark"`. Defaults to `"light"`.
        width: The width in inches. Below 6, the layout is for a phone. Defaults to 8.

    Returns:
        A matplotlib figure whose height grows with the layers. `save` writes it to a file.

    Example:
    >>> ranges = [GradientRange("d/kernel", "weight", "d", "float16", 1, 0, 2.0**-30, 2.0**-30, {-30: (4, 0, 0, 0)})]
    >>> figure = plot_layers(RangesRecord(0, 0, "float32", 1.0, 1, "model", ranges))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['d']
    """
    layers = list(dict.fromkeys(gradient.layer for gradient in record.ranges))
    found = {gradient.kind for gradient in record.ranges}
    kinds = [kind for kind in zones.KINDS if kind in found or not found]
    height = 2.2 + max(len(layers), 4) * (0.2 if len(layers) <= 40 else 0.14)
    with sheet(theme, width, height) as (figure, style):
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        span = _span(record, scale)
        for axes, kind in zip(panels, kinds, strict=True):
            mesh = _paint(axes, [_row(record, kind, layer) for layer in layers], span, style)
            _lines(axes, scale, style)
            axes.set_title(zones.KINDS[kind], pad=18)
            axes.set_xlabel("log2 of the magnitude" if not is_narrow(width) else "log2(magnitude)")
        _name(panels[0], record, layers, is_narrow(width))
        look: dict[str, Any] = {"location": "bottom", "shrink": 0.7, "aspect": 40, "extend": "min"}
        bar = figure.colorbar(mesh, ax=list(panels), fraction=0.5 / height, pad=0.1 / height, **look)
        bar.solids.set_rasterized(True)  # type: ignore[union-attr]  # None without a color map
        bar.set_label("share of the row's values (%)")
        words = ["Gradients by layer", f"lines: the limits of float16 at loss scale {short(scale)}"]
        figure.suptitle(("\n" if is_narrow(width) else "; ").join(words), fontsize=10)
    return figure


def _row(record: RangesRecord, kind: str, layer: str) -> list[GradientRange]:
    kept = [gradient for gradient in record.ranges if not gradient.noise]
    return [gradient for gradient in kept if (gradient.kind, gradient.layer) == (kind, layer)]


def _span(record: RangesRecord, scale: float) -> tuple[int, int]:
    """Returns the first octave that is drawn, and the one after the last: all values and all limits."""
    kept = [gradient for gradient in record.ranges if not gradient.noise]
    octaves = [octave for octave in zones.pooled(kept) if -80 <= octave < 40]
    first, *_, last = (limit - math.log2(scale) for limit in zones.LIMITS)
    return math.floor(min([first - 4, *octaves])), math.ceil(max([last + 4, *(octave + 1 for octave in octaves)]))


def _paint(axes: Axes, rows: list[list[GradientRange]], span: tuple[int, int], style: Style) -> QuadMesh:
    low, high = span
    cells = numpy.zeros((len(rows), high - low))
    zeros = numpy.zeros((len(rows), 1))
    for index, row in enumerate(rows):
        octaves, zeros_of_row = zones.pooled(row), sum(gradient.zeros for gradient in row)
        count = max(sum(map(sum, octaves.values())) + zeros_of_row, 1)
        zeros[index] = 100 * zeros_of_row / count
        for octave, parts in octaves.items():
            cells[index, min(max(octave, low), high - 1) - low] += 100 * sum(parts) / count
    look: dict[str, Any] = {"norm": LogNorm(100 * _LEAST, 100), "cmap": style.shades, "rasterized": True}
    edges = numpy.arange(len(rows) + 1) - 0.5
    left = numpy.array([low - _GAP - 2.0, low - _GAP + 0.0])
    axes.pcolormesh(left, edges, numpy.ma.masked_equal(zeros, 0), **look)
    drawn = axes.pcolormesh(numpy.arange(low, high + 1), edges, numpy.ma.masked_equal(cells, 0), **look)
    axes.axvline(low - _GAP / 2, color=style.faint, linewidth=0.6)
    axes.set(xlim=(left[0] - 0.5, high), ylim=(max(len(rows), 1) - 0.5, -0.5))
    ticks = [tick for tick in range(-80, 41, 20 if high - low > 40 else 10) if low + (high - low) / 8 <= tick < high]
    axes.set_xticks([left.mean(), *ticks], ["zero", *map(str, ticks)])
    return drawn


def _lines(axes: Axes, scale: float, style: Style) -> None:
    edges = [axes.get_xlim()[0] + 2 + _GAP, *(limit - math.log2(scale) for limit in zones.LIMITS), axes.get_xlim()[1]]
    for limit in edges[1:-1]:
        # A line of ink within a line of paper is visible on cells of all shades.
        axes.axvline(limit, color=style.paper, linewidth=3, alpha=0.85)
        axes.axvline(limit, color=style.ink, linewidth=1, linestyle=(0, (4, 2)))
    for name, (left, right) in zip(zones.SHORT.values(), pairwise(edges), strict=True):
        place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7, "transform": axes.get_xaxis_transform()}
        axes.text((left + right) / 2, 1.0, name, **place)


def _name(axes: Axes, record: RangesRecord, layers: list[str], narrow: bool) -> None:
    half = {gradient.layer for gradient in record.ranges if gradient.dtype in HALF}
    full = {gradient.layer for gradient in record.ranges} - half
    names = [shorten(layer, 20 if narrow else 34) + (" *" if layer in full else "") for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=7 if len(layers) <= 40 else 6)
    axes.set_ylabel("layer, from the input" + ("\n(*: not in half precision)" if full else ""))
