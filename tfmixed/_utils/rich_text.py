"""What prints as a table, as text."""

from __future__ import annotations

from rich.console import Console, RenderableType


def text(renderable: RenderableType, width: int = 100) -> str:
    """Returns what rich prints of something in so many columns: what `print` shows of our tables."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip()
