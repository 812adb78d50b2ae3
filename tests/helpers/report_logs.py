"""Logs for the tests of reports, and the stored reports of them in tests/data/.

python tests/helpers/report_logs.py   # overwrites tests/data/report.txt and report.html: review the difference
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from unittest import mock
from xml.etree.ElementTree import Element

from rich.console import Console

from tfmixed.records import EventsLost, GradientRange, Progress, RangesRecord, RunRecord, ScaleChange
from tfmixed.report import Report, Run, html

DATA = Path(__file__).parents[1] / "data"
DYNAMIC = {"rule": "DynamicScale", "initial_scale": 2.0**15, "growth_interval": 2000, "min_scale": 1.0}
CONSTANT = {"rule": "ConstantScale", "value": 8.0}
EVIL = "<script>alert(1)</script>&`[bold]x[/bold]"


def begin(rule=DYNAMIC, scale=2.0**15, model="net", step=0):
    versions = {"Python": "3.11", "tfmixed": "0.1.0"}
    return RunRecord(step, scale, "2026-01-01T00:00:00+00:00", model, "mixed_float16", rule, "Adam", ["GPU"], versions)


def gradient(name, exponent, count=100, kind="weight", dtype="float16"):
    size = 2.0**exponent
    return GradientRange(name, kind, name, dtype, 5, 0, size, size, {exponent: (count, 0, 0, 0)})


def updated(name, lost, kept, rounded_to="bfloat16"):
    """A weight with two updates of these sizes, of which rounding discards the first."""
    octaves = {precision: {-2: (1, lost), -1: (1, kept)} for precision in ("float16", "bfloat16")}
    return dataclasses.replace(gradient(name, -20), updates=octaves, rounded_to=rounded_to)


def snapshot(*gradients, step=400):
    return RangesRecord(step, 0, "float32", 1.0, 2, "net", list(gradients))


def overflow(step, scale=2.0**15, name="conv1/kernel"):
    return ScaleChange(step, scale, scale / 2, "overflow", name, 0)


def descent(count=6, names="aaaaaaaaa"):
    return [overflow(step, 2.0 ** (15 - step), name) for step, name in zip(range(count), names, strict=False)]


def end(step=99, scale=2.0**15, skipped=0, loss=None):
    return Progress(step, 0, scale, skipped, 1.0, loss)


CALM = (
    begin(),
    overflow(0),
    overflow(1, 2.0**14),
    overflow(9, 2.0**13, "dense/bias"),
    snapshot(gradient("conv1/kernel", -20), gradient("dense/bias", -37, 3)),
    Progress(411, 0, 2.0**12, 3, 1.0, 0.5),
)
HALF = dataclasses.replace(snapshot(gradient("a", 3), step=500), precision="float16")
NONFINITE = dataclasses.replace(gradient("a", 10), nonfinite=3)

# Logs by the one thing that the report says of each. Nothing is to be changed in those that begin with "fine".
LOGS = {
    "no steps": (begin(),),
    "overflows of five variables": (begin(), *descent(8, "aabbccde")),
    "overflows of three variables": (begin(), *descent(3, "abc")),
    "continued": (begin(step=1000), end(1099)),
    "skips after the last progress": (*CALM, overflow(450, 2.0**12)),
    "skips that left the scale": (begin(), overflow(3), EventsLost(2, 20), overflow(20, 2.0**13), end(99, 2.0**12, 9)),
    "loss": (begin(), end(0, loss=2.5), end(99, loss=0.5)),
    "loss not finite": (begin(), end(0, loss=2.5), end(99, loss=0.5), end(198)),
    "descent": (begin(), *descent(), end(999, 2.0**9, 6)),
    "descent of five": (begin(), *descent(5), end(999, 2.0**9, 5)),
    "fine: descent of four": (begin(), *descent(4), end(999, 2.0**9, 4)),
    "descent, ranges agree": (begin(), *descent(), snapshot(gradient("a", -20)), end(999, 2.0**9, 6)),
    "descent, ranges need less": (begin(), *descent(), snapshot(gradient("a", 10)), end(999, 2.0**9, 6)),
    "descent, ranges need more": (begin(), *descent(), snapshot(gradient("a", -60)), end(999, 2.0**9, 6)),
    "mostly skipped": (begin(), end(99, 1.0), end(199, 1.0, 90)),
    "at the minimum": (begin(scale=2.0), overflow(5, 2.0, "a"), end(99, 1.0, 1)),
    "never settled": (begin(), *(overflow(i, 8.0) for i in range(50, 100, 9)), end(99, 4.0, 6)),
    "constant scale": (begin(CONSTANT, 8.0), end(99, 8.0, 4)),
    "changes lost": (begin(), EventsLost(7, 20), overflow(20), end(99, 2.0**14, 8)),
    "too high": (begin(), snapshot(gradient("a", 10)), end()),
    "too high, slightly": (begin(scale=2.0**6), snapshot(gradient("a", 10)), end(scale=2.0**6)),
    "too low": (begin(), snapshot(gradient("a", -60)), end()),
    "too low, slightly": (begin(scale=2.0**35), snapshot(gradient("a", -60)), end(scale=2.0**35)),
    "too low, but overflows": (*CALM[:5], end(411, 2.0**12, 3)),
    "no single scale": (begin(), snapshot(gradient("a", 12), gradient("b", -60)), end(9)),
    "gradients not finite": (begin(), snapshot(NONFINITE), end()),
    "bfloat16": (begin(), snapshot(gradient("a", -60, dtype="bfloat16")), end(scale=1.0)),
    "scale at the snapshot": (begin(), overflow(450), snapshot(gradient("a", -37)), HALF, end(599, 2.0**14, 1)),
    "updates lost": (begin(), snapshot(updated("a", 3.0, 1.0), updated("b", 1.0, 1.0)), end(999)),
    "updates lost in float16": (begin(), snapshot(updated("a", 3.0, 1.0, "float16")), end(999)),
    "fine: few updates lost": (begin(), snapshot(updated("a", 1.0, 15.0)), end(999)),
    "fine: float32 weights": (begin(), snapshot(updated("a", 3.0, 1.0, "")), end(999)),
    "fine": (begin(), snapshot(gradient("a", -20)), end(999)),
    "fine: highest scale": (begin(scale=2.0**5), snapshot(gradient("a", 10)), end(scale=2.0**5)),
    "fine: lowest scale": (begin(scale=2.0**36), snapshot(gradient("a", -60)), end(scale=2.0**36)),
    "fine: at the minimum from the start": (begin(scale=1.0), end(scale=1.0)),
    "fine: constant": (begin(CONSTANT, 8.0), end(scale=8.0)),
    "fine: few overflows": (begin(), *(overflow(i, 8.0) for i in range(500, 1000, 99)), end(999, 4.0, 6)),
    "fine: early overflows": (begin(), *(overflow(i, 8.0) for i in range(9, 15)), end(99, 4.0, 6)),
    "fine: short last epoch": (begin(), end(99, 8.0), overflow(100, 8.0), overflow(101, 4.0), end(101, 2.0, 2)),
}
ISLAND = snapshot(
    updated("updated", 3.0, 1.0), gradient("fine", -10), gradient("lost", -60), gradient("head", -60, dtype="float32")
)
WHOLE = [
    Run("calm", CALM),
    Run("constant", (begin(CONSTANT, 8.0, EVIL), overflow(3, 8.0, EVIL), ISLAND, end(99, 8.0, 4))),
]


def printed(report, width=120):
    out = io.StringIO()
    Console(file=out, width=width).print(report)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def text():
    """Returns the whole report of one and of two runs, and the sentences about all logs."""
    parts = [printed(Report(WHOLE[:1])), printed(Report(WHOLE))]
    for name, log in LOGS.items():
        happened, change = Report([Run(name, log)]).sections()[:2]
        lines = [f"[{name}]", *happened.parts[0].sentences, "To change:", *change.parts[0].sentences]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def page():
    """Returns the page of two runs, with empty figures: their content depends on matplotlib's version."""
    with mock.patch.object(html, "inline_svg", lambda _, label: Element("svg", {"aria-label": label})):
        return html.render(WHOLE).replace("><", ">\n<") + "\n"


if __name__ == "__main__":
    (DATA / "report.txt").write_text(text(), encoding="utf-8")
    (DATA / "report.html").write_text(page(), encoding="utf-8")
