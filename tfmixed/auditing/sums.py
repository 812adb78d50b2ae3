"""What goes wrong where many numbers become one: sums, means, products, norms, pooling, gradients of biases.

The thresholds say how the kernels of TensorFlow 2.21 behave on CPUs, as measured: float16 sums and averages over axes
other than the last add up in float16, and so do pooling windows and running sums; bfloat16 sums add up in float32, but
not running sums and the gradients of biases. Matrix products and convolutions add up in float32.
"""

from __future__ import annotations

import math
from typing import Any

from tfmixed.auditing import origins
from tfmixed.auditing.hazards import Context, Hazard, Rule, Severity, bits, number
from tfmixed.auditing.origins import Terms
from tfmixed.formats import FORMATS

_FEW = 32  # terms that no reduction of them is worth a word
_SCATTERED = (
    *("SegmentSum", "SegmentSumV2", "UnsortedSegmentSum", "SparseSegmentSum", "SparseSegmentMean"),
    *("ScatterNd", "TensorScatterAdd"),
)


def _sum(op: Any, dtype: str, context: Context) -> Hazard | None:
    terms = origins.terms(op)
    if terms is None:
        return Hazard("sum", dtype, "warning", "sum over axes that are not constant: may overflow above 65,504")
    magnitude = context.bounds(op.inputs[0]).magnitude
    if _never_overflows(terms, magnitude, dtype):
        return _stagnation("sum", op, terms, dtype, context)
    if origins.is_square(op.inputs[0]):
        return _norm(terms, dtype)
    if terms.exact and terms.number < _FEW:
        return None
    if dtype == "bfloat16":
        return Hazard("sum", dtype, "note", f"sum over {terms} terms, rounded to 8 bits", length=terms.number)
    limit = FORMATS[dtype].max / terms.number
    severity: Severity = "severe" if limit < 16 else "warning" if limit < 256 or not terms.exact else "note"
    risk = f"sum over {terms} terms: overflows above a mean of {number(limit)}"
    return Hazard("sum", dtype, severity, risk, length=terms.number)


def _never_overflows(terms: Terms, magnitude: float, dtype: str) -> bool:
    return terms.exact and terms.number * magnitude <= FORMATS[dtype].max


def _norm(terms: Terms, dtype: str) -> Hazard | None:
    if dtype == "bfloat16":
        risk = f"sum of {terms} squares, rounded to 8 bits"
        return Hazard("norm", dtype, "note", risk, length=terms.number) if terms.number >= _FEW else None
    limit = math.sqrt(FORMATS[dtype].max / terms.number)
    severity: Severity = "severe" if limit < 64 else "warning"
    risk = f"sum of {terms} squares: overflows above a root mean square of {number(limit)}, squares below 2e-4 vanish"
    return Hazard("norm", dtype, severity, risk, length=terms.number)


def _mean(op: Any, dtype: str, context: Context) -> Hazard | None:
    terms = origins.terms(op)
    if terms is None:
        return None
    if origins.is_square(op.inputs[0]) and context.bounds(op.inputs[0]).high > FORMATS[dtype].max:
        risk = f"mean of {terms} squares: squares of numbers above 256 overflow, of those below 2e-4 vanish"
        if dtype == "float16":
            return Hazard("variance", dtype, "severe", risk, "square and average in float32", terms.number)
    if (found := _stagnation("mean", op, terms, dtype, context)) is not None or terms.number < _FEW:
        return found
    return Hazard("mean", dtype, "note", f"mean over {terms} terms, rounded to {bits(dtype)} bits", length=terms.number)


def _stagnation(name: str, op: Any, terms: Terms, dtype: str, context: Context) -> Hazard | None:
    """Tells of float16 sums that stop where a term is below half the spacing of the sum.

    TensorFlow's CPU kernel adds up in float16 over axes other than the last, in four partial sums where the last is 8
    long or longer.
    """
    if dtype != "float16" or terms.inner or not context.on_cpu:
        return None
    most = 2048 if (op.inputs[0].shape[-1] or 8) < 8 else 8192
    if terms.number <= most:
        return None
    risk = f"{name} over {terms} terms, added up in float16 on CPUs: stops growing at {most:,} times a term"
    return Hazard(name, dtype, "severe" if terms.number > 2 * most else "warning", risk, length=terms.number)


