"""Log files: locked while they are written, continued after a restart, complete up to the last line."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from tfmixed import records
from tfmixed._utils import atomic_write, user_warnings
from tfmixed.records import Change, EventsLost, Record, ScaleChange, json_lines

try:
    import fcntl
except ImportError:  # Windows, where logs are not locked
    fcntl = None  # type: ignore[assignment]  # in place of the module


@dataclass
class _OpenLog:
    """A log that this process writes.

    Args:
        file: The file, locked and open for appending.
        thread: The thread that writes it.
        loop: Returns the scaler of the custom loop that writes it. None once that is deleted, and in `fit`.
    """

    file: BinaryIO
    thread: threading.Thread
    loop: Callable[[], Any]


_open_logs: dict[str, _OpenLog] = {}  # by the path behind symbolic links


def claim(path: Path, loop: Any = None, is_own: Callable[[Path], bool] = lambda _: True) -> Path:
    """Opens and locks a log for a new run, and returns its path.

    If another running process, thread or loop writes the log, or it belongs to another run, the run gets a new file
    with a number, and a warning. The lock ends with `release` or with the process. A thread may claim its log again.

    Args:
        path: The log.
        loop: The scaler of a custom loop, of which one thread may run several. None in `fit`.
        is_own: Returns True if the run may continue a log.

    Raises:
        OSError: If the file cannot be written.
    """
    reason = ""
    for candidate in atomic_write.numbered(path):
        if not _hold(candidate, candidate != path, loop):
            reason = reason or "is being written by another run"
            continue
        try:
            if is_own(candidate):
                break
        except BaseException:
            release(candidate)
            raise
        release(candidate)
        reason = reason or "has later steps, and cannot be shown to belong to this run"
    if candidate != path:
        user_warnings.warn(
            f"The log {str(path)!r} {reason}. This run is logged in {str(candidate)!r}. Pass that path to "
            "continue it later, and pass a different path to each run."
        )
    return candidate


def continue_at(path: Path, step: int, kinds: tuple[type[Record], ...], changes: Sequence[Change] = ()) -> list[Change]:
    """Prepares a log for a run that continues at `step`. Returns those of `changes` that it does not hold.

    Lines of earlier steps stay; later ones of these kinds are removed. The log and `changes` overlap if the run was
    saved before its log was written. There the lines of the log stay for as long as they agree. A device or a pipe is
    not read.

    Raises:
        ValueError: If the file is not a log, or has a newer format.
    """
    if atomic_write.stream(path) is not None:
        return list(changes)
    old = [(line, record) for line, record in read(path) if not is_repeated(record, step, kinds)]
    first = min([step, *(change.step for change in changes)])
    overlap = [record for _, record in old if isinstance(record, (ScaleChange, EventsLost)) and record.step >= first]
    pairs = zip(overlap, changes, strict=False)
    agreed = len(list(takewhile(lambda pair: dataclasses.replace(pair[0], epoch=None) == pair[1], pairs)))
    removed = {id(record) for record in overlap[agreed:]} if changes else set()
    _rewrite(path, "".join(f"{line}\n" for line, record in old if id(record) not in removed).encode())
    return list(changes[agreed:])


def read(path: Path) -> list[tuple[str, Record | None]]:
    """Returns the lines of a log with their records, as `json_lines.read_lines` does. A missing file is empty.

    Raises:
        ValueError: If the file is not a log, or has a newer format.
    """
    try:
        return list(json_lines.read_lines(path)) if path.exists() else []
    except ValueError as error:
        reason = f": {error}" if isinstance(error, records.NewerFormatError) else ""
        raise ValueError(
            f"path must be a log of LossScaleLogger or a new file. Received: {str(path)!r}{reason}"
        ) from error


def is_repeated(record: Record | None, step: int, kinds: tuple[type[Record], ...]) -> bool:
    """Returns True if a run that continues at `step` will write this record again."""
    return isinstance(record, kinds) and record.step is not None and record.step >= step


def _rewrite(path: Path, content: bytes) -> None:
    """Replaces the content of a log. It stays locked throughout."""
    if path.exists() and path.read_bytes() == content:
        return
    log = _open_logs.get(_key(path))
    with atomic_write.replacement(path) as new:
        new.write(content)
        if log is not None:
            new.flush()
            file = open(os.dup(new.fileno()), "ab")  # noqa: SIM115  # stays open
            _lock(file)
    if log is not None:
        log.file.close()
        log.file = file


def append(path: Path | None, new: Iterable[Record]) -> None:
    """Appends one line per record, each in one unbuffered write: a killed process loses at most the last line.

    Without a path nothing is written.
    """
    if path is None:
        return
    log = _open_logs.get(_key(path))
    if log and not _is_at(path, log.file):  # another program removed or replaced it
        log.file.close()
        log.file = _opened(path)
        _lock(log.file)
    with contextlib.nullcontext(log.file) if log else _opened(path) as file:
        for record in new:
            file.write(f"{records.to_line(record)}\n".encode())
            file.flush()


def release(path: Path | None) -> None:
    """Closes a log that was claimed."""
    if path is not None and (log := _open_logs.pop(_key(path), None)):
        log.file.close()


def _hold(path: Path, is_new: bool, loop: Any) -> bool:
    """Opens and locks a log. Returns False if another process, thread or loop writes it."""
    key, thread = _key(path), threading.current_thread()
    reference = (lambda: None) if loop is None else weakref.ref(loop)
    if log := _open_logs.get(key):
        is_other_loop = loop is not None and log.loop() not in (None, loop)
        if log.thread.is_alive() and (log.thread is not thread or is_other_loop):
            return False
        log.thread, log.loop = thread, log.loop if loop is None else reference
        return True
    try:
        file = _opened(path, "xb" if is_new else "ab")
    except FileExistsError:
        return False
    is_free = atomic_write.stream(path) is not None or _lock(file)
    if not is_free or not _is_at(path, file):  # locked by others, or replaced before it was locked
        file.close()
        return is_free and _hold(path, is_new, loop)
    _open_logs[key] = _OpenLog(file, thread, reference)
    return True


def _opened(path: Path, mode: str = "ab") -> BinaryIO:
    special = atomic_write.stream(path)
    if special is not None:
        return atomic_write.open_stream(special, mode)
    Path(_key(path)).parent.mkdir(parents=True, exist_ok=True)
    return path.open(mode)  # type: ignore[return-value]  # binary, as all modes here


def _is_at(path: Path, file: BinaryIO) -> bool:
    if atomic_write.stream(path) is not None:
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> bool:
    """Locks a file until all its descriptors are closed. Returns False if another open file has the lock."""
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
    for log in _open_logs.values():
        with contextlib.suppress(OSError):  # a full disk, which `append` has reported
            log.file.close()
    _open_logs.clear()


atexit.register(_release_all)
if hasattr(os, "register_at_fork"):  # a forked process would keep the locks after its parent is killed
    os.register_at_fork(after_in_child=_release_all)
