"""Atomic file writes: a file is written beside its target, flushed to disk, and moved there."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PathLike = str | os.PathLike[str]
_MOST_LINKS = 40  # the kernel's own limit


def write_bytes(path: _PathLike, content: bytes) -> None:
    """Writes a file and the folders that it needs; a reader sees the old content or the new, never a part.

    A symbolic link stays, and its target is written. Mode and, where permitted, owner of an existing file stay. Of a
    file with several hard links only this name gets the new content. Devices, pipes and `/dev/stdout` are written as
    streams.

    Raises:
        OSError: If it cannot be written; then nothing new is left behind but folders.
    """
    special = stream(path)
    if special is None:
        with replacement(path) as file:
            file.write(content)
        return
    with open_stream(special, "wb") as file:
        file.write(content)


def write_text(path: _PathLike, text: str) -> None:
    """Writes a file in UTF-8, as `write_bytes` does, with line feeds as they are."""
    write_bytes(path, text.encode("utf-8"))


def prepare(path: _PathLike) -> None:
    """Makes the folders that a file needs, and tests that it can be written, before expensive work starts.

    Raises:
        OSError: If it cannot.
    """
    if stream(path) is not None:
        _check_writable(Path(path))
        return
    target, _ = _target(path)
    file, partial = _partial(target)
    file.close()
    partial.unlink()


@contextlib.contextmanager
def replacement(path: _PathLike) -> Iterator[BinaryIO]:
    """Yields a new file that takes the place of a regular one when the block ends, and is removed if it raises."""
    target, old = _target(path)
    file, partial = _partial(target)
    try:
        with file:
            if old is not None and hasattr(os, "fchown"):  # not on Windows
                with contextlib.suppress(OSError):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def stream(path: _PathLike) -> Path | int | None:
    """Returns what to open of a device, a pipe or an open file of this process; None for a regular or new file."""
    descriptor = _descriptor(Path(path))
    if descriptor is not None:
        return descriptor
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else Path(path)


def open_stream(special: Path | int, mode: str) -> BinaryIO:
    """Opens what `stream` returned. An open file of this process stays open, and goes on where it stands."""
    if special == 1 and sys.stdout is not None:
        sys.stdout.flush()  # printed earlier, written earlier
    return open(special, mode, closefd=not isinstance(special, int))  # type: ignore[return-value]


def numbered(path: Path) -> Iterator[Path]:
    """Yields the path itself, then the same with `-2`, `-3` and so on before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _target(path: _PathLike) -> tuple[Path, os.stat_result | None]:
    """Returns the file behind symbolic links, with its folder made, and its present status."""
    try:
        old = os.stat(path)
    except FileNotFoundError:  # a loop of links is another error
        old = None
    if old is not None:
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _check_writable(Path(path))
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    return target, old


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _partial(target: Path) -> tuple[BinaryIO, Path]:
    """Opens a file under a new name: hidden, and on the target's disk, where a move is one step."""
    partial = target.with_name(f".partial-{secrets.token_hex(8)}")
    return partial.open("xb"), partial  # with the mode that the umask gives


def _descriptor(path: Path) -> int | None:
    """Returns the open file of this process that a path such as `/dev/stdout` means."""
    own = f"/proc/{os.getpid()}/fd"
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if str(path.parent) == own and path.name.isdigit():
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not on Windows, nor on every file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
