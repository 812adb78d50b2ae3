"""Colors, frames and axes that all figures share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

Theme = Literal["light", "dark", "page"]

WIDE, NARROW = 8.0, 4.2  # inches: a page, and a phone or a column, with letters of the same size
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Style:
    """The colors of one theme. Those of lines are Okabe and Ito's, which color-blind readers can distinguish.

    Args:
        paper: The background.
        ink: Text and the most important marks.
        faint: Axes, grids and the least important marks.
        colors: Lines and marks, in the order of use.
        zones: Backgrounds of the zones of float16.
        shades: Color map from few to many values. Few is close to `paper`.
    """

    paper: str
    ink: str
    faint: str
    colors: tuple[str, ...]
    zones: dict[str, str]
    shades: str | Colormap

    def lines(self, count: int) -> list[str]:
        """Returns that many colors. They repeat from the sixth on."""
        return list(islice(cycle(self.colors), count))

    def variables(self) -> dict[str, str]:
        """Returns all colors by the names that they have as CSS variables."""
        lines = {f"line-{index}": color for index, color in enumerate(self.colors)}
        zones = {f"zone-{name}": color for name, color in self.zones.items() if color != self.paper}
        return {"ink": self.ink, "paper": self.paper, "faint": self.faint, **lines, **zones}


_LIGHT = Style(
    paper="#ffffff",
    ink="#1a1a1a",
    faint="#767676",
    colors=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"),
    zones={"zero": "#f2c2a0", "subnormal": "#faeac8", "normal": "#ffffff", "overflow": "#e3c4d8"},
    shades="cividis_r",
)
_DARK = Style(
    paper="#16181c",
    ink="#ececec",
    faint="#9a9a9a",
    colors=("#56b4e9", "#e69f00", "#2bc49a", "#e39cc4", "#f0e442"),
    zones={"zero": "#66330f", "subnormal": "#453813", "normal": "#16181c", "overflow": "#56304a"},
    shades="cividis",
)
# Pixels cannot have CSS variables: a blue that contrasts with both papers, more opaque for more values.
_TRANSLUCENT = LinearSegmentedColormap.from_list("translucent", [(0.18, 0.56, 0.82, 0.06), (0.18, 0.56, 0.82, 1.0)])
STYLES: dict[Theme, Style] = {"light": _LIGHT, "dark": _DARK, "page": replace(_LIGHT, shades=_TRANSLUCENT)}


@contextmanager
def sheet(theme: Theme, width: float, height: float) -> Iterator[tuple[Figure, Style]]:
    """Yields an empty figure and its style. Artists that are added within the block have the colors of the theme.

    Raises:
        ValueError: If the theme does not exist.
    """
    if theme not in STYLES:
        raise ValueError(f"theme must be one of {', '.join(STYLES)}. Received: theme={theme!r}")
    style = STYLES[theme]
    with matplotlib.rc_context(_settings(style)):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        yield figure, style
        for axes in figure.axes:
            # matplotlib creates ticks when it draws the figure, when these settings no longer hold.
            axes.tick_params(which="both", labelcolor=style.ink, color=style.faint)


def _settings(style: Style) -> dict[Any, Any]:
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    faint = ("axes.edgecolor", "grid.color", "legend.edgecolor")
    sizes = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}
    colors = {style.ink: inks, style.paper: papers, style.faint: faint}
    # A `$` in a name does not begin a formula.
    return sizes | {"text.parse_math": False} | {name: color for color, names in colors.items() for name in names}


def legend(axes: Axes, width: float) -> None:
    """Adds one legend entry per label below the axes, in as many columns as fit into the width in inches."""
    handles, labels = axes.get_legend_handles_labels()
    unique, figure = dict(zip(labels, handles, strict=True)), axes.figure
    if unique:
        figure.legend(
            [*unique.values()], [*unique], loc="outside lower center", ncols=max(int(width / 2.5), 1), frameon=False
        )


def count_steps(axes: Axes, narrow: bool) -> None:
    """Labels the x axis as attempted steps, with a few integer ticks."""
    axes.set_xlabel("attempted step")
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def powers_of_two(axes: Axes) -> None:
    """Makes the y axis logarithmic, with labels such as 2¹⁵. They are characters, since formulas are off."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"2{str(round(math.log2(value))).translate(_SUPERSCRIPTS)}")


def is_narrow(width: float) -> bool:
    """Returns True if a figure of this width in inches is laid out for a phone or a column."""
    return width < 6


def shorten(name: str, length: int) -> str:
    """Returns a name of at most this length. The middle is cut, since both ends distinguish layers."""
    front = (length - 1) // 2
    return name if len(name) <= length else f"{name[:front]}…{name[front + 1 - length :]}"
