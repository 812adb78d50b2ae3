"""Rules for a whole trace: its operations, constants, casts, outputs, added losses, variables and speed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy

from tfmixed._core import optimizer_precision
from tfmixed.auditing import gradient_reductions, math_functions, reductions
from tfmixed.auditing.graph import constant_value, producer, producers
from tfmixed.auditing.hazards import Context, Found, Hazard, Rule, Severity, significant_bits
from tfmixed.auditing.trace import Node, Trace
from tfmixed.doctor import tile_alignment
from tfmixed.formats import FORMATS, HALF

_WIDTH_MULTIPLE = 8  # of tensor cores in float16 and bfloat16, by NVIDIA's guide
_MIN_SHARE = 0.01  # of the model's multiplications: layers below it are not reported for speed
_PRODUCTS = ("MatMul", "BatchMatMulV2", "Conv2D", "Conv3D", "Einsum")
_INTEGERS = ("int16", "int32", "int64", "uint16", "uint32", "uint64")
_AFTER_LAST_PRODUCT = frozenset(
    ["BiasAdd", "AddV2", "Add", "Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Relu", "Mul"],
)
_UNBOUNDED = ("Exp", "Expm1", "Sinh", "Cosh", "Square", "SquaredDifference", "Pow", "Sum", "Prod", "Cumprod")
_CLIPS = frozenset(["Minimum", "Maximum", "ClipByValue"])
_COMPARISONS = frozenset(["Greater", "Less", "GreaterEqual", "LessEqual", "Equal", "NotEqual", "Cast"])


def operations(trace: Trace, context: Context) -> Iterator[Found]:
    """Yields hazards of single operations."""
    owner = {id(node.op): node.layer for node in trace.nodes}
    for node in trace.nodes:
        if (hazard := _of_operation(node, context)) is not None:
            # Inputs are cast before the layer's own call begins.
            users = context.consumers(node.op) if node.op.type == "Cast" else ()
            layers = [layer for user in users if (layer := owner.get(id(user))) is not None]
            yield node, layers[0] if layers else node.layer, hazard


def _of_operation(node: Node, context: Context) -> Hazard | None:
    rule = (gradient_reductions.BACKWARD if node.backward else _FORWARD).get(node.op.type)
    if rule is None:
        return None
    tensors = node.op.outputs if node.op.type == "Cast" else node.op.inputs
    dtype = next((tensor.dtype.name for tensor in tensors if tensor.dtype.is_floating), "")
    return rule(node.op, dtype, context) if dtype in HALF or rule is math_functions.log else None


def _cast(op: Any, dtype: str, context: Context) -> Hazard | None:
    """Returns the hazard of a float32 result that overflows when it is cast to half precision."""
    origin = producer(op.inputs[0])
    if origin.type in math_functions.CROSS_ENTROPIES:  # `tf.nn` computes them in float32 and casts them back
        return math_functions.cross_entropy(op, dtype, context)
    if origin.type not in _UNBOUNDED or origin.outputs[0].dtype.name != "float32":
        return None
    hazard = _FORWARD[origin.type](origin, dtype, context)
    if hazard is None or hazard.severity != "severe":
        return None
    risk = f"{hazard.risk}, and is cast to {dtype}"
    return dataclasses.replace(hazard, op="cast", risk=risk, advice="use its float32 result")


_FORWARD: dict[str, Rule] = {**reductions.FORWARD, **math_functions.FORWARD, "Cast": _cast}


def constants(half: Trace, trace_float32: Callable[[], Trace], context: Context) -> Iterator[Found]:
    """Yields constants that are 0 or infinite in half precision.

    Args:
        half: The trace.
        trace_float32: Returns the trace in float32 with the original constants. Only called if it is needed.
        context: The context of `half`.
    """
    candidates = list(_zero_or_infinite(half, context))
    nodes = trace_float32().nodes if candidates else ()
    originals = {node.name: constant_value(node.op.outputs[0]) for node in nodes if node.op.type == "Const"}
    for node, rounded, dtype, users in candidates:
        original = originals.get(node.name)
        if original is None or original.shape != rounded.shape or original.dtype.kind != "f":
            continue
        if (infinite := numpy.isinf(rounded) & numpy.isfinite(original)).any() and not users & _CLIPS:
            risk = f"{original[infinite].flat[0]:g} is infinite in {dtype}"
            advice = f"use a number that {dtype} can represent, such as -3e4 for a mask, or compute in float32"
        elif (vanished := (rounded == 0) & (original != 0)).any():
            risk = f"{original[vanished].flat[0]:g} is 0 in {dtype}: as an epsilon it has no effect"
            advice = f"use {FORMATS[dtype].smallest_normal:.0e} or more, or compute in float32"
        else:
            continue
        yield node, node.layer, Hazard("constant", dtype, "severe", risk, advice)


def _zero_or_infinite(half: Trace, context: Context) -> Iterator[tuple[Node, Any, str, set[str]]]:
    """Yields constants that contain 0 or infinity in half precision: node, rounded values, dtype, types of users."""
    for node in half.nodes:
        if node.op.type != "Const" or node.backward:
            continue
        tensor, users = node.op.outputs[0], list(context.consumers(node.op))
        dtypes = [tensor.dtype.name, *(user.outputs[0].dtype.name for user in users if user.type == "Cast")]
        dtype = next((dtype for dtype in dtypes if dtype in HALF), None)
        types, array = {user.type for user in users}, constant_value(tensor)
        if dtype is None or array is None or types <= _COMPARISONS:
            continue
        with numpy.errstate(over="ignore"):
            rounded = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype("float32")
        if ((rounded == 0) | numpy.isinf(rounded)).any():
            yield node, rounded, dtype, types


def casts(trace: Trace, context: Context) -> Iterator[Found]:
    """Yields casts of integers and targets to half precision."""
    targets = {id(tensor.op) for tensor in trace.targets}
    for node in trace.nodes:
        dtype = node.op.outputs[0].dtype.name if node.op.type == "Cast" else ""
        if node.backward or dtype not in HALF:
            continue
        given = node.op.inputs[0]
        original = given.op.inputs[0] if given.op.type == "Cast" else given
        if dtype == "bfloat16" and original.op.type in _PRODUCTS:
            continue  # the product of a quantized layer, rounded as any other product
        largest_exact = 2 / FORMATS[dtype].epsilon
        if id(producer(given)) in targets:
            risk = f"targets are cast to {dtype}: rounded to {significant_bits(dtype)} bits"
            yield node, node.layer, Hazard("cast", dtype, "warning", risk, "cast the predictions to float32 instead")
        elif original.dtype.name in _INTEGERS and context.bounds(original).magnitude > largest_exact:
            types = {op.type for op in producers(original, frozenset(["AddV2", "Mul", "Pack", "Prod"]))}
            if "Shape" in types:
                continue  # sizes are usually small
            risk = f"integers are cast to {dtype}, which rounds those above {largest_exact:,.0f}"
            advice = "keep them integers, or cast them to float32"
            severe = "Placeholder" in types  # such as ids
            yield node, node.layer, Hazard("cast", dtype, "severe" if severe else "warning", risk, advice)


def outputs(trace: Trace) -> Iterator[Found]:
    """Yields half-precision outputs of the model, and half-precision losses that layers add."""
    nodes = {id(node.op): node for node in trace.nodes}
    for tensor in {id(tensor.op): tensor for tensor in trace.outputs}.values():
        dtype, node = tensor.dtype.name, nodes.get(id(tensor.op))
        if dtype in HALF:
            risk = f"the model's output is {dtype}: losses and metrics get {_precision(dtype)}"
            advice = "make the last layer's output float32: force_float32(model), or dtype='float32' for its activation"
            yield node, node.layer if node else None, Hazard("output", dtype, "warning", risk, advice)
    for layer, tensor in trace.losses:
        if (dtype := tensor.dtype.name) in HALF:
            risk = f"the loss that it adds is {dtype}: {_precision(dtype)}"
            advice = "force_float32(model), or cast the inputs of the loss to float32"
            yield nodes.get(id(tensor.op)), layer, Hazard("added loss", dtype, "warning", risk, advice)


def _precision(dtype: str) -> str:
    return "3 digits and 65,504 at most" if dtype == "float16" else "2 digits"


def variables(model: keras.Model) -> Iterator[Found]:
    """Yields layers with half-precision variables, unless the optimizer keeps small updates of them."""
    if optimizer_precision.keeps_small_updates(getattr(model, "optimizer", None)):
        return
    for layer in model._flatten_layers(include_self=True, recursive=True):
        own = {id(variable): variable for variable in layer._trainable_variables}.values()
        for dtype, count in Counter(variable.dtype for variable in own).items():
            if dtype in HALF:
                lost = f"updates below {FORMATS[dtype].epsilon / 2:.1g} of a weight are lost"
                risk, advice = f"{count} variables in {dtype}: {lost}", f"use the policy 'mixed_{dtype}'"
                yield None, layer, Hazard("variables", dtype, "severe", risk, advice)


def optimizer(model: keras.Model) -> Iterator[Found]:
    """Yields the constants of the compiled optimizer that half-precision variables round away."""
    compiled = getattr(model, "optimizer", None)
    found = [] if compiled is None else optimizer_precision.find(compiled, model.trainable_variables)
    for dtype in HALF:
        lost = [finding for finding in found if finding.dtype == dtype]
        if lost:
            severity: Severity = "severe" if any(finding.severe for finding in lost) else "warning"
            risk = "; ".join(f"{finding.optimizer}: {finding}" for finding in lost)
            yield (
                None,
                compiled,
                Hazard("optimizer", dtype, severity, risk, f"u{optimizer_precision.remedy(dtype)[1:]}"),
            )


def speed(model: keras.Model, trace: Trace, context: Context) -> Iterator[Found]:
    """Yields layers with many multiplications that run in float32, or whose widths tensor cores pad."""
    products = [node for node in trace.nodes if node.op.type in _PRODUCTS]
    if not any(node.op.inputs[0].dtype.name in HALF for node in products):
        return
    forward = [node for node in products if not node.backward and node.layer is not None]
    work: Counter[Any] = Counter()
    for node in forward:
        work[node.layer] += _multiplications(node.op)
    large = {layer for layer, count in work.items() if count > _MIN_SHARE * work.total()}
    slow = {node.layer: node for node in forward if _is_float32(node.op, context) and node.layer in large}
    for layer, node in slow.items():
        risk = f"computes in float32: {work[layer] / work.total():.0%} of the model's multiplications"
        yield node, layer, Hazard("matrix product", "float32", "note", risk, "give it the model's policy")
    odd: dict[str, list[str]] = {}
    for width in tile_alignment.odd_widths(model, _WIDTH_MULTIPLE):
        if width.name != "inputs":
            odd.setdefault(width.layer, []).append(f"{width.name} {width.width} (use {width.better})")
    for layer in work:
        if layer in large and (widths := odd.get(getattr(layer, "path", ""))):
            risk = f"not a multiple of {_WIDTH_MULTIPLE}: {', '.join(widths)}; matrix units pad with zeros"
            advice = "choose a multiple where the data allows it"
            yield None, layer, Hazard("width", layer.compute_dtype, "note", risk, advice)


def _is_float32(op: Any, context: Context) -> bool:
    """Returns whether a product computes in float32, other than the last one of the model."""
    last = context.is_output(op) or any(id(op) in context.outputs for op in context.consumers(op, _AFTER_LAST_PRODUCT))
    return op.inputs[0].dtype.name == "float32" and not last


def _multiplications(op: Any) -> int:
    """Returns the number of multiplications of a product or convolution; unknown sizes count as 1."""
    tensors = [*op.inputs[:2], op.outputs[0]]
    if len(tensors) < 3 or any(tensor.shape.rank is None for tensor in tensors):
        return 0
    first, second, result = ([size or 1 for size in tensor.shape] for tensor in tensors)
    if op.type.startswith("Conv"):
        return math.prod(result) * math.prod(second[:-1])
    if op.type == "Einsum":
        labels, _, rest = op.get_attr("equation").decode().partition(",")
        sizes = dict(zip(labels.replace(".", ""), reversed(first), strict=False)) if "." in labels else {}
        sizes |= dict(zip(labels, first, strict=False)) | dict(zip(rest.partition("->")[0], second, strict=False))
        return math.prod(sizes.values())
    attributes = op.node_def.attr
    inner = first[-2] if attributes["transpose_a"].b or attributes["adj_x"].b else first[-1]
    return math.prod(result) * inner
