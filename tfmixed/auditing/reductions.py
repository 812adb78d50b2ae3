"""Rules for operations that combine many values: sums, means, products, norms and pooling.

The thresholds describe the CPU kernels of TensorFlow 2.21, as measured. They accumulate in float16: sums and means of
float16 over axes other than the last, pooling windows and running sums. They accumulate in bfloat16: running sums.
Matrix products and convolutions accumulate in float32.
"""

from __future__ import annotations

import math
from typing import Any

from tfmixed.auditing.graph import Terms, constant_value, is_square, terms
from tfmixed.auditing.hazards import Context, Hazard, Rule, Severity, short_number, significant_bits
from tfmixed.formats import FORMATS

_FEW_TERMS = 32  # fewer are not reported
_SEGMENTS = ("SegmentSum", "SegmentSumV2", "SegmentMean", "UnsortedSegmentSum")


def _sum(op: Any, dtype: str, context: Context) -> Hazard | None:
    summed = terms(op)
    if summed is None:
        return Hazard("sum", dtype, "warning", "sum over axes that are not constant: may overflow above 65,504")
    if not _may_overflow(summed, op, dtype, context):
        return stagnation("sum", op, summed, dtype, context)
    if is_square(op.inputs[0]):
        return _norm(summed, dtype)
    if summed.exact and summed.number < _FEW_TERMS:
        return None
    if dtype == "bfloat16":
        return Hazard("sum", dtype, "note", f"sum over {summed} terms, rounded to 8 bits", length=summed.number)
    limit = FORMATS[dtype].max / summed.number
    severity: Severity = "severe" if limit < 16 else "warning" if limit < 256 or not summed.exact else "note"
    risk = f"sum over {summed} terms: overflows above a mean of {short_number(limit)}"
    return Hazard("sum", dtype, severity, risk, length=summed.number)


def _may_overflow(summed: Terms, op: Any, dtype: str, context: Context) -> bool:
    return not summed.exact or summed.number * context.bounds(op.inputs[0]).magnitude > FORMATS[dtype].max


def _norm(summed: Terms, dtype: str) -> Hazard | None:
    if dtype == "bfloat16":
        risk = f"sum of {summed} squares, rounded to 8 bits"
        return Hazard("norm", dtype, "note", risk, length=summed.number) if summed.number >= _FEW_TERMS else None
    limit = math.sqrt(FORMATS[dtype].max / summed.number)
    risk = f"sum of {summed} squares: overflows above a root mean square of {short_number(limit)}, "
    risk += "squares below 2e-4 vanish"
    return Hazard("norm", dtype, "severe" if limit < 64 else "warning", risk, length=summed.number)


def _mean(op: Any, dtype: str, context: Context) -> Hazard | None:
    averaged = terms(op)
    if averaged is None:
        return None
    overflows = context.bounds(op.inputs[0]).high > FORMATS[dtype].max
    if dtype == "float16" and overflows and is_square(op.inputs[0]):
        risk = f"mean of {averaged} squares: squares of numbers above 256 overflow, of those below 2e-4 vanish"
        return Hazard("variance", dtype, "severe", risk, "square and average in float32", averaged.number)
    found = stagnation("mean", op, averaged, dtype, context)
    if found is not None or averaged.number < _FEW_TERMS:
        return found
    risk = f"mean over {averaged} terms, rounded to {significant_bits(dtype)} bits"
    return Hazard("mean", dtype, "note", risk, length=averaged.number)


def stagnation(name: str, op: Any, summed: Terms, dtype: str, context: Context) -> Hazard | None:
    """Returns the hazard of a float16 sum that stops growing once a term is below half the spacing of the sum.

    TensorFlow's CPU kernel accumulates in float16 over axes other than the last. It keeps four partial sums if the last
    axis has a length of at least 8.
    """
    if dtype != "float16" or summed.inner or not context.on_cpu:
        return None
    most = 2048 if (op.inputs[0].shape[-1] or 8) < 8 else 8192
    if summed.number <= most:
        return None
    risk = stagnant(f"{name} over {summed} terms", summed, dtype, most)
    return Hazard(name, dtype, "severe" if summed.number > 2 * most else "warning", risk, length=summed.number)


