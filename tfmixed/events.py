"""The log on the device: a ring of optimizer variables that the step itself writes.

So the step of a change is exact whatever runs it (`steps_per_execution`, XLA, strategies), and nobody has to look at
every step to see a change. Only draining reads the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy
from keras import ops

from tfmixed.records import Change, EventsLost, Reason, ScaleChange

OVERFLOW, GROWTH, SET = range(3)
_REASONS: tuple[Reason, ...] = ("overflow", "growth", "set")
NO_VARIABLE = -1

Ring = dict[str, keras.Variable]


def start(capacity: int) -> dict[str, Any]:
    """Returns the first values of the ring's variables, by name.

    `event_count` and `events_drained` are totals since the beginning: their difference is what is still to be read.
    """
    return {
        "event_count": numpy.int32(0),
        "events_drained": numpy.int32(0),
        "event_steps": numpy.zeros(capacity, "int32"),
        "event_causes": numpy.zeros((capacity, 2), "int32"),  # reason, variable
        "event_scales": numpy.zeros((capacity, 2), "float32"),  # old, new
    }


def log(ring: Ring, step: Any, old: Any, new: Any, reason: Any, variable: Any) -> None:
    """Writes one entry if `new` differs from `old`, by selecting: nothing branches.

    Args:
        ring: The variables that `start` describes, among others.
        step: Integer scalar, the attempted step.
        old: float32 scalar.
        new: float32 scalar.
        reason: Integer scalar, an index into overflow, growth, set.
        variable: Integer scalar, index of the guilty trainable variable, or `NO_VARIABLE`.
    """
    changed = ops.not_equal(new, old)
    count = ops.copy(ring["event_count"].value)
    capacity = ring["event_steps"].shape[0]
    here = ops.logical_and(changed, ops.equal(ops.arange(capacity, dtype="int32"), ops.cast(count % capacity, "int32")))
    causes = ops.stack([ops.cast(reason, "int32"), ops.cast(variable, "int32")])
    _write(ring["event_steps"], here, step)
    _write(ring["event_causes"], here[:, None], causes)
    _write(ring["event_scales"], here[:, None], ops.stack([old, new]))
    ring["event_count"].assign(count + ops.cast(changed, count.dtype))


def drain(ring: Ring, paths: Sequence[str]) -> list[Change]:
    """Returns the entries that were not drained yet, oldest first, and marks them as drained. Reads the device.

    Args:
        ring: As in `log`.
        paths: Paths of the trainable variables.
    """
    if int(ring["event_count"].numpy()) == int(ring["events_drained"].numpy()):
        return []
    values = {name: ring[name].numpy() for name in start(1)}
    ring["events_drained"].assign(values["event_count"])
    return entries(values, paths)


def overflows(ring: Ring, paths: Sequence[str], since: int) -> list[ScaleChange]:
    """Returns the overflows since a step that the ring still holds, drained or not. Reads the device."""
    values = {**{name: ring[name].numpy() for name in start(1)}, "events_drained": 0}
    changes = [each for each in entries(values, paths) if isinstance(each, ScaleChange) and each.step >= since]
    return [each for each in changes if each.reason == "overflow"]


def entries(values: Mapping[str, Any], paths: Sequence[str]) -> list[Change]:
    """Returns the entries that were not drained yet, oldest first.

    Args:
        values: What the variables that `start` describes hold, as numpy has it.
        paths: Paths of the trainable variables.
    """
    count, drained = int(values["event_count"]), int(values["events_drained"])
    steps, causes, scales = (values[name].tolist() for name in ("event_steps", "event_causes", "event_scales"))
    first = max(drained, count - len(steps))
    events: list[Change] = []
    for index in (number % len(steps) for number in range(first, count)):
        (old, new), (reason, variable) = scales[index], causes[index]
        path = None if variable == NO_VARIABLE else paths[variable]
        events.append(ScaleChange(steps[index], old, new, _REASONS[reason], path))
    if first > drained:
        events.insert(0, EventsLost(first - drained, steps[first % len(steps)]))
    return events


def _write(variable: keras.Variable, mask: Any, entry: Any) -> None:
    variable.assign(ops.where(mask, ops.cast(entry, variable.dtype), variable.value))
