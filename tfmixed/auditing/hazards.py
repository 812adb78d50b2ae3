"""What can go wrong in one operation that runs in half precision, in a sentence with the number that matters.

The thresholds below say how the kernels of TensorFlow 2.21 behave on CPUs, as measured: float16 sums and averages over
axes other than the last add up in float16, and so do pooling windows and running sums; bfloat16 sums add up in float32,
but not running sums and the gradients of biases. Matrix products and convolutions add up in float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from tfmixed.auditing import bounds
from tfmixed.auditing.bounds import Bounds, Terms
from tfmixed.auditing.tracing import Node, Trace
from tfmixed.formats import FORMATS, HALF

Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")

_FEW = 32  # terms that no reduction of them is worth a word
_LOSSES = ("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
_SCATTERED = (
    *("SegmentSum", "SegmentSumV2", "UnsortedSegmentSum", "SparseSegmentSum", "SparseSegmentMean"),
    *("ScatterNd", "TensorScatterAdd"),
)
_UNBOUNDED = ("Exp", "Expm1", "Sinh", "Cosh", "Square", "SquaredDifference", "Pow", "Sum", "Prod", "Cumprod")
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
    magnitude = context.bounds(op.inputs[0]).magnitude
    if _never_overflows(terms, magnitude, dtype):
        return _stagnation("sum", op, terms, dtype, context)
    if bounds.is_square(op.inputs[0]):
        return _norm(terms, dtype)
    if terms.exact and terms.number < _FEW:
        return None
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


def _mean(op: Any, dtype: str, context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    if terms is None:
        return None
    if bounds.is_square(op.inputs[0]) and context.bounds(op.inputs[0]).high > FORMATS[dtype].max:
        risk = f"mean of {terms} squares: squares of numbers above 256 overflow, of those below 2e-4 vanish"
        if dtype == "float16":
            return Hazard("variance", dtype, "severe", risk, "square and average in float32", terms.number)
    if (found := _stagnation("mean", op, terms, dtype, context)) is not None or terms.number < _FEW:
        return found
    return Hazard(
        "mean", dtype, "note", f"mean over {terms} terms, rounded to {_bits(dtype)} bits", length=terms.number
    )


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


def _cross_entropy(_op: Any, dtype: str, _context: Context) -> Hazard:
    risk = f"a cross-entropy rounded to {_bits(dtype)} bits"
    if dtype == "float16":
        risk += ", which overflows above 2 times a loss scale of 32,768"
    severity: Severity = "severe" if dtype == "float16" else "warning"
    return Hazard("cross-entropy", dtype, severity, risk, "cast the logits to float32 before the loss")


def _narrowed(op: Any, dtype: str, context: Context) -> Hazard | None:
    """Tells of what was computed in float32, and does not fit where it is cast to."""
    made = bounds.source(op.inputs[0])
    if made.type in _LOSSES:  # `tf.nn` computes them in float32 and casts them back
        return _cross_entropy(op, dtype, context)
    if made.type not in _UNBOUNDED or made.outputs[0].dtype.name != "float32":
        return None
    found = _FORWARD[made.type](made, dtype, context)
    if found is None or found.severity != "severe":
        return None
    return replace(found, op="cast", risk=f"{found.risk}, and is cast to {dtype}", advice="take it in float32")


def _exp(op: Any, dtype: str, context: Context) -> Hazard | None:
    low, high = context.bounds(op.inputs[0])
    limit = math.log(FORMATS[dtype].max)
    overflows = high > limit or (op.type in ("Sinh", "Cosh") and low < -limit)
    name = op.type.lower()
    if not overflows:
        return None
    if dtype == "bfloat16":
        return Hazard(name, dtype, "note", f"{name} of a bfloat16: numbers near 10 are off by 3 % after it")
    return Hazard(name, dtype, "severe", f"{name} overflows above {limit:.1f}", f"{_IN_FLOAT32}, or subtract a maximum")


def _log(op: Any, dtype: str, context: Context) -> Hazard | None:
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
    for each in bounds.sources(op.inputs[0], _ON_THE_WAY):
        if each.type in ("Softmax", "Sigmoid"):
            seen |= {each.outputs[0].dtype.name, *_dtypes_to(op.inputs[0])}
            return each, next((dtype for dtype in HALF if dtype in seen), "float32")
    return None


def _dtypes_to(tensor: Any) -> Iterator[str]:
    """Yields the dtypes that values had on the way to a tensor."""
    while tensor.op.inputs and (tensor.op.type in bounds.MOVES or tensor.op.type in _ON_THE_WAY):
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
    if op.type == "Mul" and not bounds.is_square(op.outputs[0]):
        return None
    exponent = bounds.exponent(op) if op.type == "Pow" else 2.0
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


def _division(op: Any, dtype: str, context: Context) -> Hazard | None:
    low, least = context.bounds(op.inputs[-1]).low, 1 / FORMATS[dtype].max
    if dtype != "float16" or not 0 <= low < least or bounds.value(op.inputs[-1]) is not None:
        return None
    risk = f"division by what can be {low:.0e}: 1 over less than {least:.1e} overflows".replace("0e+00", "0")
    return Hazard("division", dtype, "warning", risk, f"a larger epsilon, or {_IN_FLOAT32}")


def _sum_of_gradients(op: Any, dtype: str, context: Context) -> Hazard | None:
    terms = bounds.terms(op)
    if terms is None or (found := _stagnation("gradient", op, terms, dtype, context)) is None:
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
    """Tells whether an infinity from `op` ends where it does no harm."""
    through = frozenset(["Mul", "AddV2", "Add", "Sub", "Neg", "BiasAdd"])
    ends = [user for user in context.users(op, through) if user.type not in through | bounds.MOVES]
    harmless = [user.type in _SATURATING or _is_exp_of_negative(user, context) for user in ends]
    return bool(ends) and all(harmless) and not context.is_output(op)


def _is_exp_of_negative(op: Any, context: Context) -> bool:
    return op.type == "Exp" and context.bounds(op.inputs[0]).high <= 0


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
    **dict.fromkeys(_LOSSES, _cross_entropy),
    "Cast": _narrowed,
    **dict.fromkeys(("Exp", "Expm1", "Sinh", "Cosh"), _exp),
    **dict.fromkeys(("Log", "Log1p"), _log),
    **dict.fromkeys(("Pow", "Square", "SquaredDifference", "Mul"), _power),
    **dict.fromkeys(("Sqrt", "Rsqrt"), _root),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), _pool),
    **dict.fromkeys(("RealDiv", "DivNoNan", "Reciprocal", "Inv"), _division),
    **dict.fromkeys(_SCATTERED, _scattered_sum),
}
_BACKWARD: dict[str, _Rule] = {"Sum": _sum_of_gradients, "BiasAddGrad": _bias_gradient}
