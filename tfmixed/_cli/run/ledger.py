"""What a run leaves: a log for each optimizer that scales, a report of them, and the last line."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmixed._cli.run.saying import say, say_end
from tfmixed._cli.run.wishes import Wish
from tfmixed._utils import atomic_write

_MOST = 4  # runs that a report lays side by side


@dataclass
class Entry:
    """What is known of one optimizer or scaler.

    Args:
        steps: Those that it attempted in this run; of one that does not count them, those that it took.
        skipped: How many of them were skipped; None where nobody counts.
        scale: The last loss scale; None where nothing is scaled.
        log: Its log, or None.
        is_ours: Whether the log is this run's own, and not one that the script writes.
        source: Where it is read: what `observing.remains` returned, or None.
        before: Steps, skipped ones and scale that it brought along from a file, less what it had done here by then;
            None until it trains.
        is_known: Whether its numbers could be read when they were last asked for.
    """

    steps: int = 0
    skipped: int | None = None
    scale: float | None = None
    log: Path | None = None
    is_ours: bool = True
    source: Any = None
    before: tuple[int, int, float | None] | None = None
    is_known: bool = True


class Ledger:
    """Knows the optimizers and scalers of a run, their logs, and how many layers were put into float32.

    Args:
        wish: What the command line asks for.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.islands = 0
        self._entries: list[Entry] = []
        self._of: weakref.WeakKeyDictionary[Any, Entry] = weakref.WeakKeyDictionary()
        self._found = sorted(wish.log_dir.glob("*.jsonl")) if wish.resumes else []

    def entry(self, optimizer: Any) -> Entry:
        """Returns what is known of an optimizer or scaler, which is in the books from now on."""
        if optimizer not in self._of:
            self._of[optimizer] = Entry()
            self._entries.append(self._of[optimizer])
        return self._of[optimizer]

    def keep(self, optimizer: Any) -> None:
        """Keeps what tells how many steps an optimizer or scaler took, should the script drop it before the end."""
        from tfmixed._cli.run import observing

        self.entry(optimizer).source = observing.remains(optimizer)

    def begin(self, optimizer: Any) -> None:
        """Notes what an optimizer brings along to its first step. Reads the device."""
        if self.entry(optimizer).before is None:
            self.restored(optimizer)

    def restored(self, optimizer: Any) -> None:
        """Notes that an optimizer goes on from what it now is; what it did until then has been noted."""
        self.keep(optimizer)
        entry = self.entry(optimizer)
        steps, skipped, scale = self._numbers(entry) or (0, 0, None)
        entry.before = steps - entry.steps, (skipped or 0) - (entry.skipped or 0), scale

    def counts(self) -> list[tuple[Entry, Any]]:
        """Returns the counts of the optimizers whose steps Keras counts. Does not wait for the device."""
        from tfmixed._cli.run import observing
        from tfmixed._core.variables import tensor

        counting = [each for each in list(self._of.values()) if isinstance(each.source, observing.Count)]
        return [(each, tensor(each.source.iterations.value)) for each in counting]

    def discount(self, counts: list[tuple[Entry, Any]]) -> None:
        """Takes what was counted since `counts` out of the steps of this run."""
        for entry, count in counts:
            steps, skipped, scale = entry.before or (0, 0, None)
            entry.before = steps + int(entry.source.iterations.numpy()) - int(count), skipped, scale

    def note(self, optimizer: Any) -> None:
        """Notes where an optimizer stands. Reads the device."""
        self.keep(optimizer)
        self._note(self.entry(optimizer))

    def _numbers(self, entry: Entry) -> tuple[int, int | None, float | None] | None:
        from tfmixed._cli.run import observing

        try:
            known = observing.numbers(entry.source)
        except Exception:  # the step that broke off has taken the variables, as on JAX, or the device is lost
            entry.is_known = False
            return None
        entry.is_known = True
        return known

    def _note(self, entry: Entry) -> None:
        known = self._numbers(entry)
        if known is not None:
            steps, skipped, entry.scale = known
            before = entry.before or (0, 0, None)
            entry.steps, entry.skipped = steps - before[0], None if skipped is None else skipped - before[1]

    def log_of(self, optimizer: Any) -> Path:
        """Returns the log of an optimizer that steps next: a new file, or that of the run that was restored.

        Raises:
            OSError: There can be none.
        """
        return self._log_of(self.entry(optimizer), int(optimizer.attempted_steps) > 0)

    def _log_of(self, entry: Entry, is_restored: bool) -> Path:
        from tfmixed.callbacks import run_log

        if entry.log is None:
            goes_on = len(self._found) == 1 and is_restored
            entry.log = self._found.pop() if goes_on else claimed(self.wish.log_dir, "loss_scale", ".jsonl")
        entry.log = run_log.claim(entry.log)
        return entry.log

    def close(self, reason: BaseException | None) -> None:
        """Writes what is not written yet, and says how the run ended, by which exception if by any."""
        from tfmixed._cli.run import observing

        for optimizer in list(self._of):
            self.keep(optimizer)
        for entry in self._entries:
            self._note(entry)
            if entry.steps and entry.log is None and entry.is_ours and entry.skipped is not None:
                before = entry.before or (0, 0, None)
                first = max(before[0], 0)
                try:
                    observing.write_log(entry.source, self._log_of(entry, first > 0), first, before[2])
                except Exception as error:  # the script has ended: its exit code stays
                    say(f"no log ({type(error).__name__}: {error})")
            if entry.steps and (message := observing.skips(entry)) is not None:
                say(message)
        later = [] if self._is_known or not self.has_steps else ["what came later is not known"]
        said = "; ".join([self.summary(), *self._files(), *later])
        say_end(said, None if self.has_steps else reason)

    @property
    def has_steps(self) -> bool:
        """Whether any step is known."""
        return any(each.steps for each in self._entries)

    @property
    def _is_known(self) -> bool:
        return all(each.is_known for each in self._entries)

    def summary(self) -> str:
        """Returns steps, skipped ones and the scale, of all optimizers together."""
        entries = [each for each in self._entries if each.steps]
        if not entries:
            return "no training step was seen" if self._is_known else "the number of steps is not known"
        words = [f"{len(entries)} runs"] if len(entries) > 1 else []
        words += [f"{sum(each.steps for each in entries)} steps", *_scales(entries)]
        if self.islands:
            words.append(f"{self.islands} {'layer' if self.islands == 1 else 'layers'} in float32")
        return ", ".join(words)

    def _files(self) -> Iterator[str]:
        logs = [(each.log, each.is_ours) for each in self._entries if each.log is not None]
        if len(logs) == 1:
            yield f"log {logs[0][0]}"
        elif logs:
            yield f"{len(logs)} logs in {', '.join(sorted({f'{log.parent}{os.sep}' for log, _ in logs}))}"
        if ours := [log for log, is_ours in logs if is_ours]:
            yield _report(ours)


