"""Plain text of rich tables."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType

WIDTH = 100


def console() -> Console:
    """Returns a console as wide as the terminal, and of 100 columns in a file or a pipe."""
    # Not as rich does: with `FORCE_COLOR` a pipe is its terminal, and readline exports `COLUMNS` to child processes.
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def text(renderable: RenderableType, width: int = WIDTH) -> str:
    """Returns the text that rich prints of a renderable in a number of columns."""
    output = Console(width=width)
    with output.capture() as capture:
        output.print(renderable)
    return capture.get().rstrip()