def _cumulative(op: Any, dtype: str, context: Context) -> Hazard | None:
    summed = running_terms(op)
    if summed.exact and summed.number < _FEW_TERMS:
        return None
    if op.type == "Cumprod":
        return _product_of("cumulative product", summed, dtype, "compute it in float32")
    most, risk = accumulator_limit(dtype), ""
    if dtype == "float16" and _may_overflow(summed, op, dtype, context):
        risk = f" and overflows above a mean of {short_number(FORMATS[dtype].max / summed.number)}"
    severity: Severity = "severe" if summed.number > most or not summed.exact else "warning" if risk else "note"
    risk = f"{stagnant(f'running sum of {summed} terms', summed, dtype, most)}{risk}"
    return Hazard("cumulative sum", dtype, severity, risk, length=summed.number)


def running_terms(op: Any) -> Terms:
    """Returns the terms of the last value of a running sum or product."""
    axis, shape = constant_value(op.inputs[1]), op.inputs[0].shape
    return Terms.of([shape[int(axis)] if axis is not None and shape.rank else None], False)


def _product(op: Any, dtype: str, _: Context) -> Hazard | None:
    multiplied = terms(op)
    if multiplied is None or (multiplied.exact and multiplied.number <= 4):
        return None
    return _product_of("product", multiplied, dtype, "sum logarithms")


def _product_of(name: str, multiplied: Terms, dtype: str, advice: str) -> Hazard:
    limit = FORMATS[dtype].max ** (1 / multiplied.number)
    risk = f"product of {multiplied} numbers: overflows if they are above {limit:.3g}, vanishes if they are small"
    severity: Severity = "severe" if dtype == "float16" else "note"
    return Hazard(name, dtype, severity, risk, advice, multiplied.number)


def _l2_loss(op: Any, dtype: str, _: Context) -> Hazard | None:
    shape = op.inputs[0].shape
    return _norm(Terms.of(list(shape) if shape.rank is not None else [None], True), dtype)


def _euclidean_norm(op: Any, dtype: str, _: Context) -> Hazard | None:
    summed = terms(op)
    return None if summed is None else _norm(summed, dtype)


def _average_pooling(op: Any, dtype: str, context: Context) -> Hazard | None:
    window = math.prod(op.get_attr("ksize"))
    if dtype != "float16" or window <= 1024 or not context.on_cpu:
        return None
    risk = f"average of {window:,} values, added up in float16 on CPUs: inaccurate above about 2,000 values"
    return Hazard("average pooling", dtype, "severe" if window > 2048 else "warning", risk, length=window)


def _scattered_sum(op: Any, dtype: str, _: Context) -> Hazard | None:
    summed, most = scattered_terms(op), accumulator_limit(dtype)
    if summed.exact and summed.number <= most:
        return None
    risk = stagnant(f"sum of all terms with the same index, out of {summed}", summed, dtype, most)
    return Hazard("scattered sum", dtype, "warning", risk, "cast the terms to float32 before the sum", summed.number)


def scattered_terms(op: Any) -> Terms:
    """Returns the terms of a sum over equal indices, if all are equal."""
    indices = op.inputs[0 if op.type in ("ScatterNd", "SparseTensorDenseMatMul") else 1].shape
    if indices.rank is None:
        return Terms(1, False, False)
    return Terms.of(list(indices if op.type in _SEGMENTS else indices[:-1]), False)


def accumulator_limit(dtype: str) -> int:
    """Returns the number of equal terms after which a sum in this dtype stops growing."""
    return round(2 / FORMATS[dtype].epsilon)


def stagnant(name: str, summed: Terms, dtype: str, most: int) -> str:
    """Returns the risk of a sum that ignores terms below half the spacing of its accumulator, with the largest error.

    Args:
        name: Name of the sum.
        summed: The terms.
        dtype: Dtype of the accumulator.
        most: Number of equal terms after which it stops growing.
    """
    lost = 1 - most / summed.number
    error = f": up to {100 * lost:.3g}%{'' if summed.exact else ' or more'} too small" if lost > 0 else ""
    return f"{name}, added up in {dtype}, stops growing at {most:,} times a term{error}"


FORWARD: dict[str, Rule] = {
    **dict.fromkeys(("Cumsum", "Cumprod", "CumulativeLogsumexp"), _cumulative),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), _average_pooling),
    **dict.fromkeys((*_SEGMENTS, "ScatterNd", "TensorScatterAdd", "SparseTensorDenseMatMul"), _scattered_sum),
    "Sum": _sum,
    "Mean": _mean,
    "Prod": _product,
    "L2Loss": _l2_loss,
    "EuclideanNorm": _euclidean_norm,
}
