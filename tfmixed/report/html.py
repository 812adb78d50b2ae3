"""A report as one HTML page: no network, no script, light and dark, wide and narrow. Needs matplotlib."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from importlib.resources import files
from xml.etree.ElementTree import Element, tostring

from tfmixed import plotting
from tfmixed.plotting.style import NARROW, WIDE
from tfmixed.report.figures import PICTURES
from tfmixed.report.loading import Run
from tfmixed.report.sections import Part, Table, sections

_BESIDE = 6.2  # inches: half a page, on which letters are as large as on a whole one
# Of anything that is not in the page itself, the browser loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(runs: Sequence[Run]) -> str:
    """Returns the page; ElementTree escapes whatever a log holds."""
    title = f"tfmixed: {', '.join(run.name for run in runs)}"
    style = files("tfmixed.report").joinpath("page.css").read_text(encoding="utf-8")
    head = _node(
        "head",
        _node("meta", charset="utf-8"),
        _node("meta", **{"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        _node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _node("meta", name="color-scheme", content="light dark"),
        _node("link", rel="icon", href="data:,"),
        _node("title", title),
        _node("style", style),
    )
    body = _node("body", _node("h1", "Mixed precision: ", " and ".join(run.name for run in runs)), *_sections(runs))
    return "<!doctype html>\n" + tostring(_node("html", head, body, lang="en"), encoding="unicode", method="html")


def _sections(runs: Sequence[Run]) -> Iterator[Element]:
    width = WIDE if len(runs) == 1 else _BESIDE
    for section in sections(runs):
        of = runs if len(section.parts) > 1 else runs[:1]  # facts have one part for all runs
        parts = [_part(part, run, width, of) for run, part in zip(of, section.parts, strict=True)]
        yield _node("section", _node("h2", section.title), _node("div", *parts, **{"class": "parts"}))


def _part(part: Part, run: Run, width: float, runs: Sequence[Run]) -> Element:
    sentences = [_node("li", *_words(sentence)) for sentence in part.sentences]
    return _node(
        "div",
        *([_node("h3", run.name)] if len(runs) > 1 else []),
        *([_node("ul", *sentences)] if sentences else []),
        *(_figure(run, key, width, runs) for key in part.pictures),
        *([_table(part.table)] if part.table else []),
    )


def _words(sentence: str) -> Iterator[Element | str]:
    for index, words in enumerate(sentence.split("`")):
        yield _node("code", words) if index % 2 else words


def _table(table: Table) -> Element:
    looks: list[dict[str, str]] = [{} if index < table.left else _NUMBER for index in range(len(table.headings))]
    head = [_node("th", heading, scope="col", **look) for heading, look in zip(table.headings, looks, strict=True)]
    rows = [
        _node("tr", *(_node("td", cell, **look) for cell, look in zip(row, looks, strict=True))) for row in table.rows
    ]
    whole = _node("table", _node("thead", _node("tr", *head)), _node("tbody", *rows))
    # A table that is larger than its frame scrolls in it, by the keyboard too.
    return _node(
        "div", whole, tabindex="0", role="region", **{"class": "scroll", "aria-label": table.headings[0] or "facts"}
    )


def _figure(run: Run, key: str, width: float, runs: Sequence[Run]) -> Element:
    picture, dark, narrow = PICTURES[key], "(prefers-color-scheme: dark)", "(max-width: 600px)"

    def source(theme: plotting.Theme, inches: float) -> str:
        drawn = plotting.svg(picture.draw(run, theme, inches, runs))
        return "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()

    return _node(
        "figure",
        _node(
            "picture",
            _node("source", media=f"{narrow} and {dark}", srcset=source("dark", NARROW)),
            _node("source", media=narrow, srcset=source("light", NARROW)),
            _node("source", media=dark, srcset=source("dark", width)),
            _node("img", src=source("light", width), alt=f"{picture.caption} {run.name}"),
        ),
        _node("figcaption", picture.caption),
    )


_NUMBER = {"class": "number"}


def _node(tag: str, *inside: Element | str, **attributes: str) -> Element:
    """Returns an element that holds others, and text between them."""
    node = Element(tag, attributes)
    for each in inside:
        if isinstance(each, Element):
            node.append(each)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + each
        else:
            node.text = (node.text or "") + each
    return node
