"""Sections of a report as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import RenderResult
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from tfmixed.report.loading import Run
from tfmixed.report.sections import Part, Table, sections

_MOST_ROWS = 15
_MOST_WRAPPED = 4  # columns up to which all of them may be wrapped


def render(runs: Sequence[Run]) -> RenderResult:
    """Yields the sections for rich to print."""
    for section in sections(runs):
        yield Rule(section.title, align="left")
        for run, part in zip(runs, section.parts, strict=False):  # facts have one part for all runs
            if len(section.parts) > 1:
                yield Text(run.name, style="bold")
            yield from _part(part)


def _part(part: Part) -> RenderResult:
    for sentence in part.sentences:
        yield Text(f"- {sentence}" if len(part.sentences) > 1 else sentence)
    if part.table is not None:
        yield _grid(part.table)
        if len(part.table.rows) > _MOST_ROWS:
            yield Text(f"and {len(part.table.rows) - _MOST_ROWS} more: --html shows all")


def _grid(table: Table) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(table.headings))
    for index, heading in enumerate(table.headings):
        side: Literal["left", "right"] = "left" if index < table.left else "right"
        wraps = index < table.left or len(table.headings) <= _MOST_WRAPPED  # names and values, but not numbers
        grid.add_column(Text(heading), justify=side, overflow="fold", no_wrap=not wraps)
    for row in table.rows[:_MOST_ROWS]:
        grid.add_row(*(Text(cell) for cell in row))
    return grid
