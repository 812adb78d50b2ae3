"""Steps of a run's loss-scaled optimizers, their logs, and the last line with the report."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmixed._cli.run.options import RunOptions
from tfmixed._utils import atomic_write

_MAX_REPORTED = 4  # runs that a report compares


@dataclass
class OptimizerRecord:
    """Steps of one optimizer in this run.

    Args:
        steps: Attempted steps.
        skipped: Skipped steps.
        scale: Last known loss scale, or None.
        log: Path of its log, or None.
        offset: Counters of the optimizer, less the steps of this run, when its present training began.
        training: The optimizer while it trains, None otherwise.
        is_complete: Whether the counters could be read at the end.
    """

    steps: int = 0
    skipped: int = 0
    scale: float | None = None
    log: Path | None = None
    offset: tuple[int, int] = (0, 0)
    training: Any = None
    is_complete: bool = True

    def begin(self, optimizer: Any) -> None:
        """Excludes the steps that an optimizer has taken so far, such as those of a restored run."""
        self.training = optimizer
        self.offset = int(optimizer.attempted_steps) - self.steps, int(optimizer.skipped_steps) - self.skipped

    def update(self) -> None:
        """Reads the counters of an optimizer that trains."""
        if self.training is None:
            return
        try:
            steps, skipped = int(self.training.attempted_steps), int(self.training.skipped_steps)
            self.scale = float(self.training.loss_scale)
        except Exception:  # an interrupted step of JAX has deleted the variables, or the device is lost
            self.is_complete = False
            return
        self.steps, self.skipped, self.is_complete = steps - self.offset[0], skipped - self.offset[1], True


class RunSummary:
    """Optimizers of a run that scale the loss, and the number of layers that were forced to float32.

    Args:
        options: Options of the run.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.islands = 0
        self.has_trained = False
        self.records: list[OptimizerRecord] = []
        self._by_optimizer: weakref.WeakKeyDictionary[Any, OptimizerRecord] = weakref.WeakKeyDictionary()
        self._old_logs = sorted(Path(options.folder).glob("*.jsonl")) if options.is_continued else []

    def record(self, optimizer: Any) -> OptimizerRecord:
        """Returns the record of an optimizer, a new one at first."""
        if optimizer not in self._by_optimizer:
            self._by_optimizer[optimizer] = OptimizerRecord()
            self.records.append(self._by_optimizer[optimizer])
        return self._by_optimizer[optimizer]

    def begin(self, optimizer: Any) -> None:
        """Notes that an optimizer starts to train. It is kept alive until `end`, or until the run ends."""
        if self.record(optimizer).training is None:
            self.record(optimizer).begin(optimizer)

    def end(self, optimizer: Any) -> None:
        """Notes that `fit` has ended."""
        if optimizer in self._by_optimizer:
            self._by_optimizer[optimizer].update()
            self._by_optimizer[optimizer].training = None

    def log_path(self, optimizer: Any) -> Path:
        """Returns the log of an optimizer: a new file, or the existing one if a restored run continues.

        Raises:
            OSError: If the file cannot be created.
        """
        record = self.record(optimizer)
        if record.log is None:
            is_restored = len(self._old_logs) == 1 and int(optimizer.attempted_steps) > 0
            record.log = (
                self._old_logs.pop() if is_restored else _new_file(Path(self.options.folder, "loss_scale.jsonl"))
            )
        return record.log

    def describe(self) -> str:
        """Returns steps, skipped steps and scale of all optimizers, in words."""
        records = [record for record in self.records if record.steps or not record.is_complete]
        words = [f"{len(records)} runs"] if len(records) > 1 else []
        if records:
            at_least = "" if all(record.is_complete for record in records) else "at least "
            words.append(f"{at_least}{sum(record.steps for record in records)} steps")
            words.append(f"{sum(record.skipped for record in records)} skipped")
            scales = [record.scale for record in records if record.scale is not None]
            ends = [f"{scale:g}" for scale in sorted({min(scales), max(scales)})] if scales else ["unknown"]
            words.append(f"final scale{'s' if ends[1:] else ''} {' to '.join(ends)}")
        elif self.has_trained and not self.records:
            words.append("trained without a loss scale")
        else:
            return "no training step was recorded"
        if self.islands:
            words.append(f"{self.islands} {'layer' if self.islands == 1 else 'layers'} in float32")
        return ", ".join(words)

    def close(self) -> str:
        """Writes the report, and returns the last line."""
        for record in self.records:
            record.update()
        logs = [record.log for record in self.records if record.steps and record.log is not None]
        parts = [self.describe()]
        if logs:
            folders = ", ".join(sorted({f"{log.parent}/" for log in logs}))
            parts.append(f"log {logs[0]}" if len(logs) == 1 else f"{len(logs)} logs in {folders}")
            parts.append(_write_report(logs))
        return "; ".join(parts)

    @property
    def has_steps(self) -> bool:
        """Training steps with a loss scale are known."""
        return any(record.steps for record in self.records)


def _write_report(logs: list[Path]) -> str:
    """Writes a report, and returns its path in words, or the reason why there is none."""
    if len(logs) > _MAX_REPORTED:
        return f"no report for more than {_MAX_REPORTED} logs; run `tfmixed report LOG`"
    try:
        from tfmixed.report import Report, read

        path = _new_file(logs[0].parent / "report.html")
        Report([read(log) for log in logs]).save_page(path)
    except ImportError as error:
        return f"no report ({error}): pip install 'tfmixed[plot]'"
    except (Exception, KeyboardInterrupt) as error:  # the script's exit code must stay
        return f"no report ({type(error).__name__}: {error})"
    return f"report {path}"


def _new_file(path: Path) -> Path:
    """Creates a file that did not exist, with a number in its name if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in atomic_write.numbered(path):
        with contextlib.suppress(FileExistsError):
            candidate.touch(exist_ok=False)
            return candidate
    raise AssertionError
