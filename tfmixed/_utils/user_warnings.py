"""The code outside that called into this package and the frameworks: warnings and messages name its line."""

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


def caller(libraries: tuple[str, ...] = LIBRARIES, but_for: tuple[str, ...] = ()) -> FrameType | None:
    """Returns the innermost frame that is of none of these libraries; None where there is none.

    A thread of a framework's, such as a replica, works for what the main thread waits in.

    Args:
        libraries: Names of packages.
        but_for: What the names of further modules begin with.
    """
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    return _innermost(sys._getframe(1), libraries, but_for) or _innermost(main, libraries, but_for)


def _innermost(frame: FrameType | None, libraries: tuple[str, ...], but_for: tuple[str, ...]) -> FrameType | None:
    while frame is not None and not is_outside(frame, libraries, but_for):
        frame = frame.f_back
    return frame


def is_outside(frame: FrameType, libraries: tuple[str, ...] = LIBRARIES, but_for: tuple[str, ...] = ()) -> bool:
    """Returns whether a frame is of none of these libraries."""
    name, file = frame.f_globals.get("__name__", ""), os.path.basename(frame.f_code.co_filename)
    known = name.partition(".")[0] in libraries or name.startswith(but_for)
    return not known and not file.startswith("__autograph_generated_file")  # its lines are nobody's


def warn(message: str) -> None:
    """Warns at the line of the script, however deep in the frameworks and here the reason was found."""
    frame = caller()
    if frame is None:  # a command of ours
        warnings.warn(message, stacklevel=2)
        return
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, seen)
