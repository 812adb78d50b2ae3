"""What happened in a run, as frozen records and as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

Reason = Literal["overflow", "growth", "set"]


@dataclass(frozen=True)
class ScaleChange:
    """One change of the loss scale.

    Args:
        step: The attempted step that changed it, counted from 0; skipped steps count.
        old_scale: The scale that this step's loss was multiplied by.
        new_scale: The scale of the next step.
        reason: `"overflow"`: a gradient of this step was not finite. `"growth"`: enough
            finite steps. `"set"`: chosen by hand, or lowered by the statistics of a rule.
        variable: Path of the first variable whose gradient was not finite, on an overflow.
        epoch: The epoch it was seen in, where the observer knows it.
    """

    event: ClassVar[str] = "scale_change"
    step: int
    old_scale: float
    new_scale: float
    reason: Reason
    variable: str | None = None
    epoch: int | None = None

    def __str__(self) -> str:
        guilty = f"  {self.variable}" if self.variable else ""
        change = f"{_short(self.old_scale)} -> {_short(self.new_scale)}"
        return f"step {self.step}: loss scale {change} ({self.reason}){guilty}"


@dataclass(frozen=True)
class EventsLost:
    """Scale changes that the ring on the device overwrote before anybody drained it.

    Args:
        count: How many.
        before_step: The step of the first change after the gap.
        epoch: The epoch in which the loss was noticed.
    """

    event: ClassVar[str] = "events_lost"
    count: int
    before_step: int
    epoch: int | None = None

    def __str__(self) -> str:
        return f"{self.count} scale changes before step {self.before_step} were lost: raise `event_capacity`"


Record = ScaleChange | EventsLost
_KINDS: dict[str, type[Record]] = {kind.event: kind for kind in (ScaleChange, EventsLost)}


def to_line(record: Record) -> str:
    """Returns the record as one line of JSON, without a line feed."""
    return json.dumps({"event": record.event, **asdict(record)})


def from_line(line: str) -> Record:
    """Returns the record of one line.

    Raises:
        ValueError: The line is no JSON object, or not one that `to_line` could have written.
    """
    try:
        values = json.loads(line)
        kind = _KINDS[values.pop("event")]
        if not all(_fits(values[name], wanted) for name, wanted in _types(kind).items()):
            raise ValueError("a field has another type")
        return kind(**{name: values[name] for name in _types(kind)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"line must be a record of a tfmixed log, received: {line[:200]!r}") from error


def _types(kind: type[Record]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value: Any, wanted: Any) -> bool:
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    kinds = get_args(wanted) or (wanted,)
    return type(value) in kinds or (float in kinds and type(value) is int)


def _short(scale: float) -> str:
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:g}"


def complete_lines(path: Path) -> Iterator[str]:
    """Yields the lines that were written whole; a process killed in a write leaves a torn last one."""
    with path.open("r", encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.endswith("\n"))


def read_log(path: str | Path) -> list[Record]:
    """Returns all records of a log.

    Args:
        path: A file that `LossScaleLogger` wrote; it may still be growing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than a torn last one is no record.
    """
    return [from_line(line) for line in complete_lines(Path(path)) if line.strip()]
