"""The loss scale over the steps of runs, or of what rules would have done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfmixed.plotting.style import WIDE, Style, Theme, count_steps, is_narrow, legend, powers_of_two, sheet, shorten
from tfmixed.records import ScaleChange
from tfmixed.scaling import ScaleHistory

_MARKERS = "Xsov*"
_CROWD = 100
_MOST = 1000  # changes that are drawn one by one
_BINS = 80  # stretches of steps in which more than those are drawn: far enough apart for a mark each
_NAMED = 4  # guilty variables with a colour of their own


def plot_scale(
    histories: Mapping[str, ScaleHistory],
    title: str = "Loss scale",
    *,
    theme: Theme = "light",
    width: float = WIDE,
) -> Figure:
    """Draws the loss scale over the steps, each growth and overflow marked at its step and the scale of that step.

    The overflows of a single run are coloured by the first variable whose gradient was not finite: the most frequent
    ones, and the others in grey.

    More than 1,000 changes are drawn as the lowest and the highest scale of stretches of steps, with one mark of each
    kind in a stretch; the title says so.

    Args:
        histories: One line each, by its label.
        title: Above the picture.
        theme: `"light"` or `"dark"`.
        width: Inches; below 6 it is laid out for a phone.

    Returns:
        A matplotlib figure; save it with `save`.

    Example:
    >>> figure = plot_scale({"run": ScaleHistory(8.0, 10, (ScaleChange(2, 8.0, 4.0, "overflow", "d/kernel"),))})
    >>> [line.get_label() for line in figure.axes[0].get_lines()]
    ['run', 'overflow: d/kernel (1)']
    """
    with sheet(theme, width, 4.6 if is_narrow(width) else 4.2) as (figure, style):
        axes = figure.subplots()
        colors = style.lines(len(histories)) if len(histories) > 1 else [style.faint]
        for color, (label, history) in zip(colors, histories.items(), strict=True):
            span = _span(history)
            _line(axes, history, span, color, label)
            _mark_growths(axes, _thinned(history.because("growth"), span), style, color)
            _mark_gaps(axes, history, style)
            guilty = _by_variable(history.overflows()) if len(histories) == 1 else {"": history.overflows()}
            _mark_overflows(axes, guilty, span, style, color, 22 if is_narrow(width) else 34)
        spans = [*map(_span, histories.values())]
        _frame(axes, f"{title}\nof each kind one mark in {max(spans):,} steps" if max(spans) > 1 else title, width)
    return figure


def plot_simulations(
    scales: Mapping[str, Sequence[float]],
    skipped: Mapping[str, Sequence[int]],
    title: str = "What each rule would have done",
    *,
    theme: Theme = "light",
    width: float = WIDE,
) -> Figure:
    """Draws the loss scale that each rule would have used, one panel a rule, and the steps it would have skipped.

    Args:
        scales: For each rule by its label, the scale of each step.
        skipped: For each of them, which steps it skips.
        title: Above the picture.
        theme: `"light"` or `"dark"`.
        width: Inches; below 6 it is laid out for a phone.

    Returns:
        A matplotlib figure; save it with `save`.

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


def _frame(axes: Axes, title: str, width: float) -> None:
    powers_of_two(axes)
    axes.set(title=title, ylabel="loss scale (factor on the loss)")
    count_steps(axes, is_narrow(width))
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    legend(axes, width)


def _size(drawn: Sequence[object], usual: float) -> float:
    """Returns a size of marks and lines at which many do not become one block."""
    return usual if len(drawn) <= _CROWD else usual / 2


def _span(history: ScaleHistory) -> int:
    """Returns the number of steps that are drawn as one: 1, or what makes many changes few enough to tell apart."""
    if len(history.changes) <= _MOST:
        return 1
    return math.ceil((history.steps - history.first) / _BINS)


def _line(axes: Axes, history: ScaleHistory, span: int, color: str, label: str) -> None:
    steps, scales = history.points()
    if span == 1:
        axes.step(steps, scales, where="post", color=color, label=label, linewidth=_size(history.changes, 2.0))
        return
    edges = numpy.arange(steps[0], steps[-1], span)
    # Each bin begins with the scale that holds at its first step.
    begins = numpy.searchsorted(steps, edges, side="right") - 1
    low, high = (extreme.reduceat(numpy.asarray(scales), begins) for extreme in (numpy.minimum, numpy.maximum))
    reach = numpy.append(low, low[-1]), numpy.append(high, high[-1])
    look: dict[str, Any] = {"step": "post", "color": color, "alpha": 0.35}
    axes.fill_between([*edges, steps[-1]], *reach, label=f"{label}, lowest to highest", **look)


def _thinned(changes: Sequence[ScaleChange], span: int) -> list[ScaleChange]:
    """Returns the last change in each stretch of so many steps."""
    return list(changes) if span == 1 else list({change.step // span: change for change in changes}.values())


def _by_variable(overflows: Sequence[ScaleChange]) -> dict[str, list[ScaleChange]]:
    """Returns the overflows of the most frequent variables, in the order of their count, and of all others as one."""
    counts = Counter(change.variable or "unknown" for change in overflows)
    named = [name for name, _ in counts.most_common(_NAMED if len(counts) > _NAMED + 1 else _NAMED + 1)]
    groups: dict[str, list[ScaleChange]] = {name: [] for name in named}
    for change in overflows:
        name = change.variable or "unknown"
        groups.setdefault(name if name in named else f"{len(counts) - len(named)} others", []).append(change)
    return groups


def _mark_overflows(
    axes: Axes, guilty: Mapping[str, list[ScaleChange]], span: int, style: Style, edge: str, longest: int
) -> None:
    colors, size = [*style.colors, style.faint], _size([*chain.from_iterable(guilty.values())], 8)
    for index, (name, changes) in enumerate(guilty.items()):
        if not changes:
            continue
        drawn = _thinned(changes, span)
        others = name not in {change.variable or "unknown" for change in changes}
        color = style.ink if not name else style.faint if others else colors[index]
        axes.plot(
            [change.step for change in drawn],
            [change.old_scale for change in drawn],
            linestyle="none",
            marker="." if others and name else _MARKERS[index],
            markersize=size,
            markerfacecolor=color,
            markeredgecolor=edge if not name else style.paper,
            markeredgewidth=0.6,
            label=f"overflow: {shorten(name, longest)} ({len(changes):,})" if name else "overflow: step skipped",
            zorder=4,
        )


def _mark_growths(axes: Axes, growths: Sequence[ScaleChange], style: Style, color: str) -> None:
    if growths:
        # At the scale that it left: a growth that overflows at once has the mark of the overflow at the new one.
        steps, scales = [change.step for change in growths], [change.old_scale for change in growths]
        edge: dict[str, Any] = {"markeredgecolor": style.paper, "markeredgewidth": 0.6}
        axes.plot(steps, scales, "^", markersize=_size(growths, 8), color=color, label="growth", zorder=3, **edge)


def _mark_gaps(axes: Axes, history: ScaleHistory, style: Style) -> None:
    for low, high in history.gaps():
        axes.axvspan(low, high, color=style.faint, alpha=0.25, linewidth=0, label="changes lost")
