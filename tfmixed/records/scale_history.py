"""The loss scale of a run, step by step, as its log knows it."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tfmixed.records import Change, EventsLost, Progress, Record, RunRecord, ScaleChange


@dataclass(frozen=True)
class ScaleHistory:
    """The loss scale of one run.

    Args:
        initial_scale: The scale of the first step.
        steps: How many steps were attempted, those before the first one included.
        changes: What the log holds.
        first: The first attempted step that it speaks of.

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
        """Returns the history that a log tells; one that says nothing of the scale has scale 1 and no changes.

        Args:
            log: What `records.read_log` returns. A log without a first line begins where its records do.
        """
        told = sorted(_said(log), key=lambda each: each[0])
        changes = {_key(each): each for each in log if isinstance(each, (ScaleChange, EventsLost))}
        ordered = tuple(sorted(changes.values(), key=lambda each: each.step))
        last = max((_step_after(each) for each in log), default=0)
        return cls(told[0][1] if told else 1.0, last, ordered, told[0][0] if told else 0)

    def points(self) -> tuple[list[int], list[float]]:
        """Returns steps, and the scale from each step on; the last step twice, so that a line reaches the end."""
        steps, scales = [self.first], [self.initial_scale]
        changes = self._scale_changes()
        following = [*(change.step for change in changes[1:]), None]
        for change, after in zip(changes, following, strict=False):
            if change.old_scale != scales[-1]:  # what led there is lost
                steps.append(change.step)
                scales.append(change.old_scale)
            # Of two changes at a step, the first one was made by hand, before the step.
            steps.append(change.step if after == change.step else change.step + 1)
            scales.append(change.new_scale)
        return [*steps, max(self.steps, steps[-1], self.first + 1)], [*scales, scales[-1]]

    def at(self, step: int) -> float:
        """Returns the scale of a step, as far as the log knows it."""
        steps, scales = self.points()
        return scales[max(bisect.bisect_right(steps, step) - 1, 0)]

    def overflows(self) -> list[ScaleChange]:
        """Returns the changes that an overflow made."""
        return self.because("overflow")

    def because(self, reason: str) -> list[ScaleChange]:
        """Returns the changes of one reason."""
        return [change for change in self._scale_changes() if change.reason == reason]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yields the first step of each stretch of unknown scale, and the first one after it."""
        lost = [each.before_step for each in self.changes if isinstance(each, EventsLost)]
        start, scale = self.first, self.initial_scale
        for change in self._scale_changes():
            gap = change.old_scale != scale or any(start <= step <= change.step for step in lost)
            if gap and start < change.step:
                yield start, change.step
            start, scale = change.step + 1, change.new_scale

    def scale_of_each_step(self) -> list[float | None]:
        """Returns the scale of each step from the first on; None where the log does not know it."""
        steps, scales = self.points()
        each: list[float | None] = []
        for (low, high), scale in zip(pairwise(steps), scales, strict=False):
            each += [scale] * (min(high, self.steps) - low)
        for low, high in self.gaps():
            each[low - self.first : high - self.first] = [None] * (high - low)
        return each

    def _scale_changes(self) -> list[ScaleChange]:
        return [change for change in self.changes if isinstance(change, ScaleChange)]


def _key(change: Change) -> tuple[object, ...]:
    """Returns what is the same where a change was logged twice."""
    told = (change.reason, change.old_scale, change.new_scale) if isinstance(change, ScaleChange) else ()
    return change.event, change.step, *told


def _said(log: Iterable[Record]) -> Iterator[tuple[int, float]]:
    """Yields what a log says of the scale: a step, and the scale it had."""
    for each in log:
        if isinstance(each, RunRecord):
            yield each.step, each.loss_scale
        elif isinstance(each, ScaleChange):
            yield each.step, each.old_scale
        elif isinstance(each, Progress):
            yield each.step + 1, each.loss_scale


def _step_after(record: Record) -> int:
    """Returns the number of attempted steps that a record is sure of."""
    if isinstance(record, (ScaleChange, Progress)):
        return record.step + 1
    return record.step or 0
