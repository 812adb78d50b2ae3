"""Loading of a run's log, as far as it can be read."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tfmixed import records
from tfmixed.errors import UsageError
from tfmixed.fidelity import GradientFidelity
from tfmixed.ranges import GradientRanges
from tfmixed.records import (
    EventsLost,
    FidelityRecord,
    Progress,
    RangesRecord,
    Record,
    RunRecord,
    ScaleChange,
    json_lines,
)
from tfmixed.scaling import ScaleHistory

_Kind = TypeVar("_Kind", RunRecord, ScaleChange, EventsLost, Progress, RangesRecord, FidelityRecord)
_MOST_NAMED = 3  # invalid lines that have a sentence each


@dataclass(frozen=True)
class Run:
    """The log of one run.

    Args:
        name: A name that distinguishes the run from others.
        log: Its records.
        problems: Sentences about lines that could not be read. Defaults to `()`.
    """

    name: str
    log: tuple[Record, ...]
    problems: tuple[str, ...] = ()

    def all(self, kind: type[_Kind]) -> list[_Kind]:
        """Returns the records of one kind."""
        return [record for record in self.log if isinstance(record, kind)]

    def last(self, kind: type[_Kind]) -> _Kind | None:
        """Returns the last record of one kind. None if there is none."""
        return next(reversed(self.all(kind)), None)

    @property
    def begin(self) -> RunRecord | None:
        """The last record of a start. None if the log has none."""
        return self.last(RunRecord)

    @cached_property
    def history(self) -> ScaleHistory:
        """The loss scale over the steps."""
        return ScaleHistory.of(self.log)

    @property
    def steps(self) -> int:
        """Number of attempted steps, as far as the log knows, including those before the log."""
        return self.history.steps

    @property
    def final_scale(self) -> float:
        """The scale at the end of the log."""
        return self.history.points()[1][-1]

    @cached_property
    def skipped(self) -> int:
        """Number of skipped steps. A lower limit if the log ends within an epoch or holds no progress."""
        step, skipped = self.counted_until
        return skipped + sum(change.step >= step for change in self.history.overflows())

    @property
    def counted_until(self) -> tuple[int, int]:
        """The step up to which the device has counted skipped steps, and their number."""
        last = self.last(Progress)
        return (0, 0) if last is None else (last.step + 1, last.skipped_steps)

    @property
    def lost(self) -> int:
        """Number of scale changes that are missing in the log."""
        return sum(lost.count for lost in self.all(EventsLost))

    @cached_property
    def overflow_counts(self) -> Counter[str]:
        """Number of overflows by the first variable whose gradient was not finite."""
        return Counter(change.variable or "unknown" for change in self.history.overflows())

    @property
    def guilty(self) -> Counter[str]:
        """The name of `overflow_counts` in version 0.1."""
        return self.overflow_counts

    @cached_property
    def ranges(self) -> GradientRanges | None:
        """The last gradient ranges, those in float32 if there are any. None if the log has none."""
        found = self.all(RangesRecord)
        exact = [record for record in found if record.precision == "float32"] or found
        return GradientRanges(exact[-1]) if exact else None

    @property
    def fidelity(self) -> GradientFidelity | None:
        """The last comparison of gradients with float32. None if the log has none."""
        record = self.last(FidelityRecord)
        return None if record is None else GradientFidelity(record)

    @property
    def measured_at(self) -> float:
        """The loss scale at the step of the last ranges, or at the end of the log if that step is unknown."""
        if self.ranges is None or self.ranges.record.step is None:
            return self.final_scale
        return self.history.at(self.ranges.record.step)


def read(path: str | Path, name: str | None = None) -> Run:
    """Returns the log of a run. Invalid lines are listed in `problems`, and all others are read.

    Args:
        path: A log of `LossScaleLogger`, or a folder that contains one.
        name: The name of the run. Defaults to the path.

    Raises:
        UsageError: If the file does not exist, cannot be read or has a newer format, or if a folder does not contain
            exactly one log.
    """
    file = find(Path(path))
    try:
        lines, incomplete = json_lines.split(json_lines.text_of(file))
    except OSError as error:
        raise UsageError(f"RUN must be a readable log. Received: {str(path)!r} ({error.strerror})") from error
    found, invalid = [], []
    for number, line in enumerate(lines, start=1):
        try:
            found += [records.from_line(line)] if line.strip() else []
        except records.NewerFormatError as error:
            raise UsageError(
                f"RUN must be a log of this version or an earlier one. Received: {str(path)!r} ({error})"
            ) from error
        except ValueError:
            invalid.append(number)
    cut = ["The last line is incomplete: the run is still writing, or was killed."] if incomplete.strip() else []
    problems = [*_invalid(invalid), *cut, *_missing(found)]
    # Bytes of a path that are not UTF-8 are escaped.
    printable = os.fsencode(path).decode("utf-8", "backslashreplace")
    return Run(printable if name is None else name, tuple(found), tuple(problems))


def find(path: Path) -> Path:
    """Returns the log at a path: the path itself, or the only `.jsonl` file in a folder.

    Raises:
        UsageError: If the file does not exist, or if a folder does not contain exactly one log.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, False for an impossible path
        if not os.path.exists(path):
            raise UsageError(
                f"RUN must be a log of LossScaleLogger or a folder with one. The path does not exist: {str(path)!r}"
            )
        return path
    found = sorted(path.glob("*.jsonl")) or sorted(path.rglob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"RUN must be a folder with a .jsonl file. Received: {str(path)!r}")
    names = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
    raise UsageError(f"RUN must be one log. The folder {str(path)!r} contains {len(found)}: {names}")


def _invalid(lines: list[int]) -> list[str]:
    problems = [
        f"Line {number} is not a record that this version knows. It was left out." for number in lines[:_MOST_NAMED]
    ]
    if len(lines) > _MOST_NAMED:
        problems.append(f"{len(lines) - _MOST_NAMED} more lines were left out, the last of them line {lines[-1]}.")
    return problems


def _missing(found: list[Record]) -> list[str]:
    if not found:
        return ["The log holds no records."]
    sentences = {
        RunRecord: "The first line of a run is missing: model, rule, hardware and versions are unknown.",
        Progress: "No epoch was completed: skipped steps that did not change the scale are not counted.",
        RangesRecord: "There are no gradient ranges: losses to half precision are unknown. The callback GradientRanges "
        "writes ranges.",
    }
    kinds = set(map(type, found))
    return [sentence for kind, sentence in sentences.items() if kind not in kinds]
