"""Report of one run, or of several side by side: as text, as an HTML page, as a picture. Imports no framework."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult

from tfmixed._utils import atomic_write
from tfmixed.report import terminal
from tfmixed.report.loading import Run, read
from tfmixed.report.sections import Section, figure_keys, sections

__all__ = ["Report", "Run", "read"]


@dataclass(frozen=True)
class Report:
    """The report of one or several runs. rich prints it as text.

    Args:
        runs: Results of `read`.

    Example:
    >>> from tfmixed.records import Progress, ScaleChange
    >>> log = (ScaleChange(2, 8.0, 4.0, "overflow", "d/kernel"), Progress(9, 0, 4.0, 1))
    >>> Report([Run("mine", log)]).sections()[0].parts[0].sentences[0]
    '10 steps, 1 skipped (10.0 %).'
    """

    runs: Sequence[Run]

    def sections(self) -> list[Section]:
        """Returns the sections, those with sentences first."""
        return sections(self.runs)

    def save_page(self, path: str | os.PathLike[str]) -> None:
        """Writes one HTML page without scripts or external resources. The write is atomic.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from tfmixed.report import html

        atomic_write.write_text(path, html.render(self.runs))

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Writes all figures as one PNG, runs side by side.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If the path does not end in `.png`.
        """
        from tfmixed import plotting
        from tfmixed.plotting.style import WIDE
        from tfmixed.report.figures import FIGURES

        rows = [
            [figure.draw(run, "light", WIDE, self.runs) for run in self.runs if key in figure_keys(run)]
            for key, figure in FIGURES.items()
        ]
        plotting.save_sheet([row for row in rows if row], path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return terminal.render(self.runs)
