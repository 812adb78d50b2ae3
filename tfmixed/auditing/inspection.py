"""What a trace tells beyond single operations: constants, casts, outputs, variables, widths and float32 remainders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy

from tfmixed.auditing import origins
from tfmixed.auditing.hazards import Context, Found, Hazard, bits
from tfmixed.auditing.tracing import Node, Trace
from tfmixed.doctor import tile_alignment
from tfmixed.formats import FORMATS, HALF

# NVIDIA's guide: tensor cores take float16 and bfloat16 in multiples of 8.
_MULTIPLE = 8
# Layers with a smaller share of a model's multiplications are not worth a word about speed.
_SHARE = 0.01
_PRODUCTS = ("MatMul", "BatchMatMulV2", "Conv2D", "Conv3D", "Einsum")
_INTEGERS = ("int16", "int32", "int64", "uint16", "uint32", "uint64")
# Between the last layer and the model's output.
_AT_THE_END = frozenset(["BiasAdd", "AddV2", "Add", "Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Relu", "Mul"])

_CLIPS = frozenset(["Minimum", "Maximum", "ClipByValue"])
_COMPARISONS = frozenset(["Greater", "Less", "GreaterEqual", "LessEqual", "Equal", "NotEqual", "Cast"])


def constants(half: Trace, trace_full: Callable[[], Trace], context: Context) -> Iterator[Found]:
    """Yields constants that half precision turned into 0 or infinity.

    Args:
        half: The trace.
        trace_full: Returns the trace in float32, whose constants are what these were. Called if one is in doubt.
        context: That of the trace.
    """
    doubtful = list(_doubtful(half, context))
    full = trace_full().nodes if doubtful else ()
    originals = {node.name: node.op.outputs[0] for node in full if node.op.type == "Const"}
    for node, held, dtype, users in doubtful:
        before = origins.value(originals[node.name]) if node.name in originals else None
        if before is not None and before.shape == held.shape and before.dtype.kind == "f":
            hazard = _constant(before, held, dtype, users)
            if hazard is not None:
                yield node, node.layer, hazard


def _doubtful(half: Trace, context: Context) -> Iterator[tuple[Node, Any, str, set[str]]]:
    """Yields constants that are 0 or infinite in half precision, with their values, dtype and users."""
    for node in half.nodes:
        if node.op.type != "Const" or node.backward:
            continue
        users = list(context.users(node.op))
        cast = [each.outputs[0].dtype.name for each in users if each.type == "Cast"]
        dtype = next((each for each in [node.op.outputs[0].dtype.name, *cast] if each in HALF), None)
        types, after = {each.type for each in users}, origins.value(node.op.outputs[0])
        if dtype is None or after is None or types <= _COMPARISONS:
            continue
        with numpy.errstate(over="ignore"):
            held = after.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype("float32")
        if ((held == 0) | numpy.isinf(held)).any():
            yield node, held, dtype, types


def _constant(before: Any, held: Any, dtype: str, users: set[str]) -> Hazard | None:
    if (infinite := numpy.isinf(held) & numpy.isfinite(before)).any() and not users & _CLIPS:
        advice = "use a number that it holds, such as -3e4 for a mask, or compute in float32"
        risk = f"{before[infinite].flat[0]:g} is infinite in {dtype}"
        return Hazard("constant", dtype, "severe", risk, advice)
    if (vanished := (held == 0) & (before != 0)).any():
        advice = f"use {FORMATS[dtype].smallest_normal:.0e} or more, or compute in float32"
        risk = f"{before[vanished].flat[0]:g} is 0 in {dtype}: it protects nothing"
        return Hazard("constant", dtype, "severe", risk, advice)
    return None


def casts(trace: Trace, context: Context) -> Iterator[Found]:
    """Yields integers and targets that are cast to half precision."""
    targets = {id(tensor.op) for tensor in trace.targets}
    for node in trace.nodes:
        op = node.op
        if op.type != "Cast" or node.backward or (dtype := op.outputs[0].dtype.name) not in HALF:
            continue
        given = op.inputs[0].op
        integers = op.inputs[0] if given.type != "Cast" else given.inputs[0]
        exact = 2 / FORMATS[dtype].epsilon
        if dtype == "bfloat16" and integers.op.type in _PRODUCTS:
            continue  # of a quantized layer: rounded as any other product
        if id(origins.source(op.inputs[0])) in targets:
            risk = f"targets are cast to {dtype}: rounded to {bits(dtype)} bits"
            yield node, node.layer, Hazard("cast", dtype, "warning", risk, "cast the predictions to float32 instead")
        elif integers.dtype.name in _INTEGERS and context.bounds(integers).magnitude > exact:
            made = [each.type for each in origins.sources(integers, frozenset(["AddV2", "Mul", "Pack", "Prod"]))]
            if "Shape" in made:
                continue  # a size, mostly a small one
            ids = "Placeholder" in made
            risk = f"integers are cast to {dtype}, which rounds those above {exact:,.0f}"
            advice = "keep them integers, or cast them to float32"
            yield node, node.layer, Hazard("cast", dtype, "severe" if ids else "warning", risk, advice)


def outputs(trace: Trace) -> Iterator[Found]:
    """Yields outputs of the model that are in half precision."""
    nodes = {id(node.op): node for node in trace.nodes}
    for tensor in {id(each.op): each for each in trace.outputs}.values():
        dtype, node = tensor.dtype.name, nodes.get(id(tensor.op))
        if dtype in HALF:
            risk = f"the model's output is {dtype}: losses and metrics get {_digits(dtype)}"
            advice = "make the last layer's output float32: force_float32(model), or dtype='float32' for its activation"
            yield node, node.layer if node else None, Hazard("output", dtype, "warning", risk, advice)


def losses(trace: Trace) -> Iterator[Found]:
    """Yields losses that layers add in half precision."""
    nodes = {id(node.op): node for node in trace.nodes}
    for layer, tensor in trace.losses:
        if (dtype := tensor.dtype.name) in HALF:
            risk = f"the loss that it adds is {dtype}: {_digits(dtype)}"
            advice = "force_float32(model), or cast what it is computed from to float32"
            yield nodes.get(id(tensor.op)), layer, Hazard("added loss", dtype, "warning", risk, advice)


def variables(model: keras.Model) -> Iterator[Found]:
    """Yields layers whose variables are in half precision."""
    for layer in model._flatten_layers(include_self=True, recursive=True):
        own = {id(variable): variable for variable in layer._trainable_variables}.values()
        for dtype, count in Counter(variable.dtype for variable in own).items():
            if dtype in HALF:
                risk = (
                    f"{count} variables in {dtype}: updates below {FORMATS[dtype].epsilon / 2:.1g} of a weight are lost"
                )
                yield None, layer, Hazard("variables", dtype, "severe", risk, f"use the policy 'mixed_{dtype}'")


def speed(model: keras.Model, trace: Trace, context: Context) -> Iterator[Found]:
    """Yields layers with a share of the multiplications that half precision or its hardware does not speed up."""
    products = [node for node in trace.nodes if node.op.type in _PRODUCTS]
    if not any(node.op.inputs[0].dtype.name in HALF for node in products):
        return
    forward = [node for node in products if not node.backward and node.layer is not None]
    work: Counter[Any] = Counter()
    for node in forward:
        work[node.layer] += _multiplications(node.op)
    yield from _in_float32(forward, work.total(), context)
    yield from _padded(model, work)


def _in_float32(products: list[Node], total: int, context: Context) -> Iterator[Found]:
    slow = [node for node in products if node.op.inputs[0].dtype.name == "float32" and not _is_last(node.op, context)]
    for node in {node.layer: node for node in slow}.values():
        number = _multiplications(node.op)
        if number > _SHARE * total:
            risk = f"computes in float32: {number / total:.0%} of the model's multiplications"
            yield node, node.layer, Hazard("matrix product", "float32", "note", risk, "give it the model's policy")


def _padded(model: keras.Model, work: Counter[Any]) -> Iterator[Found]:
    odd: dict[str, list[str]] = {}
    for width in tile_alignment.odd_widths(model, _MULTIPLE):
        if width.name != "inputs":
            odd.setdefault(width.layer, []).append(f"{width.name} {width.width} (use {width.better})")
    for layer, number in work.items():
        if (found := odd.get(getattr(layer, "path", ""))) and number > _SHARE * work.total():
            risk = f"no multiple of {_MULTIPLE}: {', '.join(found)}; matrix units pad with zeros"
            advice = "choose a multiple where the data allows it"
            yield None, layer, Hazard("width", layer.compute_dtype, "note", risk, advice)


def _digits(dtype: str) -> str:
    return "3 digits and 65,504 at most" if dtype == "float16" else "2 digits"


def _multiplications(op: Any) -> int:
    """Counts those of a product or convolution, with unknown sizes as 1."""
    shapes = [[size or 1 for size in tensor.shape] for tensor in op.inputs[:2] if tensor.shape.rank is not None]
    made = [size or 1 for size in op.outputs[0].shape] if op.outputs[0].shape.rank is not None else []
    if len(shapes) < 2:
        return 0
    if op.type.startswith("Conv"):
        return math.prod(made) * math.prod(shapes[1][:-1])
    if op.type == "Einsum":
        first, _, rest = op.get_attr("equation").decode().partition(",")
        labels = dict(zip(first.replace(".", ""), reversed(shapes[0]), strict=False)) if "." in first else {}
        labels |= dict(zip(first, shapes[0], strict=False)) | dict(
            zip(rest.partition("->")[0], shapes[1], strict=False)
        )
        return math.prod(labels.values())
    inner = shapes[0][-2] if op.node_def.attr["transpose_a"].b or op.node_def.attr["adj_x"].b else shapes[0][-1]
    return math.prod(made) * inner


def _is_last(op: Any, context: Context) -> bool:
    return context.is_output(op) or any(id(user) in context.outputs for user in context.users(op, _AT_THE_END))
