"""The magnitudes of gradients as a histogram, over the zones of float16."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfmixed._probe.rounding_model import held_in_half, percent
from tfmixed.plotting import zones
from tfmixed.plotting.style import WIDE, Style, Theme, is_narrow, legend, sheet
from tfmixed.records import GradientRange, RangesRecord, short

_REACH = (-80, 40)  # what lies beyond is drawn at the edge


def plot_ranges(
    record: RangesRecord,
    scale: float,
    beside: RangesRecord | None = None,
    *,
    span: tuple[float, float] | None = None,
    theme: Theme = "light",
    width: float = WIDE,
) -> Figure:
    """Draws the histogram of all magnitudes, before and after scaling, over the zones of float16.

    Only gradients that the model holds in half precision count, or all of them in a model that has none. Shares are
    relative to the values other than 0 of each kind; how many are 0 is told below the picture.

    Args:
        record: What was measured.
        scale: The loss scale of the lower panel.
        beside: The same gradients in another precision, drawn as broken lines.
        span: The least that the x axis shows, as `span` returns it for another record: for pictures side by side.
        theme: `"light"` or `"dark"`.
        width: Inches; below 6 it is laid out for a phone.

    Returns:
        A matplotlib figure; save it with `save`.

    Source: figure 3 of Micikevicius et al., "Mixed Precision Training", 2017.

    Example:
    >>> ranges = [GradientRange("d/kernel", "weight", "d", "float16", 0, 0, 2.0**-30, 2.0**-30, {-30: (4, 0, 0, 0)})]
    >>> figure = plot_ranges(RangesRecord(0, 0, "float32", 1.0, 1, "model", ranges), 2.0**20)
    >>> [axes.get_title(loc="left").splitlines()[1] for axes in figure.axes]
    ['weights: 100 % become 0', 'weights: nothing is lost']
    """
    with sheet(theme, width, 6.4 if is_narrow(width) else 5.6) as (figure, style):
        drawn = held_in_half(record)
        for axes, factor in zip(figure.subplots(2, 1, sharex=True, sharey=True), (1.0, scale), strict=True):
            _panel(axes, drawn, factor, style)
            if beside is not None:
                _outlines(axes, held_in_half(beside), factor, style, f", {beside.precision}")
            when = "before scaling" if factor == 1 else f"after scaling: loss scale {short(scale)}"
            told = [textwrap.fill(line, 52) if is_narrow(width) else line for line in (when, *_losses(drawn, factor))]
            axes.set_title("\n".join(told), loc="left", pad=18, fontsize=8.5)
        spans = [_span(drawn, scale), _span(held_in_half(beside) if beside else [], scale), *([span] if span else [])]
        axes.set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
        axes.set_ylim(bottom=0)
        for axes in figure.axes:
            zones.shade(axes, style, names=zones.SHORT if is_narrow(width) else zones.NAMES)
            axes.set_ylabel("share of values\nother than 0 (%)")
        axes.set_xlabel("log2 of the magnitude")
        legend(axes, width)
    return figure


def _panel(axes: Axes, drawn: list[GradientRange], scale: float, style: Style) -> None:
    if not any(each.nonzeros for each in drawn):
        axes.text(0.5, 0.5, "no values other than 0", ha="center", va="center", transform=axes.transAxes)
    for (kind, label), color in zip(zones.KINDS.items(), style.colors, strict=False):
        of = [each for each in drawn if each.kind == kind]
        if steps := _steps(of, scale):
            fill: dict[str, Any] = {"fill": True, "alpha": 0.45} if kind == "activation" else {}
            axes.stairs(*steps, color=color, label=f"{label}, {_zeros(of)}", linewidth=1.6, zorder=3, **fill)


def _outlines(axes: Axes, drawn: list[GradientRange], scale: float, style: Style, suffix: str) -> None:
    for (kind, label), color in zip(zones.KINDS.items(), style.colors[2:], strict=False):
        of = [each for each in drawn if each.kind == kind]
        if steps := _steps(of, scale):
            axes.stairs(*steps, color=color, linestyle="--", label=f"{label}{suffix}, {_zeros(of)}", zorder=4)


def _steps(ranges: list[GradientRange], scale: float) -> tuple[list[float], list[float]] | None:
    """Returns the heights, in per cent, and edges of a histogram by octaves; None where there is nothing to draw."""
    octaves, shift = zones.pooled(ranges), math.log2(scale)
    count = sum(map(sum, octaves.values()))
    if not count:
        return None
    heights = dict.fromkeys(range(_kept(min(octaves)), _kept(max(octaves)) + 1), 0.0)
    for octave, parts in octaves.items():
        heights[_kept(octave)] += 100 * sum(parts) / count
    return list(heights.values()), [octave + shift for octave in (*heights, max(heights) + 1)]


def _kept(octave: int) -> int:
    return min(max(octave, _REACH[0]), _REACH[1])


def _zeros(ranges: Iterable[GradientRange]) -> str:
    ranges = list(ranges)
    zeros = sum(each.zeros for each in ranges)
    return f"{percent(zeros / max(zeros + sum(each.nonzeros for each in ranges), 1))} are 0"


def _losses(drawn: list[GradientRange], scale: float) -> list[str]:
    words = {"zero": "become 0", "subnormal": "lose precision", "overflow": "overflow"}
    lines = []
    for kind in zones.KINDS:
        of = [each for each in drawn if each.kind == kind and each.nonzeros]
        lost = zones.shares(zones.pooled(of), scale)
        told = [f"{percent(lost[zone])} {what}" for zone, what in words.items() if lost[zone]]
        lines += [f"{kind}s: {', '.join(told) or 'nothing is lost'}"] if of else []
    return lines


def span(record: RangesRecord, scale: float) -> tuple[float, float]:
    """Returns what the x axis of `plot_ranges` shows: all values before and after scaling, and float16's limits."""
    return _span(held_in_half(record), scale)


def _span(drawn: list[GradientRange], scale: float) -> tuple[float, float]:
    ends = [_kept(octave) + shift for octave in zones.pooled(drawn) for shift in (0, math.log2(scale))]
    return min([-30.0, *(end - 1 for end in ends)]), max([20.0, *(end + 2 for end in ends)])
