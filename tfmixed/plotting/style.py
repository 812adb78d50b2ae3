"""Colours and frames that all pictures share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

Theme = Literal["light", "dark"]

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDE, NARROW = 8.0, 4.2  # inches: a page, and a phone, on which the same letters stay legible


@dataclass(frozen=True)
class Style:
    """The colours of one theme. Those of lines are Okabe and Ito's, safe for colour-blind readers.

    Args:
        paper: Behind everything.
        ink: Letters, and what matters most.
        faint: Lines of help, and what matters least.
        colors: For lines and marks, in the order of use.
        zones: Behind what float16 makes 0, subnormal, normal and infinite.
        shades: matplotlib's name of a map from few to many, whose few comes near `paper`.
    """

    paper: str
    ink: str
    faint: str
    colors: tuple[str, ...]
    zones: dict[str, str]
    shades: str

    def lines(self, count: int) -> list[str]:
        """Returns that many colours; they repeat from the sixth on."""
        return list(islice(cycle(self.colors), count))


STYLES: dict[Theme, Style] = {
    "light": Style(
        paper="#ffffff",
        ink="#1a1a1a",
        faint="#767676",
        colors=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"),
        zones={"zero": "#F2C2A0", "subnormal": "#FAEAC8", "normal": "#FFFFFF", "overflow": "#E3C4D8"},
        shades="cividis_r",
    ),
    "dark": Style(
        paper="#16181c",
        ink="#ececec",
        faint="#9a9a9a",
        colors=("#56B4E9", "#E69F00", "#2BC49A", "#E39CC4", "#F0E442"),
        zones={"zero": "#66330f", "subnormal": "#453813", "normal": "#16181c", "overflow": "#56304a"},
        shades="cividis",
    ),
}


@contextmanager
def sheet(theme: Theme, width: float, height: float) -> Iterator[tuple[Figure, Style]]:
    """Yields an empty figure, with what is drawn into it meanwhile in the colours of the theme.

    Raises:
        ValueError: There is no such theme.
    """
    if theme not in STYLES:
        raise ValueError(f'theme must be "light" or "dark", received {theme!r}')
    style = STYLES[theme]
    with matplotlib.rc_context(_settings(style)):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        yield figure, style
        for axes in figure.axes:
            # Ticks are made when the figure is drawn, when the colours above are no longer set.
            axes.tick_params(which="both", labelcolor=style.ink, color=style.faint)


def _settings(style: Style) -> dict[Any, Any]:
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    faint = ("axes.edgecolor", "grid.color", "legend.edgecolor")
    sizes = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}
    colors = {style.ink: inks, style.paper: papers, style.faint: faint}
    # A `$` in a name begins no formula.
    return sizes | {"text.parse_math": False} | {name: color for color, names in colors.items() for name in names}


def legend(axes: Axes, width: float) -> None:
    """Puts the legend below the axes, where it covers nothing, in as many columns as fit into a width in inches."""
    handles, labels = axes.get_legend_handles_labels()
    # What has one label stands there once.
    unique, figure = dict(zip(labels, handles, strict=True)), axes.figure
    if unique:
        figure.legend(
            [*unique.values()], [*unique], loc="outside lower center", ncols=max(int(width / 2.5), 1), frameon=False
        )


def count_steps(axes: Axes, narrow: bool) -> None:
    """Makes the x axis one of attempted steps: whole numbers, few enough to be read."""
    axes.set_xlabel("attempted step")
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def powers_of_two(axes: Axes) -> None:
    """Makes the y axis logarithmic, with labels such as 2¹⁵: letters, since formulas are off."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"2{str(round(math.log2(value))).translate(_RAISED)}")


def is_narrow(width: float) -> bool:
    """Whether a figure of that width, in inches, is for a phone."""
    return width < 6


def shorten(name: str, length: int) -> str:
    """Returns a name that is no longer than that, cut in its middle: its two ends tell layers apart."""
    front = (length - 1) // 2
    return name if len(name) <= length else f"{name[:front]}…{name[front + 1 - length :]}"
