"""What goes wrong in functions of single numbers, and in softmax, logarithms of probabilities and losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tfmixed.auditing import origins
from tfmixed.auditing.hazards import IN_FLOAT32, Context, Hazard, Rule, Severity, bits
from tfmixed.formats import FORMATS, HALF

LOSSES = ("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
# Between a probability and its logarithm.
_ON_THE_WAY = frozenset(["Maximum", "Minimum", "ClipByValue", "RealDiv", "Mul", "AddV2", "Sum", "Sub", "ConcatV2"])
# What bounds whatever comes into it: an infinity before it does no harm.
_SATURATING = frozenset(["Tanh", "Sigmoid", "Erf", "Relu6"])


def _softmax(op: Any, dtype: str, context: Context) -> Hazard | None:
    classes = op.inputs[0].shape[-1] if op.inputs[0].shape.rank else None
    name = {"Softmax": "softmax", "LogSoftmax": "log-softmax"}[op.type]
    over = f"{name} over {classes:,} values" if classes else f"{name} over an unknown number of values"
    if name == "log-softmax":
        risk = f"{over}: logarithms are rounded to {bits(dtype)} bits, and gradients with them"
        return Hazard(name, dtype, "warning", risk, length=classes)
    users = context.users(op, _ON_THE_WAY)
    decides = context.is_output(op) or any(user.type == "Log" or user.type in LOSSES for user in users)
    if dtype == "bfloat16":
        risk = f"{over}: probabilities are rounded to 8 bits"
        return Hazard(name, dtype, "warning" if decides else "note", risk, length=classes)
    risk = f"{over}: probabilities below 6e-8 become 0"
    if decides:
        return Hazard(name, dtype, "severe", f"{risk}, their logarithm -inf", length=classes)
    return Hazard(name, dtype, "warning", risk, length=classes)


def cross_entropy(_op: Any, dtype: str, _context: Context) -> Hazard:
    """Judges a loss that TensorFlow computes from logits."""
    risk = f"a cross-entropy rounded to {bits(dtype)} bits"
    if dtype == "float16":
        risk += ", which overflows above 2 times a loss scale of 32,768"
    severity: Severity = "severe" if dtype == "float16" else "warning"
    return Hazard("cross-entropy", dtype, severity, risk, "cast the logits to float32 before the loss")


def _exp(op: Any, dtype: str, context: Context) -> Hazard | None:
    low, high = context.bounds(op.inputs[0])
    limit = math.log(FORMATS[dtype].max)
    overflows = high > limit or (op.type in ("Sinh", "Cosh") and low < -limit)
    name = op.type.lower()
    if not overflows:
        return None
    if dtype == "bfloat16":
        return Hazard(name, dtype, "note", f"{name} of a bfloat16: numbers near 10 are off by 3 % after it")
    return Hazard(name, dtype, "severe", f"{name} overflows above {limit:.1f}", f"{IN_FLOAT32}, or subtract a maximum")


def log(op: Any, dtype: str, context: Context) -> Hazard | None:
    """Judges a logarithm; one of float32 too, for the probabilities that it takes may have been half."""
    low = context.bounds(op.inputs[0]).low
    if (made := probabilities(op)) is not None:
        return _log_of_probabilities(*made, low)
    if dtype not in HALF or (op.type == "Log1p" and low >= 0) or low >= FORMATS[dtype].smallest_normal:
        return None
    name = op.type.lower()
    if dtype == "bfloat16":
        return Hazard(name, dtype, "note", f"{name} of a bfloat16: near 1 it is off by 0.002")
    risk = f"{name} in float16: what was below 6e-8 has become 0, its logarithm -inf"
    return Hazard(name, dtype, "severe", risk)


def probabilities(op: Any) -> tuple[Any, str] | None:
    """Returns the softmax or sigmoid whose logarithm an operation takes, and the narrowest dtype between the two."""
    if op.type not in ("Log", "Log1p"):
        return None
    seen = {op.inputs[0].dtype.name}
    for each in origins.sources(op.inputs[0], _ON_THE_WAY):
        if each.type in ("Softmax", "Sigmoid"):
            seen |= {each.outputs[0].dtype.name, *_dtypes_to(op.inputs[0])}
            return each, next((dtype for dtype in HALF if dtype in seen), "float32")
    return None


def _dtypes_to(tensor: Any) -> Iterator[str]:
    """Yields the dtypes that values had on the way to a tensor."""
    while tensor.op.inputs and (tensor.op.type in origins.MOVES or tensor.op.type in _ON_THE_WAY):
        tensor = tensor.op.inputs[0]
        yield tensor.dtype.name


def _log_of_probabilities(made: Any, dtype: str, low: float) -> Hazard:
    name = made.type.lower()
    advice = f"leave out the {name} and give logits to a loss with from_logits=True"
    risk = f"the logarithm of a {name} in {dtype}: "
    if dtype == "bfloat16":
        return Hazard(f"log of {name}", dtype, "warning", risk + "of probabilities rounded to 8 bits", advice)
    if dtype == "float32" or low >= FORMATS["float16"].smallest_normal:
        return Hazard(f"log of {name}", dtype, "note", risk + "less precise than a loss of logits", advice)
    lost = f"become {low:.0e}, their gradient 0" if low > 0 else "become 0, their logarithm -inf"
    return Hazard(f"log of {name}", dtype, "severe", f"{risk}probabilities below 6e-8 {lost}", advice)


def _power(op: Any, dtype: str, context: Context) -> Hazard | None:
    if op.type == "Mul" and not origins.is_square(op.outputs[0]):
        return None
    exponent = origins.exponent(op) if op.type == "Pow" else 2.0
    if dtype != "float16" or (exponent is not None and 0 <= exponent <= 1):
        return None
    if exponent is None:
        return Hazard("pow", dtype, "warning", "power with a varying exponent: overflows above 65,504")
    name = "square" if exponent == 2 else f"pow {exponent:g}"
    limit = FORMATS[dtype].max ** (1 / exponent)
    if exponent < 0:
        return Hazard(name, dtype, "warning", f"{name} overflows below {limit:.2g}")
    if context.bounds(op.inputs[0]).magnitude <= limit or _saturates(op, context):
        return None
    # A reduction of the squares says it already, where it runs in float16 too.
    reduced = [user for user in context.users(op) if user.type in ("Sum", "Mean")]
    if any(user.inputs[0].dtype.name == "float16" for user in reduced):
        return None
    vanish = FORMATS[dtype].smallest_subnormal ** (1 / exponent)
    risk = f"{name} overflows above {limit:.3g} and vanishes below {vanish:.1g}"
    return Hazard(name, dtype, "severe" if reduced else "warning", risk, "cast to float32 before it")


def _root(op: Any, dtype: str, context: Context) -> Hazard | None:
    if dtype != "float16" or context.bounds(op.inputs[0]).low >= 1e-3:
        return None
    risk = f"{op.type.lower()} in float16: its gradient overflows where the input is below 1e-3"
    return Hazard(op.type.lower(), dtype, "warning", risk)


def _division(op: Any, dtype: str, context: Context) -> Hazard | None:
    low, least = context.bounds(op.inputs[-1]).low, 1 / FORMATS[dtype].max
    if dtype != "float16" or not 0 <= low < least or origins.value(op.inputs[-1]) is not None:
        return None
    risk = f"division by what can be {low:.0e}: 1 over less than {least:.1e} overflows".replace("0e+00", "0")
    return Hazard("division", dtype, "warning", risk, f"a larger epsilon, or {IN_FLOAT32}")


def _saturates(op: Any, context: Context) -> bool:
    """Tells whether an infinity from `op` ends where it does no harm."""
    through = frozenset(["Mul", "AddV2", "Add", "Sub", "Neg", "BiasAdd"])
    ends = [user for user in context.users(op, through) if user.type not in through | origins.MOVES]
    harmless = [user.type in _SATURATING or _is_exp_of_negative(user, context) for user in ends]
    return bool(ends) and all(harmless) and not context.is_output(op)


def _is_exp_of_negative(op: Any, context: Context) -> bool:
    return op.type == "Exp" and context.bounds(op.inputs[0]).high <= 0


RULES: dict[str, Rule] = {
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    **dict.fromkeys(LOSSES, cross_entropy),
    **dict.fromkeys(("Exp", "Expm1", "Sinh", "Cosh"), _exp),
    **dict.fromkeys(("Log", "Log1p"), log),
    **dict.fromkeys(("Pow", "Square", "SquaredDifference", "Mul"), _power),
    **dict.fromkeys(("Sqrt", "Rsqrt"), _root),
    **dict.fromkeys(("RealDiv", "DivNoNan", "Reciprocal", "Inv"), _division),
}
