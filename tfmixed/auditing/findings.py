"""What an audit found, as values and as a table."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tfmixed._utils import rich_text
from tfmixed.auditing.hazards import SEVERITIES, Severity
from tfmixed.formats import HALF

_COLORS = {"severe": "bold red", "warning": "yellow", "note": "dim"}
_MEANINGS = {
    "severe": "goes wrong on ordinary values",
    "warning": "goes wrong on large or small values",
    "note": "less precise, or slower",
}
_NOT_MENDED = ("variables", "cast")  # by float32 computations


@dataclass(frozen=True)
class Finding:
    """One thing that is unsafe in half precision.

    Args:
        layer: Path of the layer in whose own code it stands; `"loss"` for what stands in none.
        op: What it does: `"sum"`, `"softmax"`, `"constant"`, ...
        dtype: The format that it runs in.
        risk: What goes wrong, and from which number on.
        advice: What to do.
        severity: `"severe"`, `"warning"` or `"note"`.
        length: Terms of a reduction, as far as they are known.
        source: File and line of a user's own code, if it stands there.
        count: How often it occurs in that layer.
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
    """The findings of `audit`, the gravest first. Prints as a table.

    Args:
        model: The model's name.
        dtypes: The formats that its layers compute in, and how many layers do.
        findings: What was found.
        ran: Did inputs run through it, against float32?
        loss: Was the loss read too? Not where it takes targets that must be given, or where there is none.

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
        """Tells whether there are findings as grave as `on`, or graver."""
        return on != "never" and any(self.of(each) for each in SEVERITIES[: SEVERITIES.index(on) + 1])

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
            nothing = (
                "Nothing computes in half precision: there is nothing to audit. Make the model under a mixed policy."
            )
            return Group(title, Text(nothing))
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
            yield Text("The loss was not read: pass inputs and targets, or read a custom train_step yourself.")
        if any(finding.op not in _NOT_MENDED for finding in self.of("severe")):
            yield Text("tfmixed.force_float32(model) makes the sensitive parts compute in float32.")


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("layer", "what", "risk", "advice"):
        table.add_column(name, overflow="fold")
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.op, finding.dtype, finding.risk, finding.advice), []).append(finding)
    for (op, dtype, risk, advice), group in groups.items():
        first, others = group[0], len(group) - 1
        layer = first.layer + (f" ({first.source})" if first.source else "") + (f" and {others} more" if others else "")
        table.add_row(*map(Text, (layer, f"{op}, {dtype}", risk, advice)))
    return table
