"""The loss scale of a run over its steps, as far as its log knows it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from tfmixed.records import Change, EventsLost, Progress, Record, RunRecord, ScaleChange


@dataclass(frozen=True)
class ScaleHistory:
    """The loss scale of one run.

    Args:
        initial_scale: The scale of the first step.
        steps: Number of attempted steps, including those before the first one of the log.
        changes: The `ScaleChange` and `EventsLost` records of the log.
        first: The first attempted step of the log. Defaults to 0.

    Example:
    >>> ScaleHistory(8.0, 10, (ScaleChange(2, 8.0, 4.0, "overflow"),)).points()
    ([0, 3, 10], [8.0, 4.0, 4.0])
    """

    initial_scale: float
    steps: int
    changes: tuple[Record, ...]
    first: int = 0

    @classmethod
    def of(cls, log: Sequence[Record]) -> ScaleHistory:
        """Returns the history in a log. Without any record of the scale, the scale is 1.

        Args:
            log: The result of `records.read_log`. A log without a first line begins at its first record.
        """
        first, scale = min(_known_scales(log), key=lambda known: known[0], default=(0, 1.0))
        changes = {_identity(record): record for record in log if isinstance(record, (ScaleChange, EventsLost))}
        ordered = sorted(changes.values(), key=lambda change: change.step)
        return cls(scale, max(map(_steps_until, log), default=0), tuple(ordered), first)

    def points(self) -> tuple[list[int], list[float]]:
        """Returns steps, and the scale from each step on. The last scale is repeated at the end of the run."""
        steps, scales = [self.first], [self.initial_scale]
        changes = self._scale_changes
        following = [*(change.step for change in changes[1:]), None]
        for change, next_step in zip(changes, following, strict=False):
            if change.old_scale != scales[-1]:  # the changes before this one are lost
                steps.append(change.step)
                scales.append(change.old_scale)
            # Of two changes in one step, the first was assigned before the step.
            steps.append(change.step if next_step == change.step else change.step + 1)
            scales.append(change.new_scale)
        return [*steps, max(self.steps, steps[-1], self.first + 1)], [*scales, scales[-1]]

    def at(self, step: int) -> float:
        """Returns the scale of a step, as far as the log knows it."""
        steps, scales = self.points()
        return scales[max(bisect.bisect_right(steps, step) - 1, 0)]

    def overflows(self) -> list[ScaleChange]:
        """Returns the changes after an overflow."""
        return self.because("overflow")

    def because(self, reason: str) -> list[ScaleChange]:
        """Returns the changes with this reason."""
        return [change for change in self._scale_changes if change.reason == reason]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yields the first step of each interval of unknown scale, and the first step after it."""
        lost = [change.before_step for change in self.changes if isinstance(change, EventsLost)]
        start, scale = self.first, self.initial_scale
        for change in self._scale_changes:
            is_gap = change.old_scale != scale or any(start <= step <= change.step for step in lost)
            if is_gap and start < change.step:
                yield start, change.step
            start, scale = change.step + 1, change.new_scale

    def scale_of_each_step(self) -> list[float | None]:
        """Returns the scale of each step from the first on. None where the log does not know it."""
        steps, scales = self.points()
        known: list[float | None] = []
        for (low, high), scale in zip(pairwise(steps), scales, strict=False):
            known += [scale] * (min(high, self.steps) - low)
        for low, high in self.gaps():
            known[low - self.first : high - self.first] = [None] * (high - low)
        return known

    @cached_property
    def _scale_changes(self) -> list[ScaleChange]:
        return [change for change in self.changes if isinstance(change, ScaleChange)]


def _identity(change: Change) -> tuple[object, ...]:
    """Returns a key that is equal for a change that was logged twice."""
    values = (change.reason, change.old_scale, change.new_scale) if isinstance(change, ScaleChange) else ()
    return change.event, change.step, *values


def _known_scales(log: Sequence[Record]) -> Iterator[tuple[int, float]]:
    """Yields the steps of which a log holds the scale, and their scales."""
    for record in log:
        if isinstance(record, RunRecord):
            yield record.step, record.loss_scale
        elif isinstance(record, ScaleChange):
            yield record.step, record.old_scale
        elif isinstance(record, Progress):
            yield record.step + 1, record.loss_scale


def _steps_until(record: Record) -> int:
    """Returns the number of steps that were certainly attempted when the record was written."""
    return record.step + 1 if isinstance(record, (ScaleChange, Progress)) else record.step or 0
