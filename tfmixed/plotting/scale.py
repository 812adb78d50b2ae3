"""The loss scale over the steps of runs, and the scales that other rules would have used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfmixed.plotting.style import WIDE, Style, Theme, count_steps, is_narrow, legend, powers_of_two, sheet, shorten
from tfmixed.records import ScaleChange
from tfmixed.scaling import ScaleHistory

_MARKERS = "Xsov*"
_CROWD = 100  # marks above which they are drawn smaller
_MOST_CHANGES = 1000  # changes above which they are drawn in bins
_BINS = 80
_MOST_NAMED = 4  # variables with a color of their own


def plot_scale(
    histories: Mapping[str, ScaleHistory],
    title: str = "Loss scale",
    *,
    theme: Theme = "light",
    width: float = WIDE,
) -> Figure:
    """Draws the loss scale over the steps, with a mark at each growth and each overflow.

    Overflows of a single run are colored by the first variable whose gradient was not finite: the most frequent
    variables have a color each, and all others are grey.

    More than 1,000 changes are drawn in bins: the lowest and the highest scale, and one mark of each kind. The title
    says so.

    Args:
        histories: Histories by label, one line each.
        title: The title. Defaults to `"Loss scale"`.
        theme: `"light"` or `"dark"`. Defaults to `"light"`.
        width: The width in inches. Below 6, the layout is for a phone. Defaults to 8.

    Returns:
        A matplotlib figure. `save` writes it to a file.

    Example:
    >>> figure = plot_scale({"run": ScaleHistory(8.0, 10, (ScaleChange(2, 8.0, 4.0, "overflow", "d/kernel"),))})
    >>> [line.get_label() for line in figure.axes[0].get_lines()]
    ['run', 'overflow: d/kernel (1)']
    """
    bins = [  # the number of steps that are drawn as one
        1 if len(history.changes) <= _MOST_CHANGES else math.ceil((history.steps - history.first) / _BINS)
        for history in histories.values()
    ]
    if max(bins) > 1:
        title += f"\nof each kind one mark in {max(bins):,} steps"
    with sheet(theme, width, 4.6 if is_narrow(width) else 4.2) as (figure, style):
        axes = figure.subplots()
        colors = style.lines(len(histories)) if len(histories) > 1 else [style.faint]
        for color, bin_width, (label, history) in zip(colors, bins, histories.items(), strict=True):
            _line(axes, history, bin_width, color, label)
            # At the old scale: a growth that overflows at once has the mark of the overflow at the new scale.
            growth: dict[str, Any] = {"color": color, "markeredgecolor": style.paper, "zorder": 3}
            _mark(axes, history.because("growth"), bin_width, "^", label="growth", **growth)
            for low, high in history.gaps():
                axes.axvspan(low, high, color=style.faint, alpha=0.25, linewidth=0, label="changes lost")
            if len(histories) > 1:
                look: dict[str, Any] = {"color": style.ink, "markeredgecolor": color, "label": "overflow: step skipped"}
                _mark(axes, history.overflows(), bin_width, "X", **look)
            else:
                _mark_variables(axes, history.overflows(), bin_width, style, 22 if is_narrow(width) else 34)
        powers_of_two(axes)
        axes.set(title=title, ylabel="loss scale (factor on the loss)")
        count_steps(axes, is_narrow(width))
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        legend(axes, width)
    return figure


def plot_simulations(
    scales: Mapping[str, Sequence[float]],
    skipped: Mapping[str, Sequence[int]],
    title: str = "What each rule would have done",
    *,
    theme: Theme = "light",
    width: float = WIDE,
) -> Figure:
    """Draws the loss scale that each rule would have used, one panel per rule, and the steps it would have skipped.

    Args:
        scales: The scale of each step, by the label of the rule.
        skipped: The skipped steps, by the label of the rule.
        title: The title. Defaults to `"What each rule would have done"`.
        theme: `"light"` or `"dark"`. Defaults to `"light"`.
        width: The width in inches. Below 6, the layout is for a phone. Defaults to 8.

    Returns:
        A matplotlib figure. `save` writes it to a file.

    Example:
    >>> figure = plot_simulations({"constant": [8.0, 8.0]}, {"constant": [1]})
    >>> [line.get_label() for line in figure.axes[0].get_lines()]
    ['loss scale', 'skipped step']
    """
    with sheet(theme, width, 1.7 + 1.5 * len(scales)) as (figure, style):
        panels = figure.subplots(len(scales), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, color, (label, line) in zip(panels, style.lines(len(scales)), scales.items(), strict=True):
            steps, at = skipped[label], [line[step] for step in skipped[label]]
            points = ([*range(len(line)), len(line)], [*line, line[-1]]) if len(line) else ([], [])
            axes.step(*points, where="post", color=color, linewidth=1.8, label="loss scale")
            axes.plot(steps, at, "X", markersize=_size(steps, 7), color=style.ink, label="skipped step", alpha=0.8)
            axes.set_title(f"{shorten(label, 30 if is_narrow(width) else 70)}: {len(steps):,} skipped", loc="left")
            powers_of_two(axes)
            axes.grid(alpha=0.3)
            axes.margins(y=0.2)
        legend(panels[0], width)
        count_steps(panels[-1], is_narrow(width))
        figure.supylabel("loss scale (factor on the loss)", fontsize=9)
        figure.suptitle(title, fontsize=10)
    return figure


def _size(drawn: Sequence[object], usual: float) -> float:
    return usual if len(drawn) <= _CROWD else usual / 2


def _line(axes: Axes, history: ScaleHistory, bin_width: int, color: str, label: str) -> None:
    steps, scales = history.points()
    if bin_width == 1:
        axes.step(steps, scales, where="post", color=color, label=label, linewidth=_size(history.changes, 2.0))
        return
    edges = numpy.arange(steps[0], steps[-1], bin_width)
    # The first scale of a bin is the one that holds at its first step.
    starts = numpy.searchsorted(steps, edges, side="right") - 1
    low, high = (extreme.reduceat(numpy.asarray(scales), starts) for extreme in (numpy.minimum, numpy.maximum))
    reach = numpy.append(low, low[-1]), numpy.append(high, high[-1])
    look: dict[str, Any] = {"step": "post", "color": color, "alpha": 0.35}
    axes.fill_between([*edges, steps[-1]], *reach, label=f"{label}, lowest to highest", **look)


def _mark_variables(axes: Axes, overflows: list[ScaleChange], bin_width: int, style: Style, longest: int) -> None:
    """Marks overflows by the first variable that was not finite: the most frequent in color, all others in grey."""
    counts = Counter(change.variable or "unknown" for change in overflows)
    named = [name for name, _ in counts.most_common(_MOST_NAMED if len(counts) > _MOST_NAMED + 1 else _MOST_NAMED + 1)]
    for name, color, marker in zip(named, style.colors, _MARKERS, strict=False):
        changes = [change for change in overflows if (change.variable or "unknown") == name]
        label = f"overflow: {shorten(name, longest)} ({len(changes):,})"
        _mark(axes, changes, bin_width, marker, color=color, markeredgecolor=style.paper, label=label)
    rest = [change for change in overflows if (change.variable or "unknown") not in named]
    label = f"overflow: {len(counts) - len(named)} others ({len(rest):,})"
    _mark(axes, rest, bin_width, ".", color=style.faint, markeredgecolor=style.paper, label=label)


def _mark(axes: Axes, changes: Sequence[ScaleChange], bin_width: int, marker: str, **look: Any) -> None:
    """Marks changes at their step and their old scale. In a bin, only the last one is marked."""
    if changes:
        drawn = {change.step // bin_width: change for change in changes}.values() if bin_width > 1 else changes
        steps, scales = [change.step for change in drawn], [change.old_scale for change in drawn]
        axes.plot(steps, scales, marker, markersize=_size(changes, 8), markeredgewidth=0.6, **{"zorder": 4, **look})
