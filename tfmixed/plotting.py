"""Pictures of records. Needs matplotlib, and no window: a figure is returned, or saved whole."""

from __future__ import annotations

import io
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tfmixed.records import Record, ScaleChange

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: safe for colour-blind readers
_OVERFLOW = "#000000"


@dataclass(frozen=True)
class ScaleHistory:
    """The loss scale of one run.

    Args:
        initial_scale: The scale of step 0.
        steps: How many steps were attempted.
        changes: What the log holds.
    """

    initial_scale: float
    steps: int
    changes: tuple[Record, ...]

    def points(self) -> tuple[list[int], list[float]]:
        """Returns steps, and the scale from each step on; the last step twice, so that a line reaches the end."""
        changes = [change for change in self.changes if isinstance(change, ScaleChange)]
        steps = [0, *(change.step + 1 for change in changes), max(self.steps, 1)]
        scales = [self.initial_scale, *(change.new_scale for change in changes)]
        return steps, [*scales, scales[-1]]

    def overflows(self) -> list[ScaleChange]:
        """Returns the changes that an overflow made."""
        return [change for change in self.changes if isinstance(change, ScaleChange) and change.reason == "overflow"]


def plot_scale(histories: Mapping[str, ScaleHistory], title: str = "Loss scale") -> Figure:
    """Draws the loss scale over the steps, with overflows marked at the scale that overflowed.

    Args:
        histories: One line each, by its label.
        title: Above the picture.

    Returns:
        A matplotlib figure; save it with `save`.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for color, (label, history) in zip(_cycle(len(histories)), histories.items(), strict=True):
        axes.step(*history.points(), where="post", color=color, label=label, linewidth=2)
        _mark_overflows(axes, history.overflows(), color)
    axes.set_yscale("log", base=2)
    axes.set(title=title, xlabel="attempted step", ylabel="loss scale (factor on the loss)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="best")
    return figure


def plot_times(times: Mapping[str, Mapping[str, Sequence[float]]], title: str = "Training step") -> Figure:
    """Draws the time of a step: a group of bars for each network, the median of each variant, with its spread.

    Args:
        times: Milliseconds, by network and variant. The first variant is what the numbers above the bars compare with.
        title: Above the picture.

    Returns:
        A matplotlib figure; save it with `save`.
    """
    figure = Figure(figsize=(2 + 2.4 * len(times), 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    variants = list(next(iter(times.values())))
    width = 0.8 / len(variants)
    for offset, (color, variant) in enumerate(zip(_cycle(len(variants)), variants, strict=True)):
        places = [place + (offset - (len(variants) - 1) / 2) * width for place in range(len(times))]
        # Networks differ by orders of magnitude: each group stands in units of its own first variant.
        firsts = [statistics.median(group[variants[0]]) for group in times.values()]
        relative = [[ms / first for ms in group[variant]] for first, group in zip(firsts, times.values(), strict=True)]
        medians = [statistics.median(each) for each in relative]
        spread = [
            [middle - min(each) for middle, each in zip(medians, relative, strict=True)],
            [max(each) - middle for middle, each in zip(medians, relative, strict=True)],
        ]
        bars = axes.bar(places, medians, width, color=color, label=variant, yerr=spread, capsize=2)
        axes.bar_label(bars, [f"{1 / middle:.2f}x" for middle in medians], fontsize=7, padding=3)
    names = [f"{name}\n{first:.1f} ms" for name, first in zip(times, firsts, strict=True)]
    axes.set_xticks(range(len(times)), names)
    axes.set(title=title, ylabel=f"time a step, {variants[0]} = 1")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(variants), frameon=False)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the picture in the format of the path's suffix; it appears whole or not at all.

    Raises:
        ValueError: matplotlib knows no format of that suffix.
    """
    target, format_, picture = Path(path), format_of(path), io.BytesIO()
    figure.savefig(picture, format=format_)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    partial.write_bytes(picture.getvalue())
    os.replace(partial, target)


def format_of(path: str | os.PathLike[str]) -> str:
    """Returns the format in which `save` would write to `path`.

    Raises:
        ValueError: matplotlib knows no format of that suffix.
    """
    format_, known = Path(path).suffix[1:].lower(), Figure().canvas.get_supported_filetypes()
    if format_ not in known:
        raise ValueError(f"path must end in one of {', '.join(f'.{name}' for name in known)}, received {str(path)!r}")
    return format_


def _mark_overflows(axes: Axes, overflows: list[ScaleChange], color: str) -> None:
    axes.plot(
        [change.step for change in overflows],
        [change.old_scale for change in overflows],
        linestyle="none",
        marker="X",
        markersize=9,
        markerfacecolor=_OVERFLOW,
        markeredgecolor=color,
        label="overflow: step skipped" if overflows else None,
    )


def _cycle(count: int) -> Iterable[str]:
    return (_COLORS[index % len(_COLORS)] for index in range(count))
