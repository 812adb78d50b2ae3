"""What `tfmixed run` says: lines on the process's standard error, which name the script's own line where there is one."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import NoReturn

_LIBRARIES = ("keras", "tfmixed", "tensorflow", "tf_keras", "jax", "torch", "wrapt", "functools", "contextlib")


def say(what: str) -> None:
    """Prints one line. Not to `sys.stderr`, which the script may have replaced to read what it prints itself."""
    if sys.__stderr__ is not None:
        print(f"tfmixed: {what}", file=sys.__stderr__, flush=True)


def refuse(what: str) -> NoReturn:
    """Ends the run with exit code 2, through a script's `except Exception` and AutoGraph's rewriting of errors too."""
    say(what)
    raise SystemExit(2)


def place() -> str:
    """Returns file and line of the code that called into the frameworks, as `train.py:12`."""
    frame = _outside(_LIBRARIES)
    if frame is None:
        return "the script"
    file = frame.f_code.co_filename
    near = os.path.relpath(file) if os.path.isabs(file) else file
    return f"{file if near.startswith(os.pardir) else near}:{frame.f_lineno}"


def is_called_by_tfmixed(but: str) -> bool:
    """Returns whether a function of Keras was called by a module of this package other than `but`."""
    frame = _outside(("keras", "contextlib", "functools"), but_for=__package__)
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return name.startswith("tfmixed.") and name != but


def _outside(libraries: tuple[str, ...], but_for: str = "") -> FrameType | None:
    """Returns the innermost frame that is of none of these libraries."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in libraries and not (but_for and name.startswith(but_for)):
            return frame
        frame = frame.f_back
    return None
