"""The log of a run as a file: continued after a restart, and whole up to the last line at any time."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import importlib
import math
import os
import platform
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import keras

import tfmixed
from tfmixed import hardware, records
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import atomic_write, user_warnings
from tfmixed.records import Change, EventsLost, Progress, Record, RunRecord, ScaleChange

try:
    import fcntl
except ImportError:  # Windows, where a log is not locked
    fcntl = None  # type: ignore[assignment]


@dataclass
class _Open:
    """A log that this process writes.

    Args:
        file: Open at its end, and locked.
        writer: The thread that writes it.
        loop: Returns the scaler of the loop that writes it; None once that is deleted, and in `fit`.
    """

    file: BinaryIO
    writer: threading.Thread
    loop: Callable[[], Any]


_open: dict[str, _Open] = {}  # by the path behind symbolic links


def claim(path: Path, loop: Any = None, is_own: Callable[[Path], bool] = lambda _: True) -> Path:
    """Opens and locks a log for the run that begins, and returns its path.

    If another running process, thread or loop writes that log, or it is not the run's own, the run gets a new file
    beside it with a number, and a warning. The lock ends with `release`, or with the process, however it ends. A
    thread may claim a log again.

    Args:
        path: The log.
        loop: The scaler of a custom loop, which may run beside others in one thread. None in `fit`.
        is_own: Returns whether the run may continue a log.

    Raises:
        OSError: If the file cannot be written.
    """
    reason = ""
    for each in atomic_write.numbered(path):
        if not _hold(each, each != path, loop):
            reason = reason or "is being written by another training"
            continue
        try:
            if is_own(each):
                break
        except BaseException:
            release(each)
            raise
        release(each)
        reason = reason or "has later steps, and nothing shows that this training wrote them"
    if each != path:
        user_warnings.warn(
            f"The log {str(path)!r} {reason}. This one is logged in {str(each)!r}: pass that path to continue it "
            "later, and a path of its own to each training"
        )
    return each


def begin(
    path: Path,
    step: int,
    kinds: tuple[type[Record], ...],
    changes: Sequence[Change] = (),
    scaler: ScalerBase | None = None,
    loop: Any = None,
) -> tuple[Path, list[Change]]:
    """Claims a log and continues it; returns its path and what `continue_at` returns.

    Args:
        path: The log.
        step: As in `continue_at`.
        kinds: As in `continue_at`.
        changes: As in `continue_at`.
        scaler: What the run trains with, by whose state it recognizes its own log.
        loop: As in `claim`.
    """
    claimed = claim(path, loop, lambda each: is_own(each, step, kinds, scaler))
    try:
        return claimed, continue_at(claimed, step, kinds, changes)
    except BaseException:
        release(claimed)
        raise


def is_own(path: Path, step: int, kinds: tuple[type[Record], ...], scaler: ScalerBase | None) -> bool:
    """Returns whether a run that goes on at `step` may continue a log: nothing of another training would be deleted.

    A run that begins at step 0 replaces any log. One that was restored deletes lines only of a log that agrees with
    its state, if no numbered file beside it does so too.

    Raises:
        ValueError: As in `continue_at`.
    """
    if step == 0 or atomic_write.stream(path) is not None:
        return True
    log = [record for _, record in _read(path) if record is not None]
    agrees = _agrees(log, step, scaler)
    if not any(_goes(record, step, kinds) for record in log):
        return agrees is not False
    return agrees is True and not any(_agrees(other, step, scaler) for other in _logs_beside(path))


def _agrees(log: Sequence[Record], step: int, scaler: ScalerBase | None) -> bool | None:
    """Compares a log with the state of a scaler before `step`. Reads the device.

    Returns:
        True if an epoch ended in just this state, or the changes are the same and not growths alone, which come at the
        same steps in many trainings. False if the log says something else. None if it says too little.
    """
    if scaler is None:
        return None
    ends = [record for record in log if isinstance(record, Progress) and record.step == step - 1]
    if ends:
        now = progress(step - 1, None, numbers(scaler), {})
        return (ends[-1].skipped_steps, ends[-1].gradient_norm) == (now.skipped_steps, now.gradient_norm)
    known = scaler._buffered_events()
    first = known[0].step + 1 if known and isinstance(known[0], EventsLost) else 0
    told = [record.step for record in log if isinstance(record, (RunRecord, ScaleChange, EventsLost, Progress))]
    window = range(max(first, min(told, default=0)), min(step, max(told, default=-1) + 1))
    ours, theirs = (_changes_within(window, each) for each in (known, log))
    if theirs - ours:
        return False
    return True if ours == theirs and any(reason != "growth" for *_, reason in ours) else None


def _changes_within(steps: range, records: Iterable[Record]) -> set[tuple[Any, ...]]:
    changes = [each for each in records if isinstance(each, ScaleChange) and each.step in steps]
    return {(each.step, each.old_scale, each.new_scale, each.reason) for each in changes}


def _logs_beside(path: Path) -> Iterator[list[Record]]:
    """Yields the logs in the numbered files of a path."""
    for each in takewhile(Path.exists, islice(atomic_write.numbered(path), 1, None)):
        with contextlib.suppress(ValueError):
            yield records.read_log(each)


def release(path: Path | None) -> None:
    """Closes a log that was claimed."""
    if path is not None and (held := _open.pop(_key(path), None)):
        held.file.close()


def append(path: Path | None, new: Iterable[Record]) -> None:
    """Adds one line a record: one write each, straight to the system. A killed process loses at most the last.

    Without a path nothing is written.
    """
    if path is None:
        return
    held = _open.get(_key(path))
    if held and not _is_at(path, held.file):  # removed or replaced by another program
        held.file.close()
        held.file = _opened(path)
        _lock(held.file)
    with contextlib.nullcontext(held.file) if held else _opened(path) as file:
        for record in new:
            file.write(f"{records.to_line(record)}\n".encode())
            file.flush()


def continue_at(path: Path, step: int, kinds: tuple[type[Record], ...], changes: Sequence[Change] = ()) -> list[Change]:
    """Makes a log ready for a run that goes on at `step`, and returns those of `changes` that it does not hold.

    Lines of earlier steps stay, later ones of these kinds go. Where log and `changes` overlap, because the run was
    saved before its log was written and killed after it, the lines of the log stay for as long as they agree. A device
    or a pipe is not read.

    Raises:
        ValueError: If the file is not a log, or one of a later version.
    """
    if atomic_write.stream(path) is not None:
        return list(changes)
    old = [(line, record) for line, record in _read(path) if not _goes(record, step, kinds)]
    first = min([step, *(change.step for change in changes)])
    overlap = [each for _, each in old if isinstance(each, (ScaleChange, EventsLost)) and each.step >= first]
    pairs = zip(overlap, changes, strict=False)
    agreed = len(list(takewhile(lambda pair: dataclasses.replace(pair[0], epoch=None) == pair[1], pairs)))
    gone = {id(each) for each in overlap[agreed:]} if changes else set()
    _rewrite(path, "".join(f"{line}\n" for line, record in old if id(record) not in gone).encode())
    return list(changes[agreed:])


def _read(path: Path) -> list[tuple[str, Record | None]]:
    try:
        return records.json_lines.read_lines(path) if path.exists() else []
    except ValueError as error:
        why = f": {error}" if isinstance(error, records.NewerFormatError) else ""
        raise ValueError(f"path must be a log of LossScaleLogger or a new file, received {str(path)!r}{why}") from error


def _goes(record: Record | None, step: int, kinds: tuple[type[Record], ...]) -> bool:
    return isinstance(record, kinds) and record.step is not None and record.step >= step


def _rewrite(path: Path, content: bytes) -> None:
    """Gives a log another content, unless it has it; it stays locked throughout."""
    if path.exists() and path.read_bytes() == content:
        return
    held = _open.get(_key(path))
    with atomic_write.replacement(path) as new:
        new.write(content)
        if held is not None:
            new.flush()
            file = open(os.dup(new.fileno()), "ab")  # noqa: SIM115  # stays open
            _lock(file)
    if held is not None:
        held.file.close()
        held.file = file


def _hold(path: Path, is_new: bool, loop: Any) -> bool:
    """Opens and locks a log; returns whether nothing else that runs writes it."""
    key, here = _key(path), threading.current_thread()
    reference = (lambda: None) if loop is None else weakref.ref(loop)
    if held := _open.get(key):
        if held.writer.is_alive():
            others = held.loop()
            if held.writer is not here or (loop is not None and others is not None and others is not loop):
                return False
        held.writer, held.loop = here, held.loop if loop is None else reference
        return True
    try:
        file = _opened(path, "xb" if is_new else "ab")
    except FileExistsError:
        return False
    is_free = atomic_write.stream(path) is not None or _lock(file)
    if not is_free or not _is_at(path, file):  # taken, or replaced before it was locked
        file.close()
        return is_free and _hold(path, is_new, loop)
    _open[key] = _Open(file, here, reference)
    return True


def _opened(path: Path, mode: str = "ab") -> BinaryIO:
    special = atomic_write.stream(path)
    if special is not None:
        return atomic_write.open_stream(special, mode)
    Path(_key(path)).parent.mkdir(parents=True, exist_ok=True)
    return path.open(mode)  # type: ignore[return-value]


def _is_at(path: Path, file: BinaryIO) -> bool:
    if atomic_write.stream(path) is not None:
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> bool:
    """Locks a file until all its descriptors are closed; returns False if another process or open file has the lock."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def _key(path: Path) -> str:
    return os.path.realpath(path)