def _scales(entries: list[Entry]) -> Iterator[str]:
    """Yields what happened to the loss scale."""
    scales = sorted({each.scale for each in entries if each.scale is not None})
    if not scales:
        yield "no loss scale"
        return
    skips = [each.skipped for each in entries if each.skipped is not None]
    is_unknown = any(each.skipped is None and each.scale is not None for each in entries)
    if skips:
        yield f"{sum(skips)} skipped"
    if is_unknown:
        yield "those of Keras's own scaler not counted" if skips else "skipped ones not counted"
    yield f"final scale {scales[0]:g}" if len(scales) == 1 else f"final scales {scales[0]:g} to {scales[-1]:g}"


def _report(logs: list[Path]) -> str:
    """Writes a report, and returns where it is, or why it is not."""
    if len(logs) > _MOST:
        return "no report of so many: tfmixed report LOG"
    try:
        from tfmixed.report import Report, read

        path = claimed(logs[0].parent, "report", ".html")
        Report([read(log) for log in logs]).save_page(path)
    except ImportError as error:
        return f"no report ({error}): pip install 'tfmixed[plot]'"
    except (Exception, KeyboardInterrupt) as error:  # the script has ended: its exit code stays
        return f"no report ({type(error).__name__}: {error})"
    return f"report {path}"


def unwritable(folder: Path, error: OSError) -> str:
    """Returns what is said of a folder that takes no log."""
    return f"--log-dir must be a folder that can be written, received {str(folder)!r}: {error}"


def claimed(folder: Path, stem: str, suffix: str) -> Path:
    """Returns a file that was not there and is now: `stem.suffix`, or one with a number.

    Raises:
        OSError: There can be none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in atomic_write.numbered(folder / f"{stem}{suffix}"):
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError
