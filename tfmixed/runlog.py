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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import keras

import tfmixed
from tfmixed import hardware, outside, records, whole
from tfmixed.records import Change, EventsLost, Progress, Record, RunRecord, ScaleChange
from tfmixed.state import Observable

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
    """

    file: BinaryIO
    writer: threading.Thread


_open: dict[str, _Open] = {}  # by the path behind symbolic links


def claim(path: Path) -> Path:
    """Opens and locks a log for the run that begins, and returns its path.

    If another running process or thread writes that log, it is a new file beside it with a number, and a warning says
    so. The lock ends with `release`, or with the process, however it ends. A thread may claim a log again.

    Raises:
        OSError: If the file cannot be written.
    """
    for each in whole.numbered(path):
        if _hold(each, is_new=each != path):
            if each != path:
                outside.warn(
                    f"The log {str(path)!r} is being written by another training. This one is logged in "
                    f"{str(each)!r}: pass that path to continue it later, and a path of its own to each training"
                )
            return each
    raise AssertionError


def begin(
    path: Path, step: int, kinds: tuple[type[Record], ...], changes: Sequence[Change] = ()
) -> tuple[Path, list[Change]]:
    """Claims a log and continues it; returns its path and what `continue_at` returns."""
    claimed = claim(path)
    try:
        return claimed, continue_at(claimed, step, kinds, changes)
    except BaseException:
        release(claimed)
        raise


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
    if whole.stream(path) is not None:
        return list(changes)
    try:
        lines = records.lines.read_lines(path) if path.exists() else []
    except ValueError as error:
        why = f": {error}" if isinstance(error, records.NewerFormatError) else ""
        raise ValueError(f"path must be a log of LossScaleLogger or a new file, received {str(path)!r}{why}") from error
    old = [(line, record) for line, record in lines if not _goes(record, step, kinds)]
    first = min([step, *(change.step for change in changes)])
    overlap = [each for _, each in old if isinstance(each, (ScaleChange, EventsLost)) and each.step >= first]
    pairs = zip(overlap, changes, strict=False)
    agreed = len(list(takewhile(lambda pair: dataclasses.replace(pair[0], epoch=None) == pair[1], pairs)))
    gone = {id(each) for each in overlap[agreed:]} if changes else set()
    _rewrite(path, "".join(f"{line}\n" for line, record in old if id(record) not in gone).encode())
    return list(changes[agreed:])


def _goes(record: Record, step: int, kinds: tuple[type[Record], ...]) -> bool:
    return isinstance(record, kinds) and record.step is not None and record.step >= step


def _rewrite(path: Path, content: bytes) -> None:
    """Gives a log another content, unless it has it; it stays locked throughout."""
    if path.exists() and path.read_bytes() == content:
        return
    held = _open.get(_key(path))
    with whole.replacement(path) as new:
        new.write(content)
        if held is not None:
            new.flush()
            file = open(os.dup(new.fileno()), "ab")  # noqa: SIM115  # stays open
            _lock(file)
    if held is not None:
        held.file.close()
        held.file = file


def _hold(path: Path, is_new: bool) -> bool:
    """Opens and locks a log; returns whether nothing else that runs writes it."""
    key, here = _key(path), threading.current_thread()
    if held := _open.get(key):
        is_free = held.writer is here or not held.writer.is_alive()
        held.writer = here if is_free else held.writer
        return is_free
    try:
        file = _opened(path, "xb" if is_new else "ab")
    except FileExistsError:
        return False
    is_free = whole.stream(path) is not None or _lock(file)
    if not is_free or not _is_at(path, file):  # taken, or replaced before it was locked
        file.close()
        return is_free and _hold(path, is_new)
    _open[key] = _Open(file, here)
    return True


def _opened(path: Path, mode: str = "ab") -> BinaryIO:
    special = whole.stream(path)
    if special is not None:
        return whole.open_stream(special, mode)
    Path(_key(path)).parent.mkdir(parents=True, exist_ok=True)
    return path.open(mode)  # type: ignore[return-value]


def _is_at(path: Path, file: BinaryIO) -> bool:
    if whole.stream(path) is not None:
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
        held.file.close()
    _open.clear()


atexit.register(_release_all)
if hasattr(os, "register_at_fork"):  # a forked process would keep the locks when its parent is killed
    os.register_at_fork(after_in_child=_release_all)


def describe(model: keras.Model | None, scaler: Observable) -> RunRecord:
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


def numbers(scaler: Observable) -> dict[str, float]:
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
