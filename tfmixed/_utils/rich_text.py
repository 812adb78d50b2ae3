"""Plain text of rich tables."""

from __future__ import annotations

import os
import sys

from rich.console import Console, RenderableType

WIDTH = 100


def console() -> Console:
    """Returns a console as wide as the terminal. In a file or a pipe, it has 100 columns, or those of `COLUMNS`."""
    # Not by rich, for which `FORCE_COLOR` makes a pipe a terminal.
    is_wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if is_wide else Console(width=WIDTH)


def text(renderable: RenderableType, width: int = WIDTH) -> str:
    """Returns the text that rich prints of a renderable in a number of columns."""
    output = Console(width=width)
    with output.capture() as capture:
        output.print(renderable)
    return capture.get().rstrip()
