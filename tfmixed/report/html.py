"""A report as one HTML page without scripts or external resources, in light or dark colors. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from xml.etree.ElementTree import Element, tostring

from tfmixed.plotting.output import inline_svg
from tfmixed.plotting.style import NARROW, STYLES, Style
from tfmixed.report.figures import FIGURES
from tfmixed.report.loading import Run
from tfmixed.report.sections import Part, Table, sections

# The browser loads nothing that is not part of the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(runs: Sequence[Run]) -> str:
    """Returns the page. All text from a log is escaped."""
    names = [run.name for run in runs]
    head = _node(
        "head",
        _node("meta", charset="utf-8"),
        _node("meta", **{"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        _node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _node("meta", name="color-scheme", content="light dark"),
        _node("link", rel="icon", href="data:,"),
        _node("title", f"tfmixed: {', '.join(names)}"),
        _node("style", _css()),
    )
    body = _node("body", _node("h1", "Mixed precision: ", " and ".join(names)), *_sections(runs))
    return "<!doctype html>\n" + tostring(_node("html", head, body, lang="en"), encoding="unicode", method="html")


def _css() -> str:
    page = files("tfmixed.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = _variables(STYLES["light"]), _variables(STYLES["dark"])
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{page}"


def _variables(style: Style) -> str:
    return " ".join(f"--{name}: {color};" for name, color in style.variables().items())


def _sections(runs: Sequence[Run]) -> Iterator[Element]:
    for section in sections(runs):
        of = runs if len(section.parts) > 1 else runs[:1]  # facts have one part for all runs
        parts = [_part(part, run, runs, len(of) > 1) for run, part in zip(of, section.parts, strict=True)]
        yield _node("section", _node("h2", section.title), _node("div", *parts, **{"class": "parts"}))


def _part(part: Part, run: Run, runs: Sequence[Run], is_named: bool) -> Element:
    sentences = [_node("li", *_words(sentence)) for sentence in part.sentences]
    figures = [_figure(run, key, runs) for key in part.figures]
    return _node(
        "div",
        *([_node("h3", run.name)] if is_named else []),
        *([_node("ul", *sentences)] if sentences else []),
        *([_node("div", *figures, **{"class": "figures"})] if figures else []),
        *([_table(part.table)] if part.table else []),
    )


def _words(sentence: str) -> Iterator[Element | str]:
    for index, words in enumerate(sentence.split("`")):
        yield _node("code", words) if index % 2 else words


def _figure(run: Run, key: str, runs: Sequence[Run]) -> Element:
    figure = FIGURES[key]
    drawn = inline_svg(figure.draw(run, "page", NARROW, runs), f"{figure.caption} {run.name}")
    return _node("figure", drawn, _node("figcaption", figure.caption))


def _table(table: Table) -> Element:
    looks: list[dict[str, str]] = [{} if i < table.left else {"class": "number"} for i in range(len(table.headings))]
    head = [_node("th", heading, scope="col", **look) for heading, look in zip(table.headings, looks, strict=True)]
    rows = [
        _node("tr", *(_node("td", cell, **look) for cell, look in zip(row, looks, strict=True))) for row in table.rows
    ]
    whole = _node("table", _node("thead", _node("tr", *head)), _node("tbody", *rows))
    # A table that is larger than its frame scrolls in it, also by keyboard.
    attributes = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": table.headings[0] or "facts"}
    return _node("div", whole, **attributes)


def _node(tag: str, *children: Element | str, **attributes: str) -> Element:
    """Returns an element with children and text between them. ElementTree escapes text and attributes."""
    node = Element(tag, attributes)
    for child in children:
        if isinstance(child, Element):
            node.append(child)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + child
        else:
            node.text = (node.text or "") + child
    return node
