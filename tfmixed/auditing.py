"""What in a model's forward and backward pass is unsafe in half precision."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
from keras import tree
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tfmixed import comparison, hardware, hazards, inspection, tracing
from tfmixed.comparison import Difference
from tfmixed.hazards import HALF, SEVERITIES, Context, Hazard, Severity
from tfmixed.tracing import Node, Step, Trace

_COLORS = {"severe": "bold red", "warning": "yellow", "note": "dim"}
_MEANINGS = {
    "severe": "wrong for values that are usual",
    "warning": "wrong for values that occur",
    "note": "less precise, or slower",
}
_VALUES = ("overflow", "underflow", "wrong values")
_OURS = f"{Path(__file__).parent}{os.sep}"


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

    Example:
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, dtype="mixed_float16")])
    >>> [(finding.severity, finding.op) for finding in audit(model)]
    [('warning', 'output')]
    """

    model: str
    dtypes: dict[str, int]
    findings: tuple[Finding, ...]
    ran: bool = False

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
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

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
        if self.of("severe"):
            yield Text("tfmixed.force_float32(model) makes the sensitive parts compute in float32.")


def audit(model: keras.Model, inputs: Any = None, targets: Any = None) -> Audit:
    """Reads what a model's training step computes in half precision, and tells what can go wrong.

    The step is traced forward and backward, so that `keras.ops`, `tf.*` and custom layers are seen alike; the loss is
    that of `compile`. Nothing in the model changes.

    Args:
        model: A built model.
        inputs: A batch, as the model takes it. It is run once in the model's precision and once in float32, and what
            overflowed, vanished or came out wrong is reported where it first did. None only reads.
        targets: The batch's targets. None leaves the loss out of the run.

    Returns:
        The findings, the gravest first.

    Raises:
        ValueError: `model` is no built Keras model, or it does not tell the shape of its inputs and none are given.
        NotImplementedError: Keras runs on another backend than TensorFlow, whose graphs this reads.

    Example:
    >>> layer = keras.layers.Lambda(lambda x: ops.sum(x, axis=-1, keepdims=True), dtype="mixed_float16")
    >>> model = keras.Sequential([keras.Input((12_544,)), layer, keras.layers.Dense(1, dtype="float32")])
    >>> audit(model).findings[0].risk
    'sum over 12,544 terms: overflows above a mean of 5.2'
    """
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(f"audit reads TensorFlow's graphs. Received: backend {keras.backend.backend()!r}")
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"model must be a built Keras model, received {model!r:.80}: call it on data first")
    given = _tensors(inputs), _tensors(targets)
    half, full = _traces(model, *given)
    context = Context(half, hardware.describe().main.kind == "cpu")
    found = [*_of_operations(half, context), *inspection.constants(half, full), *inspection.casts(half, context)]
    found += [*inspection.outputs(half), *inspection.variables(model), *inspection.speed(model, half, context)]
    if inputs is not None:
        found += _of_run(list(comparison.differences(Step(model, *given))), model)
    dtypes = [layer.compute_dtype for layer in model._flatten_layers(include_self=False, recursive=True)]
    counts = {dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))}
    return Audit(model.name, counts, tuple(_merged(found)), inputs is not None)


_Found = tuple[Node | None, keras.Operation | None, Hazard]


def unsafe(model: keras.Model) -> list[keras.Operation]:
    """Returns the layers whose own code has a severe hazard that float32 mends, as far as reading alone tells.

    Raises:
        ValueError: The model does not tell the shapes of its inputs.
    """
    half, full = _traces(model, None, None, backward=False)
    found = [*_of_operations(half, Context(half)), *inspection.constants(half, full)]
    layers = {id(layer): layer for _, layer, hazard in found if layer is not None and hazard.severity == "severe"}
    return list(layers.values())


def _traces(model: keras.Model, inputs: Any, targets: Any, backward: bool = True) -> tuple[Trace, Trace]:
    """Returns the traces of a step in the model's precision and in float32; what is not given is made up."""
    specs = tracing.specs_of(model) if inputs is None else tracing.specs_from(inputs)
    try:
        step = Step(model, specs, tracing.targets_for(model, specs) if targets is None else tracing.specs_from(targets))
        half = step.trace(backward)
        with tracing.in_float32(model):
            return half, step.trace(backward=False)  # of which the constants alone are looked at
    except Exception as error:  # whatever the user's code raises on inputs that are made up
        if inputs is not None:
            raise
        raise ValueError(
            f"inputs must be given for a model that cannot be traced with what it was built with, received None: pass "
            f"a batch. With {specs} it raises: {error}"
        ) from error


def _tensors(structure: Any) -> Any:
    return None if structure is None else tree.map_structure(keras.ops.convert_to_tensor, structure)


def _of_operations(trace: Trace, context: Context) -> Iterator[_Found]:
    for node in trace.nodes:
        if (hazard := hazards.find(node, context)) is not None:
            yield node, node.layer, hazard


