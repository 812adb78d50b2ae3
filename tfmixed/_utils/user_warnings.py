"""Warnings and messages that name the line of the user's code that called into this package and the frameworks."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from types import FrameType

LIBRARIES = (
    *("tfmixed", "keras", "tensorflow", "tf_keras", "jax", "jaxlib", "torch", "wrapt"),
    *("functools", "contextlib", "threading", "typer", "click", "optree", "numpy", "absl", "runpy"),
)


def caller() -> FrameType | None:
    """Returns the innermost frame outside the libraries, or None.

    In a thread of a framework, such as a replica, the main thread is searched: it waits for the result.
    """
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    return _innermost(sys._getframe(1)) or _innermost(main)


def _innermost(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not is_outside(frame):
        frame = frame.f_back
    return frame


def is_outside(frame: FrameType) -> bool:
    """Returns whether a frame belongs to none of the libraries."""
    name, file = frame.f_globals.get("__name__", ""), os.path.basename(frame.f_code.co_filename)
    is_library = name.partition(".")[0] in LIBRARIES
    return not is_library and not file.startswith("__autograph_generated_file")  # its lines are not in any source


def warn(message: str) -> None:
    """Issues a `UserWarning` at the user's line of code, regardless of how deep in the frameworks the cause lies."""
    frame = caller()
    if frame is None:  # a command of this package
        warnings.warn(message, stacklevel=2)
        return
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)
