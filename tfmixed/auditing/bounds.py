"""What is certain about the size of the values of a tensor in a TensorFlow graph, by interval arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tfmixed.auditing.origins import MOVES, axes, is_same, is_square, source, sources, terms, value

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

    def learn(self, tensor: Any, low: float, high: float) -> None:
        """Takes note of bounds that are known from elsewhere."""
        self._known[id(tensor.op)] = Interval(low, high)

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


def _square(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = _sub(op, of) if op.type == "SquaredDifference" else of(op.inputs[0])
    return 0.0, max(abs(low), abs(high)) ** 2


def _sqrt(op: Any, of: Bounds) -> tuple[float, float]:
    low, high = of(op.inputs[0])
    return math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))


def _is_maximum_of(maximum: Any, tensor: Any, over: set[int] | None = None) -> bool:
    # Through a Select too: `tf.reduce_logsumexp` replaces infinite maxima.
    for op in sources(maximum, frozenset(["SelectV2", "Select", "Maximum"]), 4):
        if op.type == "Max" and is_same(op.inputs[0], tensor) and over in (None, axes(op)):
            return True
    return False


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
    return 1.0 if _has_exp_of_0(op) else least, most


def _has_exp_of_0(op: Any) -> bool:
    """Tells whether a sum has the exponential of the difference of a maximum to itself among its terms."""
    made = source(op.inputs[0])
    inner = source(made.inputs[0]) if made.type == "Exp" else made
    return inner.type == "Sub" and _is_maximum_of(inner.inputs[1], inner.inputs[0], axes(op))


def _range(op: Any, of: Bounds) -> tuple[float, float]:
    start, limit, _ = map(of, op.inputs)
    return min(start.low, limit.low), max(start.high, limit.high)


def _arg_max(op: Any, _of: Bounds) -> tuple[float, float]:
    sizes = [op.inputs[0].shape[axis] for axis in axes(op) or ()]
    return 0.0, float(max(sizes)) if sizes and None not in sizes else math.inf


def _floor_mod(op: Any, of: Bounds) -> tuple[float, float]:
    by = of(op.inputs[1])
    return (0.0, by.high) if by.low > 0 else _UNKNOWN


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
    "Square": _square,
    "Sqrt": _sqrt,
    "SquaredDifference": _square,
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
    "Range": _range,
    "ArgMax": _arg_max,
    "ArgMin": _arg_max,
    "FloorMod": _floor_mod,
}
