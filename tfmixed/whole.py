"""Files that appear whole or not at all: written beside their place, and moved there."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, and the folders that it needs; whoever reads meanwhile finds the old one.

    Raises:
        OSError: It cannot be written; then nothing new is left behind but folders.
    """
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8, as `write_bytes` does, with line feeds as they are."""
    write_bytes(path, text.encode("utf-8"))


def prepare(path: str | os.PathLike[str]) -> None:
    """Makes the folders that a file needs, and tries whether it could be written: for what is costly to make.

    Raises:
        OSError: It could not.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"path must be a file, received the folder {str(path)!r}")
    partial = _partial(path)
    partial.touch()
    partial.unlink()


def _partial(path: str | os.PathLike[str]) -> Path:
    """Returns where a file is written first: hidden, and on the same disk, for only there a move is one step."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".partial-{target.name}")
