"""The report of one run, or of two side by side: in the terminal, as a page, as a picture. Loads no framework."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from tfmixed._utils import atomic_write
from tfmixed.report.loading import Run, read
from tfmixed.report.sections import Part, Section, Table, picture_keys, sections

__all__ = ["Report", "Run", "read"]

_ROWS = 15  # of a table, in the terminal
_FACTS = 4  # columns of a table of facts, at most


@dataclass(frozen=True)
class Report:
    """What the logs of one or several runs say. Prints as text.

    Args:
        runs: What `read` returns.

    Example:
    >>> from tfmixed.records import Progress, ScaleChange
    >>> log = (ScaleChange(2, 8.0, 4.0, "overflow", "d/kernel"), Progress(9, 0, 4.0, 1))
    >>> Report([Run("mine", log)]).sections()[0].parts[0].sentences[0]
    '10 steps, 1 skipped (10.0 %).'
    """

    runs: Sequence[Run]

    def sections(self) -> list[Section]:
        """Returns its sections, words first."""
        return sections(self.runs)

    def save_page(self, path: str | os.PathLike[str]) -> None:
        """Writes it as one HTML page that needs no network and no script; it appears whole or not at all.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from tfmixed.report import html

        atomic_write.write_text(path, html.render(self.runs))

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Writes its pictures as one PNG, runs side by side.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: The path does not end in `.png`.
        """
        from tfmixed import plotting
        from tfmixed.plotting.style import WIDE
        from tfmixed.report.figures import PICTURES

        keys = [picture_keys(run) for run in self.runs]
        rows = [
            [each.draw(run, "light", WIDE, self.runs) for run, own in zip(self.runs, keys, strict=True) if key in own]
            for key, each in PICTURES.items()
        ]
        plotting.save_sheet([row for row in rows if row], path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for section in sections(self.runs):
            yield Rule(section.title, align="left")
            for run, part in zip(self.runs, section.parts, strict=False):  # the last ones have one part
                if len(section.parts) > 1:
                    yield Text(run.name, style="bold")
                yield from _lines(part)


def _lines(part: Part) -> RenderResult:
    for sentence in part.sentences:
        yield Text(f"- {sentence}" if len(part.sentences) > 1 else sentence)
    if part.table is not None:
        yield _grid(part.table)
        if len(part.table.rows) > _ROWS:
            yield Text(f"and {len(part.table.rows) - _ROWS} more: --html shows all")


def _grid(table: Table) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(table.headings))
    for index, heading in enumerate(table.headings):
        side: Literal["left", "right"] = "left" if index < table.left else "right"
        folds = index == 0 or len(table.headings) <= _FACTS  # names of layers and values, but no numbers
        grid.add_column(Text(heading), justify=side, overflow="fold", no_wrap=not folds)
    for row in table.rows[:_ROWS]:
        grid.add_row(*(Text(cell) for cell in row))
    return grid
