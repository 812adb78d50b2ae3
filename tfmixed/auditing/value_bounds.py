"""Bounds of the values of tensors in a TensorFlow graph, by interval arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tfmixed.auditing.graph import (
    DATA_MOVEMENT,
    constant_value,
    data_input,
    is_same,
    is_square,
    producer,
    producers,
    reduced_axes,
    terms,
)

_MAX_DEPTH = 60


class Interval(NamedTuple):
    """Bounds that no value of a tensor exceeds."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The largest possible absolute value."""
        return max(abs(self.low), abs(self.high))


_UNKNOWN = Interval(-math.inf, math.inf)
_NON_NEGATIVE = Interval(0.0, math.inf)
_OUTPUT_RANGES = {
    **dict.fromkeys(("Relu", "Softplus", "Abs", "Rsqrt"), _NON_NEGATIVE),
    **dict.fromkeys(("Sigmoid", "Softmax", "RandomUniform", "OneHot"), Interval(0.0, 1.0)),
    **dict.fromkeys(("Tanh", "Erf", "Sin", "Cos"), Interval(-1.0, 1.0)),
    "Relu6": Interval(0.0, 6.0),
    "Elu": Interval(-1.0, math.inf),
    "LogSoftmax": Interval(-math.inf, 0.0),
}
# These stay within the bounds of their first input.
_AVERAGES = frozenset(["Mean", "Max", "Min", "MaxPool", "AvgPool", "AvgPool3D", "MaxPool3D", "ResizeBilinear"])


class ValueBounds:
    """Computes bounds of a tensor's values from the operations that produce it; infinite if unknown.

    Rounding and NaN are ignored. Results are cached.
    """

    def __init__(self) -> None:
        self._cache: dict[int, Interval] = {}
        self._depth = 0

    def set(self, tensor: Any, low: float, high: float) -> None:
        """Sets bounds that are known from data."""
        self._cache[id(tensor.op)] = Interval(low, high)

    def __call__(self, tensor: Any) -> Interval:
        """Returns the bounds of a tensor."""
        op = tensor.op
        if id(op) not in self._cache:
            if self._depth == _MAX_DEPTH:
                return _UNKNOWN
            self._depth += 1
            found = self._compute(op)
            self._depth -= 1
            self._cache[id(op)] = _UNKNOWN if any(map(math.isnan, found)) else Interval(*found)
        return self._cache[id(op)]

    def _compute(self, op: Any) -> tuple[float, float]:
        if op.type in _OUTPUT_RANGES:
            return _OUTPUT_RANGES[op.type]
        if op.type == "Cast" and op.inputs[0].dtype.name == "bool":
            return 0.0, 1.0
        if op.type in DATA_MOVEMENT:
            return self(data_input(op))
        if op.type in _AVERAGES:
            return self(op.inputs[0])
        if op.type in _OF_INPUTS:
            return _OF_INPUTS[op.type](*map(self, op.inputs))
        return _OF_OPERATION[op.type](op, self) if op.type in _OF_OPERATION else _UNKNOWN


def _hull(*intervals: Interval) -> tuple[float, float]:
    return min(interval.low for interval in intervals), max(interval.high for interval in intervals)


def _quotient(top: Interval, bottom: Interval) -> tuple[float, float]:
    if bottom.low <= 0:
        return _NON_NEGATIVE if top.low >= 0 and bottom.low == 0 else _UNKNOWN
    quotients = [a / b for a in top for b in bottom if not (math.isinf(a) and math.isinf(b))]
    return min(quotients), max(quotients)


def _exp(x: Interval) -> tuple[float, float]:
    return math.exp(min(x.low, 700.0)), math.exp(x.high) if x.high < 700 else math.inf


def _constant(op: Any, _: ValueBounds) -> tuple[float, float]:
    array = constant_value(op.outputs[0])
    return _UNKNOWN if array is None or array.size == 0 else (float(array.min()), float(array.max()))


