"""Atomic file writes: a file is written beside its target, flushed to disk, and moved into place."""

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


def write_bytes(path: _PathLike, content: bytes) -> None:
    """Writes a file and creates its folders; readers see either the old content or the new.

    A symbolic link is kept, and its target is written. An existing file keeps its mode and, where permitted, its owner.
    Of a file with several hard links, only this name gets the new content. Devices, pipes and standard output are
    written as streams.

    Raises:
        OSError: If the file cannot be written. Nothing new is left behind except folders.
    """
    special = stream(path)
    with replacement(path) if special is None else open_stream(special, "wb") as file:
        file.write(content)


def write_text(path: _PathLike, text: str) -> None:
    """Writes UTF-8 text like `write_bytes`, without converting line endings."""
    write_bytes(path, text.encode("utf-8"))


def prepare(path: _PathLike) -> None:
    """Creates the folders of a file and checks that it can be written, before expensive work starts.

    Raises:
        OSError: If the file cannot be written.
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
    """Yields a new file that replaces a regular one on exit, and is removed if the block raises."""
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
    """Returns what to open for standard output, a device or a pipe, and None for a regular or new file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else Path(path)


def open_stream(special: Path | int, mode: str) -> BinaryIO:
    """Opens what `stream` returned. Standard output stays open, and is written at its current position."""
    if special == 1 and sys.stdout is not None:
        sys.stdout.flush()  # keeps the order
    return open(special, mode, closefd=not isinstance(special, int))  # type: ignore[return-value]  # of a binary mode


def numbered(path: Path) -> Iterator[Path]:
    """Yields the path itself, then the same with `-2`, `-3` and so on before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _target(path: _PathLike) -> tuple[Path, os.stat_result | None]:
    """Returns the file behind symbolic links, whose folder it creates, and the status of an existing file."""
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
    """Opens a hidden file in the folder of the target, where a move is atomic."""
    partial = target.with_name(f".partial-{secrets.token_hex(8)}")
    return partial.open("xb"), partial  # with the mode that the umask gives


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not on Windows, nor on every file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
