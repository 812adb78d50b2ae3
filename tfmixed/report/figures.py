"""Figures of a report. They need matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib import figure

from tfmixed import plotting
from tfmixed.plotting import Theme
from tfmixed.plotting.histogram import span
from tfmixed.ranges import GradientRanges
from tfmixed.records import RangesRecord
from tfmixed.report.loading import Run


@dataclass(frozen=True)
class Figure:
    """A figure of a run.

    Args:
        caption: A description, also for readers who cannot see the figure.
        draw: Draws the figure of a run in a theme and a width in inches, for a place beside those of other runs.
    """

    caption: str
    draw: Callable[[Run, Theme, float, Sequence[Run]], figure.Figure]


def _scale(run: Run, theme: Theme, width: float, _: Sequence[Run]) -> figure.Figure:
    return plotting.plot_scale({"loss scale": run.history}, theme=theme, width=width)


def _ranges(run: Run, theme: Theme, width: float, runs: Sequence[Run]) -> figure.Figure:
    spans = [span(run.ranges.record, run.measured_at) for run in runs if run.ranges is not None]
    widest = min(low for low, _ in spans), max(high for _, high in spans)
    record = _measured(run).record
    half = [
        snapshot
        for snapshot in run.all(RangesRecord)
        if snapshot.step == record.step and snapshot.precision != record.precision
    ]
    beside = half[-1] if half else None
    return plotting.plot_ranges(record, run.measured_at, beside, span=widest, theme=theme, width=width)


def _draw_layers(run: Run, theme: Theme, width: float, _: Sequence[Run]) -> figure.Figure:
    return plotting.plot_layers(_measured(run).record, run.measured_at, theme=theme, width=width)


def _timeline(run: Run, theme: Theme, width: float, _: Sequence[Run]) -> figure.Figure:
    precision = _measured(run).record.precision
    snapshots = [record for record in run.all(RangesRecord) if record.precision == precision]
    return plotting.plot_timeline(snapshots, run.history, theme=theme, width=width)


def _measured(run: Run) -> GradientRanges:
    assert run.ranges is not None, "figure_keys names no figure of missing ranges"
    return run.ranges


FIGURES = {
    "scale": Figure("The loss scale over the steps, with growths and overflows.", _scale),
    "ranges": Figure("Magnitudes of all gradients, before and after scaling, over the zones of float16.", _ranges),
    "layers": Figure("Magnitudes of each layer's gradients, with the limits of float16.", _draw_layers),
    "timeline": Figure("Magnitudes of all gradients over the run, with the limits of float16.", _timeline),
}
