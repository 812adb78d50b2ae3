"""The magnitudes of gradients over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfmixed._probe.rounding_model import held_in_half
from tfmixed.plotting import zones
from tfmixed.plotting.style import WIDE, Style, Theme, count_steps, is_narrow, legend, sheet
from tfmixed.records import RangesRecord
from tfmixed.scaling import ScaleHistory

_MOST_CHANGES = 100  # changes of the scale above which the limits follow the snapshots only


def plot_timeline(
    records: Sequence[RangesRecord],
    history: ScaleHistory | None = None,
    *,
    theme: Theme = "light",
    width: float = WIDE,
) -> Figure:
    """Draws the largest, the median and the 1 % quantile of all magnitudes over the steps, with float16's limits.

    Args:
        records: Snapshots of one run. Only gradients held in half precision count.
        history: The loss scale of the run, which moves the limits. Defaults to None: the limits are those of scale 1.
        theme: `"light"` or `"dark"`. Defaults to `"light"`.
        width: The width in inches. Below 6, the layout is for a phone. Defaults to 8.

    Returns:
        A matplotlib figure. `save` writes it to a file.

    Example:
    >>> from tfmixed.records import GradientRange
    >>> ranges = [GradientRange("d/kernel", "weight", "d", "float16", 0, 0, 2.0**-30, 2.0**-30, {-30: (4, 0, 0, 0)})]
    >>> figure = plot_timeline([RangesRecord(7, 0, "float32", 1.0, 1, "model", ranges)])
    >>> [float(x) for x in figure.axes[0].get_lines()[0].get_xdata()]
    [7.0]
    """
    with sheet(theme, width, 5.2 if is_narrow(width) else 4.6) as (figure, style):
        axes = figure.subplots()
        _magnitudes(axes, records, style)
        _limits(axes, records, history, style)
        axes.set(title="Gradients over the run", ylabel="log2 of the magnitude")
        count_steps(axes, is_narrow(width))
        axes.grid(alpha=0.3)
        legend(axes, width)
    return figure


def _magnitudes(axes: Axes, records: Sequence[RangesRecord], style: Style) -> None:
    steps = [record.step or 0 for record in records]
    gradients = [held_in_half(record) for record in records]
    octaves = [zones.pooled(held) for held in gradients]
    largest = [max((gradient.largest for gradient in held), default=0.0) for held in gradients]
    lines: dict[str, list[float | None]] = {
        "largest": [math.log2(magnitude) if magnitude else None for magnitude in largest],
        "median": [zones.quantile(counts, 0.5) for counts in octaves],
        "1 % quantile": [zones.quantile(counts, 0.01) for counts in octaves],
    }
    for (label, values), color, marker in zip(lines.items(), style.colors, "^os", strict=False):
        heights = numpy.array(values, float)  # None becomes NaN
        mark = marker if len(steps) <= 60 else ""
        axes.plot(steps, heights, color=color, marker=mark, markersize=4, linewidth=1.8, label=label, zorder=3)
    if not records:
        axes.text(0.5, 0.5, "no ranges in this log", ha="center", va="center", transform=axes.transAxes)


def _limits(axes: Axes, records: Sequence[RangesRecord], history: ScaleHistory | None, style: Style) -> None:
    steps, scales = _scales([record.step or 0 for record in records] or [0, 1], history)
    zero, normal, overflow = ([limit - math.log2(scale) for scale in scales] for limit in zones.LIMITS)
    lines = [numpy.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    heights = [height for line in lines for height in line[numpy.isfinite(line)]]
    low, high = min([*heights, *zero, zones.LIMITS[0]]) - 4, max([*heights, *overflow, zones.LIMITS[-1]]) + 4
    at = "the run's loss scale" if history else "loss scale 1"
    for zone, bottom, top in (("zero", low, zero), ("subnormal", zero, normal), ("overflow", overflow, high)):
        look: dict[str, Any] = {"step": "post", "color": style.zones[zone], "linewidth": 0, "zorder": 0}
        axes.fill_between(steps, bottom, top, label=f"{zones.NAMES[zone]} at {at}", **look)
    for limit in (zones.LIMITS[0], zones.LIMITS[-1]) if history else ():
        look = {"color": style.faint, "linestyle": "--", "linewidth": 1}
        axes.axhline(limit, label="becomes 0, overflows at loss scale 1", **look)
    axes.set_ylim(low, high)


def _scales(steps: list[int], history: ScaleHistory | None) -> tuple[list[int], list[float]]:
    """Returns steps and the scale from each on: all changes of the scale, or its values at the snapshots."""
    if history is None:
        return [*steps, steps[-1] + 1], [1.0] * (len(steps) + 1)
    known, scales = history.points()
    if len(known) <= _MOST_CHANGES or len(steps) < 2:
        return known, scales
    return steps, [history.at(step) for step in steps]
