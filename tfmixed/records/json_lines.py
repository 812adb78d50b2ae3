"""Reading and writing of records as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import msgspec

from tfmixed.records.record_types import FORMAT, Change, Count, EventsLost, RangesRecord, Record, ScaleChange

_LINE_START = '{"event": "'


class NewerFormatError(ValueError):
    """A line has a format that only a later version of tfmixed can read."""


class UnknownEventError(ValueError):
    """A line has a known format but an event that only a later version of tfmixed knows."""


@dataclass(frozen=True)
class _Header:
    event: str
    format: Count = 1


_HEADER = msgspec.json.Decoder(_Header)
_DECODERS = {kind.event: msgspec.json.Decoder(kind) for kind in get_args(Record)}


def to_line(record: Record) -> str:
    """Returns the record as one line of JSON, without a line feed."""
    return json.dumps({"event": record.event, **asdict(record)})


def from_line(line: str) -> Record:
    """Returns the record of one line.

    Unknown fields are ignored. Fields with a default may be missing.

    Raises:
        NewerFormatError: If only a later version of tfmixed can read the format.
        UnknownEventError: If the event is unknown.
        ValueError: If the line is not a JSON object, or not one that `to_line` could have written: steps and counts
            are integers from 0 to 2^53, scales are positive float32 numbers, magnitudes are finite and not negative.
    """
    refused: type[ValueError] = ValueError
    try:
        text = _valid_unicode(line)
        header = _HEADER.decode(text)
        if header.format > FORMAT:
            raise NewerFormatError(
                f"format must be at most {FORMAT} for this version of tfmixed. Update tfmixed. "
                f"Received: format={header.format}"
            )
        if header.event not in _DECODERS:
            refused = UnknownEventError
            raise ValueError("unknown event")
        record: Record = _DECODERS[header.event].decode(text)
        _check_magnitudes(record)
    except NewerFormatError:
        raise
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise refused(f"line must be a record of a tfmixed log ({error}). Received: {line[:200]!r}") from error
    return record


def _valid_unicode(line: str) -> bytes:
    """Returns the line in UTF-8. Lone surrogates, which JSON can escape but nothing can display, become `?`."""
    if "\\ud" in line.lower():
        line = json.dumps(json.loads(line), ensure_ascii=False)
    return line.encode("utf-8", "replace")


def _check_magnitudes(record: Record) -> None:
    for gradient in record.ranges if isinstance(record, RangesRecord) else ():
        if gradient.nonzeros and not 0 < gradient.smallest <= gradient.largest:
            raise ValueError(f"smallest must be above 0 and at most largest in {gradient.name}")


def read_log(path: str | Path) -> list[Record]:
    """Returns all records of a log. Events that only a later version of tfmixed knows are left out.

    Args:
        path: A file that `LossScaleLogger` wrote. It may still be growing.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is not a record or has a newer format, or if the first line has an unknown event. An
            incomplete last line is ignored.
    """
    return [record for _, record in read_lines(path) if record is not None]


def read_lines(path: str | Path) -> Iterator[tuple[str, Record | None]]:
    """Yields the lines of a log with their records, as `read_log` reads them; None for an unknown event."""
    is_log = False
    for line in filter(str.strip, split(text_of(path))[0]):
        try:
            yield line, from_line(line)
        except UnknownEventError:
            if not is_log:  # a file of another program
                raise
            yield line, None
        is_log = True


def split(text: str) -> tuple[list[str], str]:
    """Returns the complete lines of a log, and the incomplete last line or `""`."""
    *lines, last = text.split("\n")
    # Zeros remain where a machine lost its power.
    if not _LINE_START.startswith(last.strip("\0")[: len(_LINE_START)]):
        return [*lines, last], ""
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return lines, last
    return [*lines, last], ""  # only the line feed is missing


def text_of(path: str | Path) -> str:
    """Returns the text of a file without a byte order mark. Bytes that are not UTF-8 are replaced."""
    return Path(path).read_text(encoding="utf-8-sig", errors="replace")


def read_changes(path: str | Path) -> list[Change]:
    """Returns the changes of the scale in a log, and how many of them were lost, as `read_log` reads it."""
    return [record for record in read_log(path) if isinstance(record, (ScaleChange, EventsLost))]
