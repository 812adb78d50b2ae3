"""Figures as files: written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tfmixed._utils import atomic_write


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the picture in the format of the path's suffix; it appears whole or not at all.

    Raises:
        ValueError: matplotlib knows no format of that suffix.
    """
    format_, picture = format_of(path), io.BytesIO()
    figure.savefig(picture, format=format_)
    atomic_write.write_bytes(path, picture.getvalue())


def save_sheet(rows: Sequence[Sequence[Figure]], path: str | os.PathLike[str]) -> None:
    """Writes several pictures as one PNG: rows of figures, side by side.

    Raises:
        ValueError: The path does not end in `.png`.
    """
    if format_of(path) != "png":
        raise ValueError(f"path must end in .png, received {str(path)!r}")
    sheets = [_beside([_pixels(figure) for figure in row]) for row in rows]
    width, picture = max(sheet.shape[1] for sheet in sheets), io.BytesIO()
    image.imsave(picture, numpy.concatenate([_padded(sheet, width, 1) for sheet in sheets]), format="png")
    atomic_write.write_bytes(path, picture.getvalue())


def svg(figure: Figure) -> str:
    """Returns the picture as SVG, the same each time; letters are shapes, so that it looks the same everywhere."""
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tfmixed", "svg.fonttype": "path"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def format_of(path: str | os.PathLike[str]) -> str:
    """Returns the format in which `save` would write to `path`.

    Raises:
        ValueError: matplotlib knows no format of that suffix.
    """
    format_, known = Path(path).suffix[1:].lower(), Figure().canvas.get_supported_filetypes()
    if format_ not in known:
        raise ValueError(f"path must end in one of {', '.join(f'.{name}' for name in known)}, received {str(path)!r}")
    return format_


def _pixels(figure: Figure) -> Any:
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())


def _beside(pictures: list[Any]) -> Any:
    height = max(picture.shape[0] for picture in pictures)
    return numpy.concatenate([_padded(picture, height, 0) for picture in pictures], axis=1)


def _padded(picture: Any, size: int, axis: int) -> Any:
    """Returns the picture, made larger in the colour of its own corner."""
    missing = [size - picture.shape[0], 0] if axis == 0 else [0, size - picture.shape[1]]
    shape = (picture.shape[0] + missing[0], picture.shape[1] + missing[1], picture.shape[2])
    larger = numpy.empty(shape, picture.dtype)
    larger[...] = picture[0, 0]
    larger[: picture.shape[0], : picture.shape[1]] = picture
    return larger
