"""What is certain about the values of a tensor in a TensorFlow graph: intervals, sources and numbers of terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy

# What hands its first input on, value by value, perhaps in another shape, order or format.
MOVES = frozenset(
    {
        *("Identity", "Cast", "Reshape", "Squeeze", "ExpandDims", "Transpose", "StopGradient", "PreventGradient"),
        *("BroadcastTo", "Tile", "StridedSlice", "Slice", "GatherV2", "GatherNd", "ReverseV2", "Split", "SplitV"),
        *("CheckNumerics", "EnsureShape", "Unpack"),
    }
)
_KNOWN = {
    "Relu": (0.0, math.inf),
    "Relu6": (0.0, 6.0),
    "Softplus": (0.0, math.inf),
    "Elu": (-1.0, math.inf),
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "LogSoftmax": (-math.inf, 0.0),
    "Tanh": (-1.0, 1.0),
    "Erf": (-1.0, 1.0),
    "Sin": (-1.0, 1.0),
    "Cos": (-1.0, 1.0),
    "Abs": (0.0, math.inf),
    "Square": (0.0, math.inf),
    "SquaredDifference": (0.0, math.inf),
    "Sqrt": (0.0, math.inf),
    "Rsqrt": (0.0, math.inf),
    "RandomUniform": (0.0, 1.0),
    "OneHot": (0.0, 1.0),
}
_MEANS = frozenset(["Mean", "Max", "Min", "MaxPool", "AvgPool", "AvgPool3D", "MaxPool3D", "ResizeBilinear"])
_DEPTH = 60


class Interval(NamedTuple):
    """Bounds that no value of a tensor exceeds."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The largest absolute value that is possible."""
        return max(abs(self.low), abs(self.high))


_UNKNOWN = Interval(-math.inf, math.inf)


class Bounds:
    """Finds bounds of a tensor's values, by interval arithmetic on the operations that make it; infinite if unknown.

    Rounding and NaN are left out of account. What was found once is remembered.
    """

    def __init__(self) -> None:
        self._known: dict[int, Interval] = {}
        self._depth = 0

    def __call__(self, tensor: Any) -> Interval:
        """Returns the interval of one tensor."""
        if id(tensor.op) not in self._known:
            if self._depth == _DEPTH:
                return _UNKNOWN
            self._depth += 1
            found = self._find(tensor.op)
            self._depth -= 1
            self._known[id(tensor.op)] = _UNKNOWN if any(map(math.isnan, found)) else Interval(*found)
        return self._known[id(tensor.op)]

    def _find(self, op: Any) -> tuple[float, float]:
        if op.type in _KNOWN:
            return _KNOWN[op.type]
        if op.type == "Cast" and op.inputs[0].dtype.name == "bool":
            return 0.0, 1.0
        if op.type in _RULES:
            return _RULES[op.type](op, self)
        return self(op.inputs[0]) if op.type in MOVES or op.type in _MEANS else _UNKNOWN


def value(tensor: Any) -> Any:
    """Returns a constant's value as a float32 or integer array; None for what is none. Looks through moves."""
    while tensor.op.type in MOVES and tensor.op.type not in ("GatherV2", "GatherNd"):
        tensor = tensor.op.inputs[0]
    if tensor.op.type != "Const":
        return None
    import tensorflow as tf

    array = tf.make_ndarray(tensor.op.get_attr("value"))
    return array if array.dtype.kind in "iub" else array.astype("float32") if array.dtype.kind in "fV" else None


def source(tensor: Any) -> Any:
    """Returns the operation that made the values of a tensor, through all that only moved them."""
    while tensor.op.type in MOVES:
        tensor = tensor.op.inputs[0]
    return tensor.op


def sources(tensor: Any, through: frozenset[str], depth: int = _DEPTH) -> Iterator[Any]:
    """Yields the operations that a tensor comes from through moves and operations of the types `through`."""
    op = source(tensor)
    yield op
    if op.type in through and depth:
        for each in op.inputs:
            yield from sources(each, through, depth - 1)


class Terms(NamedTuple):
    """How many values a reduction adds up.

    Args:
        number: The product of the lengths that are known.
        exact: Are all of them known?
        inner: Is the last axis, whose values lie side by side, among them?
    """

    number: int
    exact: bool
    inner: bool

    def __str__(self) -> str:
        return f"{self.number:,}" if self.exact else f"{self.number:,} x an unknown number of"


def terms(op: Any) -> Terms | None:
    """Returns the terms of a reduction over the axes that its second input names; None if they are not constant."""
    axes, shape = value(op.inputs[1]), op.inputs[0].shape
    if axes is None or shape.rank is None:
        return None
    reduced = {int(axis) % shape.rank for axis in numpy.atleast_1d(axes)} if shape.rank else set()
    return terms_of([shape[axis] for axis in reduced], shape.rank - 1 in reduced)