def _of_run(differences: list[Difference], model: keras.Model) -> Iterator[_Found]:
    for each in differences:
        if not each.backward:
            yield None, each.layer, _of_values(each)
    gradients = [each for each in differences if each.backward]
    for name, group in (
        ("overflow", [each for each in gradients if each.overflowed]),
        ("underflow", [each for each in gradients if not each.overflowed]),
    ):
        if group:
            yield None, None, _of_gradients(name, group, model)


def _of_values(each: Difference) -> Hazard:
    full, size = each.full, each.half.size
    op = f"a cast to {each.dtype}" if each.op == "Cast" else each.op
    if each.overflowed:
        risk = f"{each.overflowed:,} of {size:,} values overflowed: in float32 they reach {full.largest:.3g} ({op})"
        return Hazard("overflow", each.dtype, "severe", risk)
    if each.vanished > 0.05:
        risk = f"{each.vanished:.0%} of the values became 0: in float32 their mean is {full.mean:.2g} ({op})"
        return Hazard("underflow", each.dtype, "severe" if each.vanished > 0.5 else "warning", risk)
    risk = f"off by {each.deviation:.0%}: the mean is {each.half.mean:.3g}, in float32 {full.mean:.3g} ({op})"
    return Hazard("wrong values", each.dtype, "severe" if each.deviation > 0.1 else "warning", risk)


def _of_gradients(name: str, group: list[Difference], model: keras.Model) -> Hazard:
    scale = float(model.optimizer.scale_loss(keras.ops.ones(()))) if getattr(model, "optimizer", None) else 1.0
    grave = max(group, key=lambda each: (each.overflowed / each.full.size, each.vanished))
    total, where = len(model.trainable_variables), f"at a loss scale of {scale:,.0f}, those of {grave.op} most of all"
    if name == "overflow":
        risk = f"gradients of {len(group)} of {total} variables overflow {where}"
        return Hazard(
            "gradient overflow", grave.dtype, "note", risk, "a smaller scale; a dynamic one finds it by itself"
        )
    risk = f"more than half of the gradients of {len(group)} of {total} variables become 0 {where}"
    return Hazard("gradient underflow", grave.dtype, "warning", risk, "a larger loss scale")


def _merged(found: list[_Found]) -> list[Finding]:
    """Makes one finding of what a layer does more than once, of its gravest occurrence, and sorts."""
    groups: dict[tuple[str, ...], list[_Found]] = {}
    for node, layer, hazard in found:
        groups.setdefault((_path(layer), hazard.op, hazard.dtype, hazard.advice), []).append((node, layer, hazard))
    findings = []
    for (path, *_), group in groups.items():
        node, layer, hazard = min(group, key=lambda each: (SEVERITIES.index(each[2].severity), -(each[2].length or 0)))
        findings.append(Finding(path, source=_source(node, layer), count=len(group), **dataclasses.asdict(hazard)))
    # An output that a softmax before it makes wrong needs no finding of its own.
    made = {finding.layer for finding in findings if finding.op == "softmax" and finding.severity != "note"}
    kept = [finding for finding in findings if finding.op != "output" or finding.layer not in made]
    return sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity))


def _path(layer: keras.Operation | None) -> str:
    return "loss" if layer is None else getattr(layer, "path", None) or layer.name


def _source(node: Node | None, layer: keras.Operation | None) -> str | None:
    """Returns where the user wrote the operation; None for what stands in a layer of Keras."""
    if node is None or node.backward or type(layer).__module__.startswith(("keras.", "tfmixed.")):
        return None
    # Beyond our own frames, the last of which calls the layer, begins what the layer does.
    frames = list(itertools.takewhile(lambda frame: not frame.filename.startswith(_OURS), reversed(node.op.traceback)))
    own = [frame for frame in frames if not frame.filename.startswith(_libraries())]
    return f"{Path(own[0].filename).name}:{own[0].lineno}" if own else None


@functools.cache
def _libraries() -> tuple[str, ...]:
    specs = map(importlib.util.find_spec, ("keras", "tensorflow", "numpy"))
    folders = [folder for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    return (*(f"{folder}{os.sep}" for folder in folders), "<")


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("layer", "what", "risk", "advice"):
        table.add_column(name, overflow="fold")
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        risk = "" if finding.op in _VALUES else finding.risk  # each has its own numbers: the first stands for all
        groups.setdefault((finding.op, finding.dtype, risk, finding.advice), []).append(finding)
    for (op, dtype, _, advice), group in groups.items():
        first, others = group[0], len(group) - 1
        layer = first.layer + (f" ({first.source})" if first.source else "") + (f" and {others} more" if others else "")
        table.add_row(*map(Text, (layer, f"{op}, {dtype}", first.risk, advice)))
    return table
