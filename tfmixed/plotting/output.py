"""Figures as files and as SVG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tfmixed._utils import atomic_write
from tfmixed.plotting.style import STYLES


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format of the path's suffix. The write is atomic.

    Raises:
        ValueError: If matplotlib has no format with that suffix.
    """
    format_, picture = format_of(path), io.BytesIO()
    figure.savefig(picture, format=format_)
    atomic_write.write_bytes(path, picture.getvalue())


def save_sheet(rows: Sequence[Sequence[Figure]], path: str | os.PathLike[str]) -> None:
    """Writes several figures as one PNG: rows of figures side by side.

    Raises:
        ValueError: If the path does not end in `.png`.
    """
    if format_of(path) != "png":
        raise ValueError(f"path must end in .png. Received: {str(path)!r}")
    strips = [_joined([_pixels(figure) for figure in row], axis=1) for row in rows]
    picture = io.BytesIO()
    image.imsave(picture, _joined(strips, axis=0), format="png")
    atomic_write.write_bytes(path, picture.getvalue())


def svg(figure: Figure) -> str:
    """Returns a figure as SVG. It is reproducible, and text is drawn as shapes that do not depend on fonts."""
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tfmixed", "svg.fonttype": "path"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def inline_svg(figure: Figure, label: str) -> ElementTree.Element:
    """Returns a figure of the theme `"page"` as an SVG element for an HTML page.

    Its colors are `currentColor` and the CSS variables of `Style.variables`. The page sets its size.
    """
    text = svg(figure)
    for name, color in STYLES["page"].variables().items():
        text = text.replace(color, "currentColor" if name == "ink" else f"var(--{name})")
    root = ElementTree.fromstring(text)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]  # HTML has no namespaces
        node.attrib = {name.rpartition("}")[2]: value for name, value in node.items()}
        if node.tag == "g":
            node.attrib.pop("id", None)  # repeated in each figure; only definitions are referenced
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return root


def format_of(path: str | os.PathLike[str]) -> str:
    """Returns the format in which `save` would write to `path`.

    Raises:
        ValueError: If matplotlib has no format with that suffix.
    """
    format_, known = Path(path).suffix[1:].lower(), Figure().canvas.get_supported_filetypes()
    if format_ not in known:
        raise ValueError(f"path must end in one of {', '.join(f'.{name}' for name in known)}. Received: {str(path)!r}")
    return format_


def _pixels(figure: Figure) -> Any:
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())


def _joined(pictures: Sequence[Any], axis: int) -> Any:
    """Joins pictures along an axis. Along the other one, smaller ones are padded with the color of their corner."""
    size = max(picture.shape[1 - axis] for picture in pictures)
    padded = []
    for picture in pictures:
        shape = list(picture.shape)
        shape[1 - axis] = size
        larger = numpy.full(shape, picture[0, 0], picture.dtype)
        larger[: picture.shape[0], : picture.shape[1]] = picture
        padded.append(larger)
    return numpy.concatenate(padded, axis=axis)