def terms_of(sizes: list[int | None], inner: bool) -> Terms:
    """Returns the terms of a sum over axes of these lengths."""
    return Terms(math.prod(size for size in sizes if size is not None), None not in sizes, inner)


def is_square(tensor: Any) -> bool:
    """Tells whether every value of the tensor is the square of something."""
    op = source(tensor)
    if op.type == "Mul":
        return source(op.inputs[0]) is source(op.inputs[1])
    return op.type in ("Square", "SquaredDifference") or (op.type == "Pow" and exponent(op) == 2)


def exponent(op: Any) -> float | None:
    """Returns the exponent of a `Pow`, if it is one constant."""
    array = value(op.inputs[1])
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _const(op: Any, _of: Bounds) -> tuple[float, float]:
    array = value(op.outputs[0])
    return _UNKNOWN if array is None or array.size == 0 else (float(array.min()), float(array.max()))


def _neg(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = of(op.inputs[0])
    return -high, -low


def _add(op: Any, of: Bounds) -> tuple[float, float]:
    first, second = map(of, op.inputs[:2])
    return first.low + second.low, first.high + second.high


def _sub(op: Any, of: Bounds) -> tuple[float, float]:
    if _is_maximum_of(op.inputs[1], op.inputs[0]):
        return -math.inf, 0.0
    first, second = map(of, op.inputs[:2])
    return first.low - second.high, first.high - second.low


def _is_maximum_of(maximum: Any, tensor: Any) -> bool:
    # Through a Select too: `tf.reduce_logsumexp` replaces infinite maxima.
    found = [op for op in sources(maximum, frozenset(["SelectV2", "Select", "Maximum"]), 4) if op.type == "Max"]
    return any(source(op.inputs[0]) is source(tensor) for op in found)


def _mul(op: Any, of: Bounds) -> tuple[float, float]:
    first, second = map(of, op.inputs[:2])
    if is_square(op.outputs[0]):
        return 0.0, first.magnitude**2
    products = [a * b if a and b else 0.0 for a in first for b in second]  # 0 x inf is 0: bounds are not values
    return min(products), max(products)


def _div(op: Any, of: Bounds) -> tuple[float, float]:
    top, bottom = map(of, op.inputs[:2])
    if bottom.low <= 0:
        return (0.0, math.inf) if top.low >= 0 and bottom.low == 0 else _UNKNOWN
    quotients = [a / b for a in top for b in bottom if not (math.isinf(a) and math.isinf(b))]
    return min(quotients), max(quotients)


def _maximum(op: Any, of: Bounds) -> tuple[float, float]:
    first, second = map(of, op.inputs[:2])
    return max(first.low, second.low), max(first.high, second.high)


def _minimum(op: Any, of: Bounds) -> tuple[float, float]:
    first, second = map(of, op.inputs[:2])
    return min(first.low, second.low), min(first.high, second.high)


def _clip(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = map(of, op.inputs[1:3])
    return low.low, high.high


def _exp(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = of(op.inputs[0])
    return math.exp(min(low, 700.0)), math.exp(high) if high < 700 else math.inf


def _sum(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = of(op.inputs[0])
    found = terms(op)
    known = found is not None and found.exact
    least = low * found.number if found and known else 0.0 if low >= 0 else -math.inf
    most = high * found.number if found and known else 0.0 if high <= 0 else math.inf
    made = source(op.inputs[0])
    if (
        made.type == "Exp"
        and (inner := source(made.inputs[0])).type == "Sub"
        and _is_maximum_of(*reversed(inner.inputs))
    ):
        least = 1.0  # one of the terms is exp(0)
    return least, most


def _any(inputs: slice) -> _Rule:
    """What comes out is one of these inputs."""

    def rule(op: Any, of: Bounds) -> tuple[float, float]:
        found = [of(each) for each in op.inputs[inputs]]
        return min(each.low for each in found), max(each.high for each in found)

    return rule


def _padded(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = of(op.inputs[0])
    return min(low, 0.0), max(high, 0.0)


_Rule = Callable[[Any, Bounds], tuple[float, float]]
_RULES: dict[str, _Rule] = {
    "Const": _const,
    "Neg": _neg,
    "Add": _add,
    "AddV2": _add,
    "BiasAdd": _add,
    "Sub": _sub,
    "Mul": _mul,
    "RealDiv": _div,
    "Maximum": _maximum,
    "Minimum": _minimum,
    "ClipByValue": _clip,
    "Exp": _exp,
    "Sum": _sum,
    "SelectV2": _any(slice(1, None)),
    "Select": _any(slice(1, None)),
    "ConcatV2": _any(slice(None, -1)),
    "Pack": _any(slice(None)),
    "Pad": _padded,
}
