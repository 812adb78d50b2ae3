"""Plain text of rich tables."""

from __future__ import annotations

import os

from rich.console import Console, RenderableType

WIDTH = 100


def console() -> Console:
    """Returns a console as wide as the terminal. In a file or a pipe, it has 100 columns, or those of `COLUMNS`."""
    output = Console()
    return output if output.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def text(renderable: RenderableType, width: int = WIDTH) -> str:
    """Returns the text that rich prints of a renderable in a number of columns."""
    output = Console(width=width)
    with output.capture() as capture:
        output.print(renderable)
    return capture.get().rstrip()
