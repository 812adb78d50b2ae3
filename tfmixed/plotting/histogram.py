"""Histogram of gradient magnitudes over the zones of float16."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfmixed._probe.rounding_model import held_in_half, percent
from tfmixed.plotting import zones
from tfmixed.plotting.style import WIDE, Style, Theme, is_narrow, legend, sheet
from tfmixed.records import GradientRange, RangesRecord, short

_REACH = (-80, 40)  # octaves beyond are counted in the first and the last one


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

    Only gradients that the model holds in half precision count, or all gradients if there are none. Shares are
    relative to the values other than 0 of each kind. The legend shows the share of zeros.

    Args:
        record: The measured gradients.
        scale: The loss scale of the lower panel.
        beside: The same gradients in another precision, drawn as dashed lines. Defaults to None.
        span: A range that the x axis includes, for figures side by side: the result of the function `span` for another
            record. Defaults to None.
        theme: `"light"` or `"dark"`. Defaults to `"light"`.
        width: The width in inches. Below 6, the layout is for a phone. Defaults to 8.

    Returns:
        A matplotlib figure. `save` writes it to a file.

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
            lines = [when, *_losses(drawn, factor)]
            title = [textwrap.fill(line, 52) if is_narrow(width) else line for line in lines]
            axes.set_title("\n".join(title), loc="left", pad=18, fontsize=8.5)
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
    if not any(gradient.nonzeros for gradient in drawn):
        axes.text(0.5, 0.5, "no values other than 0", ha="center", va="center", transform=axes.transAxes)
    for (kind, label), color in zip(zones.KINDS.items(), style.colors, strict=False):
        gradients = [gradient for gradient in drawn if gradient.kind == kind]
        if steps := _steps(gradients, scale):
            fill: dict[str, Any] = {"fill": True, "alpha": 0.45} if kind == "activation" else {}
            axes.stairs(*steps, color=color, label=f"{label}, {_zeros(gradients)}", linewidth=1.6, zorder=3, **fill)


def _outlines(axes: Axes, drawn: list[GradientRange], scale: float, style: Style, suffix: str) -> None:
    for (kind, label), color in zip(zones.KINDS.items(), style.colors[2:], strict=False):
        gradients = [gradient for gradient in drawn if gradient.kind == kind]
        if steps := _steps(gradients, scale):
            axes.stairs(*steps, color=color, linestyle="--", label=f"{label}{suffix}, {_zeros(gradients)}", zorder=4)


def _steps(ranges: list[GradientRange], scale: float) -> tuple[list[float], list[float]] | None:
    """Returns the heights in percent and the edges of a histogram by octaves. None if it is empty."""
    octaves, shift = zones.pooled(ranges), math.log2(scale)
    count = sum(map(sum, octaves.values()))
    if not count:
        return None
    heights = dict.fromkeys(range(_clipped(min(octaves)), _clipped(max(octaves)) + 1), 0.0)
    for octave, parts in octaves.items():
        heights[_clipped(octave)] += 100 * sum(parts) / count
    return list(heights.values()), [octave + shift for octave in (*heights, max(heights) + 1)]


def _clipped(octave: int) -> int:
    return min(max(octave, _REACH[0]), _REACH[1])


def _zeros(gradients: list[GradientRange]) -> str:
    zeros, nonzeros = (sum(getattr(gradient, name) for gradient in gradients) for name in ("zeros", "nonzeros"))
    return f"{percent(zeros / max(zeros + nonzeros, 1))} are 0"


def _losses(drawn: list[GradientRange], scale: float) -> list[str]:
    words = {"zero": "become 0", "subnormal": "lose precision", "overflow": "overflow"}
    lines = []
    for kind in zones.KINDS:
        gradients = [gradient for gradient in drawn if gradient.kind == kind and gradient.nonzeros]
        lost = zones.shares(zones.pooled(gradients), scale)
        parts = [f"{percent(lost[zone])} {effect}" for zone, effect in words.items() if lost[zone]]
        lines += [f"{kind}s: {', '.join(parts) or 'nothing is lost'}"] if gradients else []
    return lines


def span(record: RangesRecord, scale: float) -> tuple[float, float]:
    """Returns the range of the x axis of `plot_ranges`: all values before and after scaling, and float16's limits."""
    return _span(held_in_half(record), scale)


def _span(drawn: list[GradientRange], scale: float) -> tuple[float, float]:
    ends = [_clipped(octave) + shift for octave in zones.pooled(drawn) for shift in (0, math.log2(scale))]
    return min([-30.0, *(end - 1 for end in ends)]), max([20.0, *(end + 2 for end in ends)])
