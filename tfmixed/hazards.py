"""What can go wrong in one operation that runs in half precision, in a sentence with the number that matters.

The thresholds below say how the kernels of TensorFlow 2.21 behave on CPUs, as measured: float16 sums and averages over
axes other than the last add up in float16, and so do pooling windows and running sums; bfloat16 sums add up in float32,
but not running sums and the gradients of biases. Matrix products and convolutions add up in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tfmixed import bounds
from tfmixed.bounds import Bounds, Terms
from tfmixed.formats import FORMATS
from tfmixed.tracing import Node, Trace

Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")
HALF = ("float16", "bfloat16")

_FEW = 32  # terms that no reduction of them is worth a word
_LOSSES = ("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
# Between a probability and its logarithm.
_ON_THE_WAY = frozenset(["Maximum", "Minimum", "ClipByValue", "RealDiv", "Mul", "AddV2", "Sum", "Sub", "ConcatV2"])
# What bounds whatever comes into it: an infinity before it does no harm.
_SATURATING = frozenset(["Tanh", "Sigmoid", "Erf", "Relu6"])
_IN_FLOAT32 = "compute it in float32"


@dataclass(frozen=True)
class Hazard:
    """What is unsafe about one operation.

    Args:
        op: What it does, in the field's words: `"sum"`, `"softmax"`, ...
        dtype: The half-precision format.
        severity: `"severe"`: wrong for values that are usual. `"warning"`: wrong for values that occur. `"note"`: less
            precise, or slower.
        risk: What goes wrong, and from which number on.
        advice: What to do.
        length: Terms of a reduction, as far as they are known.
    """

    op: str
    dtype: str
    severity: Severity
    risk: str
    advice: str = _IN_FLOAT32
    length: int | None = None


class Context:
    """What the rules ask about a trace: bounds of values, and who uses them."""

    def __init__(self, trace: Trace, on_cpu: bool = True) -> None:
        self.bounds = Bounds()
        self.on_cpu = on_cpu
        self.outputs = {id(tensor.op) for tensor in trace.outputs}
        self._users: dict[int, list[Any]] = defaultdict(list)
        for node in trace.nodes:
            for tensor in node.op.inputs:
                if not node.backward:
                    self._users[id(tensor.op)].append(node.op)

    def users(self, op: Any, through: frozenset[str] = frozenset()) -> Iterator[Any]:
        """Yields the forward operations that use the values of `op`, moved or passed through those of these types."""
        seen, rest = set(), list(self._users[id(op)])
        while rest:
            user = rest.pop()
            if id(user) not in seen:
                seen.add(id(user))
                yield user
                if user.type in bounds.MOVES or user.type in through:
                    rest += self._users[id(user)]

    def is_output(self, op: Any) -> bool:
        """Tells whether what `op` makes is an output of the model, moved or cast at most."""
        return id(op) in self.outputs or any(
            id(user) in self.outputs for user in self.users(op) if user.type in bounds.MOVES
        )


def find(node: Node, context: Context) -> Hazard | None:
    """Returns what is unsafe about an operation in float16 or bfloat16; None if nothing is."""
    rule = (_BACKWARD if node.backward else _FORWARD).get(node.op.type)
    if rule is None:
        return None
    tensors = node.op.outputs if node.op.type == "Cast" else node.op.inputs
    dtype = next((each.dtype.name for each in tensors if each.dtype.is_floating), "")
    return rule(node.op, dtype, context) if dtype in HALF or rule is _log else None


def _sum(op: Any, dtype: str, context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    if terms is None:
        return Hazard("sum", dtype, "warning", "sum over axes that are not constant: may overflow above 65,504")
    if bounds.is_square(op.inputs[0]):
        return _norm(terms, dtype)
    magnitude = context.bounds(op.inputs[0]).magnitude
    if (terms.exact and terms.number < _FEW) or _never_overflows(terms, magnitude, dtype):
        return _stagnation("sum", terms, dtype)
    if dtype == "bfloat16":
        return Hazard("sum", dtype, "note", f"sum over {terms} terms, rounded to 8 bits", length=terms.number)
    limit = FORMATS[dtype].max / terms.number
    severity: Severity = "severe" if limit < 16 else "warning" if limit < 256 or not terms.exact else "note"
    risk = f"sum over {terms} terms: overflows above a mean of {_number(limit)}"
    return Hazard("sum", dtype, severity, risk, length=terms.number)


def _never_overflows(terms: Terms, magnitude: float, dtype: str) -> bool:
    return terms.exact and terms.number * magnitude <= FORMATS[dtype].max


def _norm(terms: Terms, dtype: str) -> Hazard | None:
    if dtype == "bfloat16":
        risk = f"sum of {terms} squares, rounded to 8 bits"
        return Hazard("norm", dtype, "note", risk, length=terms.number) if terms.number >= _FEW else None
    limit = math.sqrt(FORMATS[dtype].max / terms.number)
    severity: Severity = "severe" if limit < 64 else "warning"
    risk = f"sum of {terms} squares: overflows above a root mean square of {_number(limit)}, squares below 2e-4 vanish"
    return Hazard("norm", dtype, severity, risk, length=terms.number)


def _mean(op: Any, dtype: str, _context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    if terms is None:
        return None
    if bounds.is_square(op.inputs[0]) and dtype == "float16":
        risk = f"mean of {terms} squares: squares of numbers above 256 overflow, of those below 2e-4 vanish"
        return Hazard("variance", dtype, "severe", risk, "square and average in float32", terms.number)
    return _stagnation("mean", terms, dtype) or (
        Hazard("mean", dtype, "note", f"mean over {terms} terms, rounded to {_bits(dtype)} bits", length=terms.number)
        if terms.number >= _FEW
        else None
    )


def _stagnation(name: str, terms: Terms, dtype: str) -> Hazard | None:
    """A float16 sum stops where a term is below half the spacing of the sum: at 2,048 times a term."""
    if dtype != "float16" or terms.inner or terms.number <= 2048:
        return None
    risk = f"{name} over {terms} terms, added up in float16: stops growing at 2,048 times a term"
    return Hazard(name, dtype, "severe" if terms.number > 8192 else "warning", risk, length=terms.number)


def _cumulative(op: Any, dtype: str, context: Context) -> Hazard | None:
    axis, shape = bounds.value(op.inputs[1]), op.inputs[0].shape
    length = shape[int(axis)] if axis is not None and shape.rank else None
    terms = bounds.terms_of([length], False)
    if terms.exact and terms.number < _FEW:
        return None
    most = 2 / FORMATS[dtype].epsilon
    if op.type == "Cumprod":
        risk = f"product of {terms} numbers: overflows if they are above {FORMATS[dtype].max ** (1 / terms.number):.3g}"
        return Hazard(
            "cumulative product", dtype, "severe" if dtype == "float16" else "note", risk, length=terms.number
        )
    over = dtype == "float16" and not _never_overflows(terms, context.bounds(op.inputs[0]).magnitude, dtype)
    overflow = f" and overflows above a mean of {_number(FORMATS[dtype].max / terms.number)}" if over else ""
    severity: Severity = "severe" if terms.number > most or not terms.exact else "warning" if over else "note"
    risk = f"running sum of {terms} terms: stops growing at {most:,.0f} times a term{overflow}"
    return Hazard("cumulative sum", dtype, severity, risk, length=terms.number)


def _product(op: Any, dtype: str, _context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    if terms is None or (terms.exact and terms.number <= 4):
        return None
    limit = FORMATS[dtype].max ** (1 / terms.number)
    risk = f"product of {terms} numbers: overflows if they are above {limit:.3g}, vanishes if they are small"
    return Hazard("product", dtype, "severe" if dtype == "float16" else "note", risk, "sum logarithms", terms.number)


def _l2_loss(op: Any, dtype: str, _context: Context) -> Hazard | None:
    shape = op.inputs[0].shape
    return _norm(bounds.terms_of(list(shape) if shape.rank is not None else [None], True), dtype)


def _euclidean_norm(op: Any, dtype: str, _context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    return None if terms is None else _norm(terms, dtype)


def _softmax(op: Any, dtype: str, context: Context) -> Hazard | None:
    classes = op.inputs[0].shape[-1] if op.inputs[0].shape.rank else None
    name = {"Softmax": "softmax", "LogSoftmax": "log-softmax"}[op.type]
    over = f"{name} over {classes:,} values" if classes else f"{name} over an unknown number of values"
    if name == "log-softmax":
        risk = f"{over}: logarithms are rounded to {_bits(dtype)} bits, and gradients with them"
        return Hazard(name, dtype, "warning", risk, length=classes)
    users = context.users(op, _ON_THE_WAY)
    decides = context.is_output(op) or any(user.type == "Log" or user.type in _LOSSES for user in users)
    if dtype == "bfloat16":
        risk = f"{over}: probabilities are rounded to 8 bits"
        return Hazard(name, dtype, "warning" if decides else "note", risk, length=classes)
    risk = f"{over}: probabilities below 6e-8 become 0"
    if decides:
        return Hazard(name, dtype, "severe", f"{risk}, their logarithm -inf", length=classes)
    return Hazard(name, dtype, "warning", risk, length=classes)


def _cross_entropy(op: Any, dtype: str, _context: Context) -> Hazard | None:
    # `tf.nn` computes it in float32 and casts it back.
    if op.type == "Cast" and bounds.source(op.inputs[0]).type not in _LOSSES:
        return None
    risk = f"a cross-entropy rounded to {_bits(dtype)} bits"
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
    if _saturates(op, context):
        return None
    return Hazard(name, dtype, "severe", f"{name} overflows above {limit:.1f}", f"{_IN_FLOAT32}, or subtract a maximum")


def _log(op: Any, dtype: str, context: Context) -> Hazard | None:
    found = list(bounds.sources(op.inputs[0], _ON_THE_WAY))
    made = next((each for each in found if each.type in ("Softmax", "Sigmoid")), None)
    if made is not None:
        return _log_of_probabilities(made)
    if dtype not in HALF or (op.type == "Log1p" and context.bounds(op.inputs[0]).low >= 0):
        return None
    if context.bounds(op.inputs[0]).low >= FORMATS[dtype].smallest_normal:
        return None
    name = op.type.lower()
    if dtype == "bfloat16":
        return Hazard(name, dtype, "note", f"{name} of a bfloat16: near 1 it is off by 0.002")
    risk = f"{name} in float16: what was below 6e-8 has become 0, its logarithm -inf"
    return Hazard(name, dtype, "severe", risk)


def _log_of_probabilities(made: Any) -> Hazard:
    dtype, name = made.outputs[0].dtype.name, made.type.lower()
    advice = f"leave out the {name} and give logits to a loss with from_logits=True"
    risk = f"the logarithm of a {name} in {dtype}: "
    if dtype == "float16":
        return Hazard(f"log of {name}", dtype, "severe", risk + "-inf below a probability of 6e-8", advice)
    if dtype == "bfloat16":
        return Hazard(f"log of {name}", dtype, "warning", risk + "of probabilities rounded to 8 bits", advice)
    return Hazard(f"log of {name}", dtype, "note", risk + "less precise than a loss of logits", advice)


def _power(op: Any, dtype: str, context: Context) -> Hazard | None:
    if op.type == "Mul" and not bounds.is_square(op.outputs[0]):
        return None
    exponent = bounds.exponent(op) if op.type == "Pow" else 2.0
    if dtype != "float16" or exponent in (0.0, 0.5, 1.0):
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


def _pool(op: Any, dtype: str, _context: Context) -> Hazard | None:
    window = math.prod(op.get_attr("ksize"))
    if dtype != "float16" or window < 256:
        return None
    risk = f"average of {window:,} values, added up in float16: stops growing at 2,048 times a value"
    return Hazard("average pooling", dtype, "severe" if window > 1024 else "warning", risk, length=window)


def _sum_of_gradients(op: Any, dtype: str, _context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    if terms is None or (found := _stagnation("gradient", terms, dtype)) is None:
        return None
    return Hazard("sum of gradients", dtype, "warning", found.risk, length=terms.number)


def _bias_gradient(op: Any, dtype: str, context: Context) -> Hazard | None:
    shape = op.inputs[0].shape
    if dtype != "bfloat16" or not context.on_cpu or shape.rank is None:
        return None
    terms = bounds.terms_of(list(shape)[:-1], False)
    if terms.number <= 256:
        return None
    risk = f"bias gradient over {terms} terms, added up in bfloat16 on CPUs: stops growing at 256 times a term"
    advice = "leave the bias out before a normalization, or add it in a layer with dtype float32"
    return Hazard("bias gradient", dtype, "warning", risk, advice, terms.number)


def _saturates(op: Any, context: Context) -> bool:
    through = frozenset(["Mul", "AddV2", "Add", "Sub", "Neg", "BiasAdd"])
    ends = [user for user in context.users(op, through) if user.type not in through | bounds.MOVES]
    return bool(ends) and all(user.type in _SATURATING for user in ends) and not context.is_output(op)


def _bits(dtype: str) -> int:
    return 1 - round(math.log2(FORMATS[dtype].epsilon))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


_Rule = Callable[[Any, str, Context], Hazard | None]
_FORWARD: dict[str, _Rule] = {
    "Sum": _sum,
    "Mean": _mean,
    "Prod": _product,
    "Cumsum": _cumulative,
    "Cumprod": _cumulative,
    "L2Loss": _l2_loss,
    "EuclideanNorm": _euclidean_norm,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    **dict.fromkeys((*_LOSSES, "Cast"), _cross_entropy),
    **dict.fromkeys(("Exp", "Expm1", "Sinh", "Cosh"), _exp),
    **dict.fromkeys(("Log", "Log1p"), _log),
    **dict.fromkeys(("Pow", "Square", "SquaredDifference", "Mul"), _power),
    **dict.fromkeys(("Sqrt", "Rsqrt"), _root),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), _pool),
}
_BACKWARD: dict[str, _Rule] = {"Sum": _sum_of_gradients, "BiasAddGrad": _bias_gradient}
