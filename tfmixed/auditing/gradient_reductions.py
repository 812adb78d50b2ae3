"""Rules for sums in the backward pass, for which `tfmixed.set_policy` replaces gradient functions.

The gradient of each value that is used repeatedly is a sum over its uses. The rules describe the CPU kernels of
TensorFlow 2.21, as measured. With float32 sums, only sums that cannot be replaced are left in the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from tfmixed._islands import gradient_sums
from tfmixed.auditing.graph import Terms, ancestors, constant_value, producer, terms
from tfmixed.auditing.hazards import Context, Hazard, Rule
from tfmixed.auditing.reductions import accumulator_limit, running_terms, scattered_terms, stagnant, stagnation
from tfmixed.formats import HALF

_FLOAT32_SUMS = "tfmixed.set_policy before the model is created, or tfmixed.force_float32(model), sums in float32"


def _advice() -> str:
    return "compute it in float32" if gradient_sums.is_on() else _FLOAT32_SUMS


def _sum(op: Any, dtype: str, context: Context) -> Hazard | None:
    summed = terms(op)
    if summed is None or (found := stagnation("gradient", op, summed, dtype, context)) is None:
        return None
    return Hazard("sum of gradients", dtype, "warning", found.risk, _advice(), summed.number)


def _bias(op: Any, dtype: str, context: Context) -> Hazard | None:
    shape, channels = op.inputs[0].shape, 1 if op.get_attr("data_format") == b"NCHW" else -1
    if dtype != "bfloat16" or not context.on_cpu or shape.rank is None:
        return None
    sizes = list(shape)
    del sizes[channels]
    if (summed := Terms.of(sizes, False)).number <= 256:
        return None
    # Grappler's fusion is not in the trace.
    users = op.inputs[0].consumers()
    is_convolution = any(user.type == "Conv2DBackpropFilter" and user.inputs[2] is op.inputs[0] for user in users)
    where = " where no compiled step fuses it with the kernel's gradient" if is_convolution else ""
    risk = stagnant(f"bias gradient over {summed} terms", summed, f"{dtype} on CPUs{where}", 256)
    return Hazard("bias gradient", dtype, "warning", risk, _advice(), summed.number)


def _loop(op: Any, dtype: str, _: Context) -> Hazard | None:
    """Returns the hazard of a value that a loop uses in each step, and whose gradient the loop adds up."""
    inputs, outputs = (getattr(op.graph, name, ()) for name in ("inputs", "outputs"))
    for before, after in zip(inputs, outputs, strict=False):
        added = [tensor for tensor in op.inputs if producer(tensor) is not before.op]
        # A gradient that depends on the one of the step before is that of the loop's state.
        if producer(after) is op and len(added) < len(op.inputs) and before.op not in ancestors(added):
            name = "gradient of a value that each step of a loop uses"
            risk = stagnant(name, Terms(1, False, False), dtype, accumulator_limit(dtype))
            return Hazard("sum of gradients", dtype, "warning", risk, "cast the float32 value within the loop")
    return None


def _kernel(op: Any) -> Terms:
    shape = op.inputs[2].shape
    return Terms.of(list(shape)[:-1] if shape.rank is not None else [None], False)


def _resize(op: Any) -> Terms:
    return Terms.of(_quotients(op.inputs[0].shape[1:3], constant_value(op.inputs[1])), False)


def _pooling(op: Any) -> Terms:
    return Terms.of(_quotients(op.get_attr("ksize"), op.get_attr("strides")), False)


def _quotients(large: Any, small: Any) -> list[int | None]:
    if small is None:
        return [None]
    return [None if size is None else math.ceil(size / part) for size, part in zip(large, small, strict=True)]


def _rule(name: str, count: Callable[[Any], Terms], dtypes: Collection[str] = HALF, advice: str | None = None) -> Rule:
    """Returns the rule of an operation that accumulates in these dtypes on CPUs."""

    def rule(op: Any, dtype: str, context: Context) -> Hazard | None:
        summed, most = count(op), accumulator_limit(dtype)
        if dtype not in dtypes or not context.on_cpu or summed.number <= most:
            return None
        risk = stagnant(f"{name} over {summed} terms", summed, f"{dtype} on CPUs", most)
        return Hazard("sum of gradients", dtype, "warning", risk, advice or _advice(), summed.number)

    return rule


_KERNELS = ("Conv2DBackpropFilter", "Conv3DBackpropFilterV2", "DepthwiseConv2dNativeBackpropFilter")
_SCATTERED = ("UnsortedSegmentSum", "SegmentSum", "SegmentSumV2", "ScatterNd", "SparseTensorDenseMatMul")
_AVERAGE = "average the windows in float32, as tfmixed.layers.AveragePooling2D does"
BACKWARD: dict[str, Rule] = {
    **dict.fromkeys(_SCATTERED, _rule("sum of all gradients with the same index", scattered_terms)),
    **dict.fromkeys(_KERNELS, _rule("kernel gradient", _kernel, ("float16",))),
    **dict.fromkeys(("AvgPoolGrad", "AvgPool3DGrad"), _rule("gradient of windows", _pooling, ("bfloat16",), _AVERAGE)),
    **dict.fromkeys(("Add", "AddV2", "AddN"), _loop),
    "Dilation2DBackpropFilter": _rule("kernel gradient", _kernel),
    "ResizeNearestNeighborGrad": _rule("gradient of repeated values", _resize),
    "Cumsum": _rule("gradient of a running sum", running_terms),
    "Sum": _sum,
    "BiasAddGrad": _bias,
}
