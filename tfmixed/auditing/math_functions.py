"""Rules for functions of single numbers, softmax, logarithms of probabilities, and cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tfmixed.auditing.graph import DATA_MOVEMENT, constant_value, data_input, exponent, is_square, producers
from tfmixed.auditing.hazards import Context, Hazard, Rule, Severity, significant_bits
from tfmixed.formats import FORMATS, HALF

CROSS_ENTROPIES = ("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
# Operations between a probability and its logarithm.
_BEFORE_LOG = frozenset(["Maximum", "Minimum", "ClipByValue", "RealDiv", "Mul", "AddV2", "Sum", "Sub", "ConcatV2"])
_SATURATING = frozenset(["Tanh", "Sigmoid", "Erf", "Relu6"])
_LINEAR = frozenset(["Mul", "AddV2", "Add", "Sub", "Neg", "BiasAdd"])


def _softmax(op: Any, dtype: str, context: Context) -> Hazard | None:
    classes = op.inputs[0].shape[-1] if op.inputs[0].shape.rank else None
    name = {"Softmax": "softmax", "LogSoftmax": "log-softmax"}[op.type]
    severity: Severity = "warning"
    risk = f"{name} over {classes:,} values: " if classes else f"{name} over an unknown number of values: "
    consumers = context.consumers(op, _BEFORE_LOG)
    in_loss = context.is_output(op) or any(user.type in ("Log", *CROSS_ENTROPIES) for user in consumers)
    if name == "log-softmax":
        risk += f"logarithms are rounded to {significant_bits(dtype)} bits, and gradients with them"
    elif dtype == "bfloat16":
        risk += "probabilities are rounded to 8 bits"
        severity = "warning" if in_loss else "note"
    else:
        risk += f"probabilities below 6e-8 become 0{', their logarithm -inf' if in_loss else ''}"
        severity = "severe" if in_loss else "warning"
    return Hazard(name, dtype, severity, risk, length=classes)


def cross_entropy(_op: Any, dtype: str, _context: Context) -> Hazard:
    """Returns the hazard of a cross-entropy that TensorFlow computes from logits."""
    risk = f"a cross-entropy rounded to {significant_bits(dtype)} bits"
    if dtype == "float16":
        risk += ", which overflows above 2 times a loss scale of 32,768"
    severity: Severity = "severe" if dtype == "float16" else "warning"
    return Hazard("cross-entropy", dtype, severity, risk, "cast the logits to float32 before the loss")


def _exp(op: Any, dtype: str, context: Context) -> Hazard | None:
    low, high = context.bounds(op.inputs[0])
    limit, name = math.log(FORMATS[dtype].max), op.type.lower()
    if high <= limit and not (op.type in ("Sinh", "Cosh") and low < -limit):
        return None
    if dtype == "bfloat16":
        return Hazard(name, dtype, "note", f"{name} of a bfloat16: numbers near 10 are off by 3 % after it")
    advice = "compute it in float32, or subtract a maximum"
    return Hazard(name, dtype, "severe", f"{name} overflows above {limit:.1f}", advice)


def log(op: Any, dtype: str, context: Context) -> Hazard | None:
    """Returns the hazard of a logarithm, also in float32, since the probabilities may have been in half precision."""
    low, name = context.bounds(op.inputs[0]).low, op.type.lower()
    if (found := probabilities(op)) is not None:
        return _log_of_probabilities(*found, low)
    if dtype not in HALF or (op.type == "Log1p" and low >= 0) or low >= FORMATS[dtype].smallest_normal:
        return None
    if dtype == "bfloat16":
        return Hazard(name, dtype, "note", f"{name} of a bfloat16: near 1 it is off by 0.002")
    risk = f"{name} in float16: inputs below 6e-8 have become 0, their logarithm -inf"
    return Hazard(name, dtype, "severe", risk)


def probabilities(op: Any) -> tuple[Any, str] | None:
    """Returns the softmax or sigmoid whose logarithm `op` computes, and the narrowest dtype in between, or None."""
    if op.type not in ("Log", "Log1p"):
        return None
    for origin in producers(op.inputs[0], _BEFORE_LOG):
        if origin.type in ("Softmax", "Sigmoid"):
            dtypes = {origin.outputs[0].dtype.name, *_dtypes_before(op.inputs[0])}
            return origin, next((dtype for dtype in HALF if dtype in dtypes), "float32")
    return None


def _dtypes_before(tensor: Any) -> Iterator[str]:
    yield tensor.dtype.name
    while tensor.op.inputs and (tensor.op.type in DATA_MOVEMENT or tensor.op.type in _BEFORE_LOG):
        tensor = data_input(tensor.op)
        yield tensor.dtype.name


def _log_of_probabilities(origin: Any, dtype: str, low: float) -> Hazard:
    name = origin.type.lower()
    severity: Severity = "severe"
    if dtype == "bfloat16":
        severity, risk = "warning", "of probabilities rounded to 8 bits"
    elif dtype == "float32" or low >= FORMATS["float16"].smallest_normal:
        severity, risk = "note", "less precise than a loss of logits"
    elif low > 0:
        risk = f"probabilities below 6e-8 become {low:.0e}, their gradient 0"
    else:
        risk = "probabilities below 6e-8 become 0, their logarithm -inf"
    advice = f"leave out the {name} and give logits to a loss with from_logits=True"
    return Hazard(f"log of {name}", dtype, severity, f"the logarithm of a {name} in {dtype}: {risk}", advice)


def _power(op: Any, dtype: str, context: Context) -> Hazard | None:
    if dtype != "float16" or (op.type == "Mul" and not is_square(op.outputs[0])):
        return None
    power = exponent(op) if op.type == "Pow" else 2.0
    if power is None:
        return Hazard("pow", dtype, "warning", "power with a varying exponent: overflows above 65,504")
    if 0 <= power <= 1:
        return None
    name = "square" if power == 2 else f"pow {power:g}"
    limit = FORMATS[dtype].max ** (1 / power)
    if power < 0:
        return Hazard(name, dtype, "warning", f"{name} overflows below {limit:.2g}")
    if context.bounds(op.inputs[0]).magnitude <= limit or _saturates(op, context):
        return None
    reductions = [user for user in context.consumers(op) if user.type in ("Sum", "Mean")]
    if any(reduction.inputs[0].dtype.name == "float16" for reduction in reductions):
        return None  # reported with the reduction
    vanish = FORMATS[dtype].smallest_subnormal ** (1 / power)
    risk = f"{name} overflows above {limit:.3g} and vanishes below {vanish:.1g}"
    return Hazard(name, dtype, "severe" if reductions else "warning", risk, "cast to float32 before it")


def _root(op: Any, dtype: str, context: Context) -> Hazard | None:
    if dtype != "float16" or context.bounds(op.inputs[0]).low >= 1e-3:
        return None
    name = op.type.lower()
    return Hazard(name, dtype, "warning", f"{name} in float16: its gradient overflows where the input is below 1e-3")


def _division(op: Any, dtype: str, context: Context) -> Hazard | None:
    low, least = context.bounds(op.inputs[-1]).low, 1 / FORMATS[dtype].max
    if dtype != "float16" or not 0 <= low < least or constant_value(op.inputs[-1]) is not None:
        return None
    divisor = f"{low:.0e}" if low else "0"
    risk = f"division by what can be {divisor}: 1 over less than {least:.1e} overflows"
    return Hazard("division", dtype, "warning", risk, "a larger epsilon, or compute it in float32")


def _saturates(op: Any, context: Context) -> bool:
    """Returns whether an infinity from `op` only reaches functions that map it to a finite value."""
    consumers = context.consumers(op, _LINEAR)
    ends = [consumer for consumer in consumers if consumer.type not in _LINEAR | DATA_MOVEMENT]
    return bool(ends) and not context.is_output(op) and all(_maps_to_finite(end, context) for end in ends)


def _maps_to_finite(op: Any, context: Context) -> bool:
    return op.type in _SATURATING or (op.type == "Exp" and context.bounds(op.inputs[0]).high <= 0)


FORWARD: dict[str, Rule] = {
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(CROSS_ENTROPIES, cross_entropy),
    **dict.fromkeys(("Exp", "Expm1", "Sinh", "Cosh"), _exp),
    **dict.fromkeys(("Log", "Log1p"), log),
    **dict.fromkeys(("Pow", "Square", "SquaredDifference", "Mul"), _power),
    **dict.fromkeys(("Sqrt", "Rsqrt"), _root),
    **dict.fromkeys(("RealDiv", "DivNoNan", "Reciprocal", "Inv"), _division),
}
