"""Results of an audit: findings, their order, and the table that they print as."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tfmixed._utils import rich_text
from tfmixed.auditing.hazards import SEVERITIES, Found, Severity
from tfmixed.auditing.trace import Node
from tfmixed.formats import HALF

_COLORS = {"severe": "bold red", "warning": "yellow", "note": "dim"}
_MEANINGS = {
    "severe": "goes wrong on ordinary values",
    "warning": "goes wrong on large or small values",
    "note": "less precise, or slower",
}
_NOT_REPAIRED = ("variables", "optimizer", "cast")  # by `force_float32`
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


@dataclass(frozen=True)
class Finding:
    """One part of a model that is unsafe in half precision.

    Args:
        layer: Path of the layer whose own code contains it; `"loss"` outside of all layers; the optimizer's name.
        op: The kind of operation: `"sum"`, `"softmax"`, `"constant"`, ...
        dtype: The dtype that it runs in.
        risk: The error that can occur, and the values for which it occurs.
        advice: A way to avoid it.
        severity: `"severe"` if it goes wrong on ordinary values, `"warning"` on large or small values, `"note"` if it
            is less precise or slower.
        length: Number of terms of a reduction, as far as it is known. Defaults to None.
        source: File and line of the user's own code. Defaults to None for code of libraries.
        count: Number of occurrences in that layer. Defaults to 1.
    """

    layer: str
    op: str
    dtype: str
    risk: str
    advice: str
    severity: Severity
    length: int | None = None
    source: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Audit:
    """The findings of `audit`, in the order of severity. Prints as a table.

    Args:
        model: The model's name.
        dtypes: Number of layers for each compute dtype.
        findings: The findings.
        ran: Whether a batch was run in half precision and in float32. Defaults to False.
        loss: Whether the loss was read. It is not if there is none, or if it needs targets that were not given.
            Defaults to True.

    Example:
    >>> import tfmixed
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, dtype="mixed_float16")])
    >>> [(finding.severity, finding.op) for finding in tfmixed.audit(model)]
    [('warning', 'output')]
    """

    model: str
    dtypes: dict[str, int]
    findings: tuple[Finding, ...]
    ran: bool = False
    loss: bool = True

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def of(self, severity: Severity) -> list[Finding]:
        """Returns the findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def fails(self, on: Severity | Literal["never"] = "severe") -> bool:
        """Returns whether there are findings of the severity `on`, or of a higher one."""
        return on != "never" and any(self.of(severity) for severity in SEVERITIES[: SEVERITIES.index(on) + 1])

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Returns `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        return rich_text.text(self, min(120, shutil.get_terminal_size((120, 24)).columns))

    def __rich__(self) -> RenderableType:
        layers = ", ".join(f"{count} in {dtype}" for dtype, count in self.dtypes.items())
        title = Text(f"{self.model}: {sum(self.dtypes.values())} layers, {layers}")
        if not any(dtype in HALF for dtype in self.dtypes):
            advice = "Nothing computes in half precision. Create the model under a mixed policy to audit it."
            return Group(title, Text(advice))
        return Group(title, *self._parts())

    def _parts(self) -> Iterator[RenderableType]:
        for severity in SEVERITIES:
            if found := self.of(severity):
                yield Text(f"\n{severity}: {_MEANINGS[severity]}", style=_COLORS[severity])
                yield _table(found)
        severe, warnings, notes = (len(self.of(severity)) for severity in SEVERITIES)
        counts = f"{severe} severe, {warnings} warning{'s'[: warnings != 1]}, {notes} note{'s'[: notes != 1]}"
        yield Text(f"\n{counts}" if self.findings else "\nNothing found that is unsafe in half precision.")
        if not self.loss:
            yield Text("The loss was not read. Pass inputs and targets; a custom train_step cannot be read.")
        if any(finding.op not in _NOT_REPAIRED for finding in self.of("severe")):
            yield Text("tfmixed.force_float32(model) makes the sensitive parts compute in float32.")


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("layer", "what", "risk", "advice"):
        table.add_column(name, overflow="fold")
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.op, finding.dtype, finding.risk, finding.advice), []).append(finding)
    for (op, dtype, risk, advice), (first, *rest) in groups.items():
        source, more = f" ({first.source})" if first.source else "", f" and {len(rest)} more" if rest else ""
        table.add_row(*map(Text, (f"{first.layer}{source}{more}", f"{op}, {dtype}", risk, advice)))
    return table


def findings_of(found: Sequence[Found], paths: dict[Any, str]) -> tuple[Finding, ...]:
    """Merges hazards that occur repeatedly in a layer into one finding, and sorts the findings by severity.

    Args:
        found: The hazards, with their layers and operations.
        paths: The paths of the layers.
    """
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for node, layer, hazard in found:
        groups.setdefault((layer, hazard.op, hazard.dtype, hazard.advice), []).append((node, layer, hazard))
    findings = []
    for group in groups.values():
        node, layer, hazard = min(group, key=_rank)
        path = "loss" if layer is None else paths.get(layer, layer.name)
        findings.append(Finding(path, source=_source(node, layer), count=len(group), **dataclasses.asdict(hazard)))
    # A softmax that is reported explains the half-precision output of its layer.
    softmaxes = {finding.layer for finding in findings if finding.op == "softmax" and finding.severity != "note"}
    kept = [finding for finding in findings if finding.op != "output" or finding.layer not in softmaxes]
    return tuple(sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity)))


def _rank(found: Found) -> tuple[int, int]:
    *_, hazard = found
    return SEVERITIES.index(hazard.severity), -(hazard.length or 0)


def _source(node: Node | None, layer: keras.Operation | None) -> str | None:
    """Returns the file and line of the user's code that created an operation; None for layers of Keras."""
    if node is None or node.backward or type(layer).__module__.startswith(("keras.", "tfmixed.")):
        return None
    # The frames after the last one of this package belong to the layer's call.
    frames = itertools.takewhile(lambda frame: not frame.filename.startswith(_PACKAGE), reversed(node.op.traceback))
    own = [frame for frame in frames if not frame.filename.startswith(_library_folders())]
    return f"{Path(own[0].filename).name}:{own[0].lineno}" if own else None


@functools.cache
def _library_folders() -> tuple[str, ...]:
    specs = map(importlib.util.find_spec, ("keras", "tensorflow", "numpy"))
    folders = [folder for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    return (*(f"{folder}{os.sep}" for folder in folders), "<")
