"""The pictures of a report. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from tfmixed import plotting
from tfmixed.plotting import Theme
from tfmixed.plotting.histogram import span
from tfmixed.ranges import GradientRanges
from tfmixed.records import RangesRecord
from tfmixed.report.loading import Run


@dataclass(frozen=True)
class Picture:
    """One picture of a run.

    Args:
        caption: What it shows, for those who do not see it too.
        draw: Draws it in a theme, so many inches wide, to stand beside the same picture of other runs.
    """

    caption: str
    draw: Callable[[Run, Theme, float, Sequence[Run]], Figure]


def _scale(run: Run, theme: Theme, width: float, _: Sequence[Run]) -> Figure:
    return plotting.plot_scale({"loss scale": run.history}, theme=theme, width=width)


def _ranges(run: Run, theme: Theme, width: float, runs: Sequence[Run]) -> Figure:
    spans = [span(each.ranges.record, each.measured_at) for each in runs if each.ranges is not None]
    reach = min(low for low, _ in spans), max(high for _, high in spans)
    of, at = _measured(run).record, run.measured_at
    return plotting.plot_ranges(of, at, _in_half(run), span=reach, theme=theme, width=width)


def _heat_map(run: Run, theme: Theme, width: float, _: Sequence[Run]) -> Figure:
    return plotting.plot_layers(_measured(run).record, run.measured_at, theme=theme, width=width)


def _timeline(run: Run, theme: Theme, width: float, _: Sequence[Run]) -> Figure:
    own = [each for each in run.all(RangesRecord) if each.precision == _measured(run).record.precision]
    return plotting.plot_timeline(own, run.history, theme=theme, width=width)


def _measured(run: Run) -> GradientRanges:
    assert run.ranges is not None, "a part of a run without ranges names no picture of them"
    return run.ranges


def _in_half(run: Run) -> RangesRecord | None:
    """Returns what came out in half precision of what was measured in float32, if that is in the log."""
    own = _measured(run).record
    found = [each for each in run.all(RangesRecord) if each.step == own.step and each.precision != own.precision]
    return found[-1] if found else None


PICTURES = {
    "scale": Picture("The loss scale over the steps, with growths and overflows.", _scale),
    "ranges": Picture("Magnitudes of all gradients, before and after scaling, over the zones of float16.", _ranges),
    "layers": Picture("Magnitudes of each layer's gradients, with the limits of float16.", _heat_map),
    "timeline": Picture("Magnitudes of all gradients over the run, with the limits of float16.", _timeline),
}
