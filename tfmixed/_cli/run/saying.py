"""What `tfmixed run` says: lines on standard error, which name the script's own line where there is one."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import NoReturn

from tfmixed._utils import user_warnings

# Modules whose functions stand around those of the frameworks.
_APPLIED = (str(__package__), "tfmixed._utils.patching", "tfmixed._islands.promotion")


def say(what: str) -> None:
    """Prints one line. Not to `sys.stderr`, which the script may have replaced to read what it prints itself."""
    if sys.__stderr__ is not None:
        print(f"tfmixed: {what}", file=sys.__stderr__, flush=True)


class Refused(SystemExit):
    """The end of a run that `refuse` has explained."""


def refuse(what: str) -> NoReturn:
    """Ends the run with exit code 2, through a script's `except Exception` and AutoGraph's rewriting of errors too."""
    say(what)
    raise Refused(2)


def say_end(what: str, reason: BaseException | None) -> None:
    """Prints the last line: `what` of a script that came to its end, or what ended it.

    Args:
        what: True only if nothing ended the script early.
        reason: The exception that did; None if none did.
    """
    if isinstance(reason, SystemExit):
        what = f"the script ended with exit code {reason.code}"
    elif reason is not None:
        what = f"the script ended with {type(reason).__name__}"
    if not isinstance(reason, Refused):
        say(what)


def place() -> str:
    """Returns file and line of the code that called into the frameworks, as `train.py:12`."""
    frame = user_warnings.caller()
    return "the script" if frame is None else place_of(frame, frame.f_lineno)


def place_of(frame: FrameType, line: int) -> str:
    """Returns the file of a frame, and a line."""
    file = frame.f_code.co_filename
    near = os.path.relpath(file) if os.path.isabs(file) else file
    return f"{file if near.startswith(os.pardir) else near}:{line}"


def caller(*libraries: str) -> str:
    """Returns the name of the innermost module that is neither of these libraries nor of this package."""
    frame = user_warnings.caller((*libraries, "contextlib", "functools"), but_for=_APPLIED)
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def is_within(module: str) -> bool:
    """Returns whether a function of a module is running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None
