"""The end of a script: its exit code, its traceback without ours in it, and the last word."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_OWN = tuple(os.path.join(_PACKAGE, *name) for name in (("running", ""), ("patching.py",), ("promotion.py",)))


@contextlib.contextmanager
def as_python_does(finish: Callable[[BaseException | None], None]) -> Iterator[None]:
    """Ends the process as `python` would after the code inside, and calls `finish` after its last output.

    `finish` is given the exception that ended the code; None if it came to its end, or exited with code 0.

    Exceptions go on to the interpreter, which decides on exit codes, on the signal of a KeyboardInterrupt and on what
    runs at exit; what is printed of them starts at the script's own first line.
    """
    process = os.getpid()

    def end(reason: BaseException | None) -> None:
        if os.getpid() == process:  # not in one that the script forked
            _join_threads()
            finish(reason)

    try:
        yield
    except SystemExit as stop:
        _print_message(stop)
        end(stop if stop.code else None)
        raise
    except BaseException as error:
        _strip(error)
        try:
            _show(sys.excepthook, error)
        finally:
            end(error)
        # Here and not in the hook: what runs there makes Python forget that it must end by the signal of an interrupt.
        sys.excepthook = _say_nothing
        raise
    end(None)


def _print_message(stop: SystemExit) -> None:
    """Prints what the interpreter would print when all is over, behind what the last word says."""
    if stop.code is not None and not isinstance(stop.code, int):
        print(stop.code, file=sys.stderr)
        stop.code = 1


def _show(hook: Callable[..., Any], error: BaseException) -> None:
    """Has the script's own hook show an exception; what goes wrong in it is shown as Python does."""
    traceback = error.__traceback__
    try:
        hook(type(error), error, traceback)
    except SystemExit:
        raise
    except BaseException as broken:
        broken.__context__ = None if broken.__context__ is error else broken.__context__
        _strip(broken)
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(broken), broken, broken.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(error), error, traceback)


def _say_nothing(*_: Any) -> None:
    pass


def _join_threads() -> None:
    """Waits for the threads for which the interpreter would wait next."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _strip(error: BaseException) -> None:
    """Takes our own frames out of the tracebacks of an exception and of those that it followed."""
    seen, left = set(), [error]
    while left:
        each = left.pop()
        seen.add(id(each))
        each.__traceback__ = _without_ours(each.__traceback__)
        left += [cause for cause in (each.__cause__, each.__context__) if cause is not None and id(cause) not in seen]


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    # Importlib's stand first where the script does not even compile.
    while traceback is not None and _file(traceback).startswith((*_OWN, "<frozen importlib")):
        traceback = traceback.tb_next
    here = traceback
    while here is not None:  # no recursion: the script may just have run out of stack
        following = here.tb_next
        while following is not None and _file(following).startswith(_OWN):
            following = following.tb_next
        here.tb_next = following
        here = following
    return traceback


def _file(traceback: TracebackType) -> str:
    return traceback.tb_frame.f_code.co_filename
