"""Ring buffer of scale changes in optimizer variables, written on the device in the step that makes the change.

The step of a change is therefore exact in every mode (`steps_per_execution`, XLA, strategies), and no change is lost
between two looks. Only draining reads the device. Entries stay until newer ones overwrite them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from tfmixed._core import scalar_ops as ops
from tfmixed._core.variables import Variables
from tfmixed.records import Change, EventsLost, Reason, ScaleChange

OVERFLOW, GROWTH, SET = range(3)
_REASONS: tuple[Reason, ...] = ("overflow", "growth", "set")
NO_VARIABLE = -1


def initial_values(capacity: int) -> dict[str, Any]:
    """Returns the initial values of the buffer's variables by name.

    `event_count` and `events_drained` are totals since the beginning: entries written, and entries that a reader has
    drained.
    """
    return {
        "event_count": numpy.int32(0),
        "events_drained": numpy.int32(0),
        "event_steps": numpy.zeros(capacity, "int32"),
        "event_causes": numpy.zeros((capacity, 2), "int32"),  # reason, variable
        "event_scales": numpy.zeros((capacity, 2), "float32"),  # old, new
    }


def write(state: Variables, step: Any, old: Any, new: Any, reason: Any, variable: Any) -> None:
    """Writes one entry if `new` differs from `old`. Selects instead of branching.

    Args:
        state: Variables with those of `initial_values`.
        step: Integer scalar, the attempted step.
        old: float32 scalar, the scale before.
        new: float32 scalar, the scale after.
        reason: Integer scalar: `OVERFLOW`, `GROWTH` or `SET`.
        variable: Integer scalar, the index of the trainable variable that overflowed, or `NO_VARIABLE`.
    """
    changed = ops.not_equal(new, old)
    count = state.read("event_count")
    row = ops.cast(count % state.shapes["event_steps"][0], "int32")
    causes = ops.stack([ops.cast(reason, "int32"), ops.cast(variable, "int32")])
    entry = {"event_steps": step, "event_causes": causes, "event_scales": ops.stack([old, new])}
    for name, value in entry.items():
        state.assign_row(name, row, value, changed)
    state.assign({"event_count": count + ops.cast(changed, count.dtype)})


def read_buffer(state: Variables) -> dict[str, Any]:
    """Returns the values of the buffer's variables as NumPy arrays. Reads the device."""
    return {name: ops.convert_to_numpy(state.read(name)) for name in initial_values(1)}


def entries(values: Mapping[str, Any], paths: Sequence[str], since: int | None = None) -> list[Change]:
    """Returns the entries of the buffer, oldest first, with an `EventsLost` for those that were overwritten.

    Args:
        values: Values of the buffer's variables as NumPy arrays.
        paths: Paths of the trainable variables.
        since: Number of changes that the reader already knows. Defaults to `events_drained`.
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
    """Cursors of the buffer's readers, one for each, so that none takes an entry from another.

    The cursor that is furthest is kept on the device too, and is saved with it. Readers without a cursor begin there:
    those of a restored run, and those that start later.
    """

    def __init__(self) -> None:
        self._cursors: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._furthest: int | None = None  # as last read from the device

    def drain(self, state: Variables, paths: Sequence[str], reader: Any = None, starts: bool = False) -> list[Change]:
        """Returns the entries that are new to a reader, oldest first. Reads the device.

        Args:
            state: Variables with those of the buffer.
            paths: Paths of the trainable variables.
            reader: Any object. Defaults to None, the reader of `drain_events`.
            starts: If True, readers that start at the same time get the same entries. Defaults to False.
        """
        count, furthest = (int(state.read(name)) for name in ("event_count", "events_drained"))
        if furthest != self._furthest:  # the first look, or the variables were restored
            self._cursors.clear()
            self._cursors[self] = self._furthest = furthest
        key = self if reader is None else reader
        since = self._cursors.get(key, furthest)
        if since > count:  # the variables were restored too
            since = furthest
        self._cursors[key] = count
        if not starts and count != furthest:
            state.assign({"events_drained": count})
            self._furthest = count
        return [] if since == count else entries(read_buffer(state), paths, since)
