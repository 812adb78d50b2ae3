"""The log on the device: a ring of optimizer variables that the step itself writes.

So the step of a change is exact whatever runs it (`steps_per_execution`, XLA, strategies), and nobody has to look at
every step to see a change. Only draining reads the device; the entries stay until newer ones overwrite them.
"""

from __future__ import annotations

import weakref
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

    `event_count` and `events_drained` are totals since the beginning: of the entries written, and of those that a
    reader was told of.
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


def values(ring: Ring) -> dict[str, Any]:
    """Returns what the variables of the ring hold. Reads the device."""
    return {name: ring[name].numpy() for name in start(1)}


def overflows(ring: Ring, paths: Sequence[str], since: int) -> list[ScaleChange]:
    """Returns the overflows since a step that the ring still holds, told or not. Reads the device."""
    changes = entries(values(ring), paths, since=0)
    overflowed = [each for each in changes if isinstance(each, ScaleChange) and each.reason == "overflow"]
    return [each for each in overflowed if each.step >= since]


def entries(values: Mapping[str, Any], paths: Sequence[str], since: int | None = None) -> list[Change]:
    """Returns the entries that a reader was not told of, oldest first; those that are overwritten are counted.

    Args:
        values: What the variables that `start` describes hold, as numpy has it.
        paths: Paths of the trainable variables.
        since: How many changes it was told of. None: `events_drained`.
    """
    count = int(values["event_count"])
    since = int(values["events_drained"]) if since is None else since
    steps, causes, scales = (values[name].tolist() for name in ("event_steps", "event_causes", "event_scales"))
    first = max(since, count - len(steps))
    events: list[Change] = []
    for index in (number % len(steps) for number in range(first, count)):
        (old, new), (reason, variable) = scales[index], causes[index]
        path = None if variable == NO_VARIABLE else paths[variable]
        events.append(ScaleChange(steps[index], old, new, _REASONS[reason], path))
    if first > since:
        events.insert(0, EventsLost(first - since, steps[first % len(steps)]))
    return events


class Readers:
    """The places in the ring up to which its readers were told, one for each: none takes anything from another.

    The place of the reader that is furthest is kept on the device too, and saved with it. There readers begin that
    have no place yet: those of a restored run, and those that start later.
    """

    def __init__(self) -> None:
        self._places: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._furthest: int | None = None  # as last seen on the device

    def drain(self, ring: Ring, paths: Sequence[str], reader: Any = None, starts: bool = False) -> list[Change]:
        """Returns the entries that a reader was not told of, oldest first. Reads the device.

        Args:
            ring: As in `log`.
            paths: Paths of the trainable variables.
            reader: Any object; None stands for `drain_events`.
            starts: Whether others that start at the same time are to be told of the same entries.
        """
        count, furthest = (int(ring[name].numpy()) for name in ("event_count", "events_drained"))
        if furthest != self._furthest:  # the first look, or the variables were restored
            self._places.clear()
            self._places[self] = self._furthest = furthest
        key = self if reader is None else reader
        since = self._places.get(key, furthest)
        if since > count:  # restored too
            since = furthest
        self._places[key] = count
        if not starts and count != furthest:
            ring["events_drained"].assign(count)
            self._furthest = count
        if since == count:
            return []
        return entries(values(ring), paths, since)


def _write(variable: keras.Variable, mask: Any, entry: Any) -> None:
    variable.assign(ops.where(mask, ops.cast(entry, variable.dtype), variable.value))
