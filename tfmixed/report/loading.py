"""The log of a run, read as far as it can be read."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tfmixed import records
from tfmixed.errors import UsageError
from tfmixed.formats import FLOAT32
from tfmixed.ranges import GradientRanges
from tfmixed.records import EventsLost, Progress, RangesRecord, Record, RunRecord, ScaleChange
from tfmixed.scaling import ScaleHistory

_Kind = TypeVar("_Kind", RunRecord, ScaleChange, EventsLost, Progress, RangesRecord)
_TOLD = 3  # broken lines that are named one by one


@dataclass(frozen=True)
class Run:
    """What the log of one run holds.

    Args:
        name: What tells this run from another one.
        log: Its records.
        problems: What could not be read, as sentences.
    """

    name: str
    log: tuple[Record, ...]
    problems: tuple[str, ...] = ()

    def all(self, kind: type[_Kind]) -> list[_Kind]:
        """Returns the records of one kind."""
        return [each for each in self.log if isinstance(each, kind)]

    @cached_property
    def begin(self) -> RunRecord | None:
        """The last line that says what runs where; None where there is none."""
        return next(reversed(self.all(RunRecord)), None)

    @cached_property
    def history(self) -> ScaleHistory:
        """The loss scale over the steps."""
        return ScaleHistory.of(self.log)

    @property
    def steps(self) -> int:
        """How many steps were attempted, as far as the log knows; those of an earlier log included."""
        return self.history.steps

    @property
    def final_scale(self) -> float:
        """The scale at the end of the log."""
        return self.history.points()[1][-1]

    @cached_property
    def skipped(self) -> int:
        """How many steps were skipped: at least, where the log ends within an epoch or holds no progress."""
        counted, after = self.counted_until, self.history.overflows()
        return counted[1] + sum(change.step >= counted[0] for change in after)

    @property
    def counted_until(self) -> tuple[int, int]:
        """The step up to which skipped steps were counted on the device, and how many they were."""
        last = next(reversed(self.all(Progress)), None)
        return (0, 0) if last is None else (last.step + 1, last.skipped_steps)

    @property
    def lost(self) -> int:
        """How many scale changes the log misses."""
        return sum(each.count for each in self.all(EventsLost))

    @cached_property
    def guilty(self) -> Counter[str]:
        """In how many overflows each variable was the first one that was not finite."""
        return Counter(change.variable or "unknown" for change in self.history.overflows())

    @cached_property
    def ranges(self) -> GradientRanges | None:
        """The last gradient ranges: of float32, where there are some; None where there are none."""
        found = self.all(RangesRecord)
        true = [each for each in found if each.precision == "float32"] or found
        return GradientRanges(true[-1]) if true else None

    @property
    def measured_at(self) -> float:
        """The loss scale in use where the last ranges were measured; 1 where nobody says."""
        if self.ranges is None or self.ranges.record.step is None:
            return self.final_scale
        return self.history.at(self.ranges.record.step)


def read(path: str | Path, name: str | None = None) -> Run:
    """Returns what a log holds; lines that are no records are named, and the rest is read.

    Args:
        path: A log of `LossScaleLogger`, or a folder that holds one.
        name: What tells this run from another one. None: the path.

    Raises:
        UsageError: There is no such file, it cannot be read, it is of a newer format, or a folder holds no log or
            several.
    """
    file = find(Path(path))
    try:
        lines, torn = records.json_lines.split(records.json_lines.text_of(file))
    except OSError as error:
        raise UsageError(f"RUN must be a log that can be read, received {str(path)!r}: {error.strerror}") from error
    found, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            found += [_checked(records.from_line(line))] if line.strip() else []
        except records.NewerFormatError as error:
            raise UsageError(f"RUN must be a log that can be read, received {str(path)!r}: {error}") from error
        except ValueError:
            broken.append(number)
    return Run(_printable(path) if name is None else name, tuple(found), tuple(_problems(found, broken, torn)))


def find(path: Path) -> Path:
    """Returns the log that a path means: itself, or the only `.jsonl` file in a folder.

    Raises:
        UsageError: There is no such file, or a folder holds no log or several.
    """
    if not os.path.isdir(path):  # False for what no path can be, where Path.is_dir raises
        if not os.path.exists(path):
            raise UsageError(
                f"RUN must be a log of LossScaleLogger or a folder with one, and {str(path)!r} is not there"
            )
        return path
    found = sorted(path.glob("*.jsonl")) or sorted(path.rglob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"RUN must be a folder with a .jsonl file, and {str(path)!r} holds none")
    named = ", ".join(str(each) for each in found[:5]) + (", ..." if len(found) > 5 else "")
    raise UsageError(f"RUN must name one log, and {str(path)!r} holds {len(found)}: {named}")


def _printable(path: str | Path) -> str:
    r"""Returns a path as text that is valid UTF-8: other bytes of it are spelled out, as in `caf\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _checked(record: Record) -> Record:
    """Returns the record, if its scales are some: a damaged line can be JSON still."""
    for name in ("loss_scale", "old_scale", "new_scale", "scale"):
        if not 0 < getattr(record, name, 1.0) <= FLOAT32.max:
            raise ValueError(f"{name} must be above 0 and a float32, received {record}")
    return record


def _problems(found: list[Record], broken: list[int], torn: str) -> list[str]:
    told = [f"Line {number} is no record that this version knows, and was left out." for number in broken[:_TOLD]]
    if len(broken) > _TOLD:
        told.append(f"So were {len(broken) - _TOLD} more lines, the last of them line {broken[-1]}.")
    if torn.strip():
        told.append("The last line is not whole: the run was killed while it wrote, or is still writing.")
    if not found:
        return [*told, "The log holds no records: nothing was logged, or not yet."]
    if not any(isinstance(each, RunRecord) for each in found):
        told.append("The line that begins a run is missing: model, rule, hardware and versions are unknown.")
    if not any(isinstance(each, Progress) for each in found):
        told.append("No epoch came to its end: skipped steps that left the scale as it was are not counted.")
    if not any(isinstance(each, RangesRecord) for each in found):
        told.append(
            "No gradient ranges: what half precision loses is unknown. The callback GradientRanges writes them."
        )
    return told
