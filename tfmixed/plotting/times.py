"""The time of training steps, as bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfmixed.plotting.style import Theme, legend, sheet


def plot_times(
    times: Mapping[str, Mapping[str, Sequence[float]]], title: str = "Training step", *, theme: Theme = "light"
) -> Figure:
    """Draws the time of a step: a group of bars for each network, the median of each variant, with its spread.

    Args:
        times: Milliseconds, by network and variant. The first variant is what the numbers above the bars compare with.
        title: Above the picture.
        theme: `"light"` or `"dark"`.

    Returns:
        A matplotlib figure; save it with `save`.
    """
    with sheet(theme, 2 + 2.4 * len(times), 4.2) as (figure, style):
        axes = figure.subplots()
        variants = list(next(iter(times.values())))
        # Networks differ by orders of magnitude: each group stands in units of its own first variant.
        firsts = [statistics.median(group[variants[0]]) for group in times.values()]
        width = 0.8 / len(variants)
        for offset, (color, variant) in enumerate(zip(style.lines(len(variants)), variants, strict=True)):
            groups = zip(firsts, times.values(), strict=True)
            relative = [[ms / first for ms in group[variant]] for first, group in groups]
            places = [place + (offset - (len(variants) - 1) / 2) * width for place in range(len(times))]
            _bars(axes, places, relative, width=width, color=color, label=variant)
        names = [f"{name}\n{first:.1f} ms" for name, first in zip(times, firsts, strict=True)]
        axes.set_xticks(range(len(times)), names)
        axes.set(title=title, ylabel=f"time a step, {variants[0]} = 1")
        axes.margins(y=0.15)
        axes.grid(alpha=0.3, axis="y")
        legend(axes, 2.5 * len(variants))
    return figure


def _bars(axes: Axes, places: Sequence[float], relative: Sequence[Sequence[float]], **look: Any) -> None:
    medians = [statistics.median(each) for each in relative]
    below = [middle - min(each) for middle, each in zip(medians, relative, strict=True)]
    above = [max(each) - middle for middle, each in zip(medians, relative, strict=True)]
    bars = axes.bar(places, medians, yerr=[below, above], capsize=2, **look)
    axes.bar_label(bars, [f"{1 / middle:.2f}x" for middle in medians], fontsize=7, padding=3)