def _difference(op: Any, bounds: ValueBounds) -> tuple[float, float]:
    if _is_maximum_of(op.inputs[1], op.inputs[0]):
        return -math.inf, 0.0
    first, second = map(bounds, op.inputs)
    return first.low - second.high, first.high - second.low


def _is_maximum_of(maximum: Any, tensor: Any, axes: set[int] | None = None) -> bool:
    # `tf.reduce_logsumexp` replaces infinite maxima by a Select.
    return any(
        op.type == "Max" and is_same(op.inputs[0], tensor) and axes in (None, reduced_axes(op))
        for op in producers(maximum, frozenset(["SelectV2", "Select", "Maximum"]), 4)
    )


def _square(op: Any, bounds: ValueBounds) -> tuple[float, float]:
    root = Interval(*_difference(op, bounds)) if op.type == "SquaredDifference" else bounds(op.inputs[0])
    return 0.0, root.magnitude * root.magnitude


def _product(op: Any, bounds: ValueBounds) -> tuple[float, float]:
    if is_square(op.outputs[0]):
        return _square(op, bounds)
    first, second = map(bounds, op.inputs)
    products = [a * b if a and b else 0.0 for a in first for b in second]  # values are finite: 0 x inf is 0
    return min(products), max(products)


def _sum(op: Any, bounds: ValueBounds) -> tuple[float, float]:
    (low, high), found = bounds(op.inputs[0]), terms(op)
    if found is not None and found.exact:
        low, high = low * found.number, high * found.number
    else:
        low, high = 0.0 if low >= 0 else -math.inf, 0.0 if high <= 0 else math.inf
    return 1.0 if _includes_exp_of_0(op) else low, high


def _includes_exp_of_0(op: Any) -> bool:
    """Returns whether one term of a sum is `exp(x - max(x))` at the maximum of x."""
    exp = producer(op.inputs[0])
    difference = producer(exp.inputs[0]) if exp.type == "Exp" else exp
    return difference.type == "Sub" and _is_maximum_of(difference.inputs[1], difference.inputs[0], reduced_axes(op))


def _arg_max(op: Any, _: ValueBounds) -> tuple[float, float]:
    sizes = [op.inputs[0].shape[axis] for axis in reduced_axes(op) or ()]
    return 0.0, float(max(sizes)) if sizes and None not in sizes else math.inf


_OF_INPUTS: dict[str, Callable[..., tuple[float, float]]] = {
    **dict.fromkeys(("Add", "AddV2", "BiasAdd"), lambda x, y: (x.low + y.low, x.high + y.high)),
    **dict.fromkeys(("SelectV2", "Select"), lambda _, x, y: _hull(x, y)),
    "Neg": lambda x: (-x.high, -x.low),
    "Sqrt": lambda x: (math.sqrt(max(x.low, 0.0)), math.sqrt(max(x.high, 0.0))),
    "RealDiv": _quotient,
    "Maximum": lambda x, y: (max(x.low, y.low), max(x.high, y.high)),
    "Minimum": lambda x, y: (min(x.low, y.low), min(x.high, y.high)),
    "ClipByValue": lambda _, low, high: (low.low, high.high),
    "Exp": _exp,
    "ConcatV2": lambda *parts: _hull(*parts[:-1]),
    "Pack": _hull,
    "Pad": lambda x, _: _hull(x, Interval(0.0, 0.0)),
    "Range": lambda start, limit, _: _hull(start, limit),
    "FloorMod": lambda _, y: (0.0, y.high) if y.low > 0 else _UNKNOWN,
}
_OF_OPERATION: dict[str, Callable[[Any, ValueBounds], tuple[float, float]]] = {
    **dict.fromkeys(("Square", "SquaredDifference"), _square),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg_max),
    "Const": _constant,
    "Sub": _difference,
    "Mul": _product,
    "Sum": _sum,
}
