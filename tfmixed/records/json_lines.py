"""Records as lines of JSON, and logs of such lines."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tfmixed.records.record_types import FORMAT, Change, EventsLost, GradientRange, Record, ScaleChange

_KINDS: dict[str, type[Record]] = {kind.event: kind for kind in get_args(Record)}
_MOST = 2**53  # the largest number up to which JSON, pictures and float64 count exactly
_REACH = range(-127, 128)  # the exponents of float32
_TORN = '{"event": "'  # with which every line begins
_SIGNED = "loss"  # the only number that can be below 0


class NewerFormatError(ValueError):
    """A line of a format that only a later version of tfmixed reads."""


class UnknownEventError(ValueError):
    """A line of this format whose event only a later version of tfmixed knows."""


def to_line(record: Record) -> str:
    """Returns the record as one line of JSON, without a line feed."""
    return json.dumps({"event": record.event, **asdict(record)})


def from_line(line: str) -> Record:
    """Returns the record of one line.

    Fields that are unknown are ignored, and those that have a default may be missing.

    Raises:
        NewerFormatError: The line is of a format that only a later version reads.
        UnknownEventError: The event is not a known one.
        ValueError: The line is no JSON object, or not one that `to_line` could have written: steps and counts are
            whole numbers from 0 to 2^53, magnitudes are finite and not negative.
    """
    try:
        values = {"format": 1, **_values(line)}
        if _checked(values["format"], (int,)) > FORMAT:
            raise NewerFormatError(
                f"format must be at most {FORMAT} for this version of tfmixed: update it. "
                f"Received: format={values['format']}"
            )
        kind = _KINDS.get(_checked(values.pop("event"), (str,)))
        if kind is None:
            raise UnknownEventError
        record: Record = _made(kind, values)
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refused = UnknownEventError if isinstance(error, UnknownEventError) else ValueError
        raise refused(f"line must be a record of a tfmixed log, received: {line[:200]!r}") from error
    return record


def read_log(path: str | Path) -> list[Record]:
    """Returns all records of a log. Events that only a later version of tfmixed knows are left out.

    Args:
        path: A file that `LossScaleLogger` wrote; it may still be growing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than a torn last one is no record, is of a newer format, or is the first one and of an
            unknown event.
    """
    return [record for _, record in read_lines(path) if record is not None]


def read_lines(path: str | Path) -> list[tuple[str, Record | None]]:
    """Returns the lines of a log with their records, as `read_log` reads it; None stands for an unknown event."""
    found: list[tuple[str, Record | None]] = []
    for line in filter(str.strip, split(text_of(path))[0]):
        try:
            found.append((line, from_line(line)))
        except UnknownEventError:
            if not found:  # a file of another program
                raise
            found.append((line, None))
    return found


def split(text: str) -> tuple[list[str], str]:
    """Returns the lines of a log, and what is left of a last one that was not written to its end."""
    *lines, last = text.split("\n")
    try:
        if _TORN.startswith(last.strip("\0")[: len(_TORN)]):  # zeros: a machine that lost its power
            json.loads(last)  # a whole one lacks its line feed alone
    except (ValueError, RecursionError):
        return lines, last
    return [*lines, last], ""


def text_of(path: str | Path) -> str:
    """Returns the text of a file, without a byte order mark; bytes that are not UTF-8 are replaced."""
    return Path(path).read_text(encoding="utf-8-sig", errors="replace")


def read_changes(path: str | Path) -> list[Change]:
    """Returns the changes of the scale in a log, as `read_log` reads it, and what was lost of them."""
    return [record for record in read_log(path) if isinstance(record, (ScaleChange, EventsLost))]


def _values(line: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(line)
    if "\\ud" in line.lower():  # perhaps half of a pair, which JSON can spell and no page or terminal can show
        values = json.loads(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
    return values


_hints = functools.cache(get_type_hints)


def _made(kind: Any, values: dict[str, Any]) -> Any:
    given = {each.name for each in fields(kind) if each.name in values or _is_required(each)}
    read = {name: _read(values[name], wanted) for name, wanted in _hints(kind).items() if name in given}
    if any(type(each) in (int, float) and each < 0 for name, each in read.items() if name != _SIGNED):
        raise ValueError("a count, magnitude or scale is below 0")
    made = kind(**read)
    if isinstance(made, GradientRange) and made.nonzeros and not 0 < made.smallest <= made.largest < 2.0**128:
        raise ValueError("the magnitudes of a gradient are no float32, or contradict one another")
    return made


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _read(value: Any, wanted: Any) -> Any:
    """Returns the value that JSON had for a field of this type."""
    if wanted == dict[int, tuple[int, int, int, int]]:
        return {_exponent(text): _octave(parts) for text, parts in value.items()}
    origin, of = get_origin(wanted), get_args(wanted)
    if origin is list:
        return [_made(of[0], each) if is_dataclass(of[0]) else _read(each, of[0]) for each in _checked(value, (list,))]
    if origin is dict:
        return {name: _read(each, of[1]) for name, each in _checked(value, (dict,)).items()}
    if origin is Literal and value not in of:
        raise ValueError("a field has another value")
    return value if origin is Literal else _checked(value, (type(value),) if wanted is Any else of or (wanted,))


def _exponent(text: str) -> int:
    if (exponent := int(text)) not in _REACH:
        raise ValueError("an octave is none of float32")
    return exponent


def _octave(parts: Any) -> tuple[int, ...]:
    if len(parts) != 4 or not all(type(part) is int and 0 <= part <= _MOST for part in parts):
        raise ValueError("an octave has four counts")
    return tuple(parts)


def _checked(value: Any, kinds: tuple[Any, ...]) -> Any:
    kind = type(value)
    if kind not in kinds and not (float in kinds and kind is int):
        raise ValueError("a field has another type")
    if (kind is int and abs(value) > _MOST) or (kind is float and not math.isfinite(value)):
        raise ValueError("a number is too large, or none")
    return value
