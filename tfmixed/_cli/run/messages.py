"""Messages of `tfmixed run` on standard error, with the line of the script that they are about."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from tfmixed._utils import user_warnings

_refused = False


def say(message: str) -> None:
    """Prints a line on the process's own standard error: the script may have replaced `sys.stderr`."""
    if sys.__stderr__ is not None:
        print(f"tfmixed: {message}", file=sys.__stderr__, flush=True)


def refuse(message: str) -> NoReturn:
    """Ends the run with exit code 2. `SystemExit` passes the script's `except Exception` and AutoGraph."""
    global _refused
    _refused = True
    say(message)
    raise SystemExit(2)


def at_exit(function: Callable[[], None]) -> None:
    """Calls a function at exit, but not in forked processes. Registered again, it runs before later exit functions."""
    atexit.unregister(function)
    atexit.register(function)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: atexit.unregister(function))


def say_last(line: str, is_known: bool) -> None:
    """Prints the last line.

    Args:
        line: Result of the run.
        is_known: Whether the line tells of training steps. Otherwise the exception that ended the script is reported.
    """
    error = getattr(sys, "last_value", None)
    if error is not None and not is_known:
        say(f"the script ended with {type(error).__name__}")
    elif is_known or not _refused:
        say(line)
    if isinstance(error, KeyboardInterrupt):
        # Python ends by the signal only if the last string that was executed raised KeyboardInterrupt. Imports may have
        # executed others since.
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")


def place() -> str:
    """Returns file and line of the script's code that called into the frameworks, such as `train.py:12`."""
    frame = user_warnings.caller()
    return "the script" if frame is None else place_of(frame, frame.f_lineno)


def place_of(frame: FrameType, line: int) -> str:
    """Returns the file of a frame, relative to the current folder if it is in it, and a line."""
    file = frame.f_code.co_filename
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return f"{file if relative.startswith(os.pardir) else relative}:{line}"


def is_called_from(*modules: str) -> bool:
    """Returns whether a function of one of these modules, given by prefixes of their names, is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(modules):
        frame = frame.f_back
    return frame is not None