def _cumulative(op: Any, dtype: str, context: Context) -> Hazard | None:
    axis, shape = origins.value(op.inputs[1]), op.inputs[0].shape
    length = shape[int(axis)] if axis is not None and shape.rank else None
    terms = origins.terms_of([length], False)
    if terms.exact and terms.number < _FEW:
        return None
    most = 2 / FORMATS[dtype].epsilon
    if op.type == "Cumprod":
        risk = f"product of {terms} numbers: overflows if they are above {FORMATS[dtype].max ** (1 / terms.number):.3g}"
        return Hazard(
            "cumulative product", dtype, "severe" if dtype == "float16" else "note", risk, length=terms.number
        )
    over = dtype == "float16" and not _never_overflows(terms, context.bounds(op.inputs[0]).magnitude, dtype)
    overflow = f" and overflows above a mean of {number(FORMATS[dtype].max / terms.number)}" if over else ""
    severity: Severity = "severe" if terms.number > most or not terms.exact else "warning" if over else "note"
    risk = f"running sum of {terms} terms: stops growing at {most:,.0f} times a term{overflow}"
    return Hazard("cumulative sum", dtype, severity, risk, length=terms.number)


def _product(op: Any, dtype: str, _context: Context) -> Hazard | None:
    terms = origins.terms(op)
    if terms is None or (terms.exact and terms.number <= 4):
        return None
    limit = FORMATS[dtype].max ** (1 / terms.number)
    risk = f"product of {terms} numbers: overflows if they are above {limit:.3g}, vanishes if they are small"
    return Hazard("product", dtype, "severe" if dtype == "float16" else "note", risk, "sum logarithms", terms.number)


def _l2_loss(op: Any, dtype: str, _context: Context) -> Hazard | None:
    shape = op.inputs[0].shape
    return _norm(origins.terms_of(list(shape) if shape.rank is not None else [None], True), dtype)


def _euclidean_norm(op: Any, dtype: str, _context: Context) -> Hazard | None:
    terms = origins.terms(op)
    return None if terms is None else _norm(terms, dtype)


def _pool(op: Any, dtype: str, context: Context) -> Hazard | None:
    window = math.prod(op.get_attr("ksize"))
    if dtype != "float16" or window <= 1024 or not context.on_cpu:
        return None
    risk = f"average of {window:,} values, added up in float16 on CPUs: far off above some 2,000 values"
    return Hazard("average pooling", dtype, "severe" if window > 2048 else "warning", risk, length=window)


def _scattered_sum(_op: Any, dtype: str, _context: Context) -> Hazard | None:
    most = 2 / FORMATS[dtype].epsilon
    risk = f"sum of as many terms as have the same index: stops growing at {most:,.0f} times a term"
    return Hazard("scattered sum", dtype, "warning", risk)


def _sum_of_gradients(op: Any, dtype: str, context: Context) -> Hazard | None:
    terms = origins.terms(op)
    if terms is None or (found := _stagnation("gradient", op, terms, dtype, context)) is None:
        return None
    return Hazard("sum of gradients", dtype, "warning", found.risk, length=terms.number)


def _bias_gradient(op: Any, dtype: str, context: Context) -> Hazard | None:
    shape = op.inputs[0].shape
    if dtype != "bfloat16" or not context.on_cpu or shape.rank is None:
        return None
    terms = origins.terms_of(list(shape)[:-1], False)
    if terms.number <= 256:
        return None
    risk = f"bias gradient over {terms} terms, added up in bfloat16 on CPUs: stops growing at 256 times a term"
    advice = "leave the bias out before a normalization, or add it in a layer with dtype float32"
    return Hazard("bias gradient", dtype, "warning", risk, advice, terms.number)


RULES: dict[str, Rule] = {
    "Sum": _sum,
    "Mean": _mean,
    "Prod": _product,
    "Cumsum": _cumulative,
    "Cumprod": _cumulative,
    "L2Loss": _l2_loss,
    "EuclideanNorm": _euclidean_norm,
    **dict.fromkeys(("AvgPool", "AvgPool3D"), _pool),
    **dict.fromkeys(_SCATTERED, _scattered_sum),
}
BACKWARD: dict[str, Rule] = {"Sum": _sum_of_gradients, "BiasAddGrad": _bias_gradient}
