"""Times of training steps as bars."""

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
    """Draws the median time of a step with its spread: a group of bars per network, a bar per variant.

    Args:
        times: Milliseconds by network and variant. The numbers above the bars compare with the first variant.
        title: The title. Defaults to `"Training step"`.
        theme: `"light"` or `"dark"`. Defaults to `"light"`.

    Returns:
        A matplotlib figure. `save` writes it to a file.
    """
    with sheet(theme, 2 + 2.4 * len(times), 4.2) as (figure, style):
        axes = figure.subplots()
        variants = list(next(iter(times.values())))
        # Times of networks differ by orders of magnitude: each group is relative to its own first variant.
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
    medians = [statistics.median(times) for times in relative]
    below = [median - min(times) for median, times in zip(medians, relative, strict=True)]
    above = [max(times) - median for median, times in zip(medians, relative, strict=True)]
    bars = axes.bar(places, medians, yerr=[below, above], capsize=2, **look)
    axes.bar_label(bars, [f"{1 / median:.2f}x" for median in medians], fontsize=7, padding=3)