def _release_all() -> None:
    for held in _open.values():
        with contextlib.suppress(OSError):  # a full disk, which `append` has told of
            held.file.close()
    _open.clear()


atexit.register(_release_all)
if hasattr(os, "register_at_fork"):  # a forked process would keep the locks when its parent is killed
    os.register_at_fork(after_in_child=_release_all)


def describe(model: keras.Model | None, scaler: ScalerBase) -> RunRecord:
    """Returns the record of a run that begins now.

    Args:
        model: What is trained; None in a loop that nobody told.
        scaler: Its `LossScaleOptimizer` or `GradScaler`.
    """
    devices = hardware.describe()
    backend = keras.backend.backend()
    policy = keras.config.dtype_policy() if model is None else model.dtype_policy
    inner = getattr(scaler, "inner_optimizer", None)
    return RunRecord(
        step=int(scaler.attempted_steps),
        loss_scale=float(scaler.measured()["loss_scale"]),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        model="" if model is None else str(model.name),
        policy=policy.name,
        rule=scaler.rule.get_config(),
        optimizer="" if inner is None else type(inner).__name__,
        devices=[device.name for device in sorted(devices.devices, key=lambda device: device != devices.main)],
        versions={
            "Python": platform.python_version(),
            "tfmixed": tfmixed.__version__,
            "Keras": keras.version(),
            backend: str(importlib.import_module(backend).__version__),
        },
    )


def numbers(scaler: ScalerBase) -> dict[str, float]:
    """Returns what a scaler has measured, as numbers. Reads the device."""
    return {name: float(value) for name, value in scaler.measured().items()}


def progress(step: int, epoch: int | None, numbers: Mapping[str, float], logs: Mapping[str, Any]) -> Progress:
    """Returns the record of where a run stands after `step`.

    Args:
        step: The last attempted step, counted from 0.
        epoch: The epoch that ended, if there are any.
        numbers: What the function of this name returns.
        logs: Those of `fit`, which may hold the loss.
    """
    norm, loss = numbers["gradient_norm"], logs.get("loss")
    return Progress(
        step,
        epoch,
        numbers["loss_scale"],
        int(numbers["skipped_steps"]),
        norm if math.isfinite(norm) else None,
        float(loss) if loss is not None and math.isfinite(loss) else None,
    )
