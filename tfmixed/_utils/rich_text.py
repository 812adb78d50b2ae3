"""Plain text of rich tables."""

from __future__ import annotations

from rich.console import Console, RenderableType


def text(renderable: RenderableType, width: int = 100) -> str:
    """Returns the text that rich prints of a renderable in a number of columns."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()
