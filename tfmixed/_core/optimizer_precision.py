"""Constants and states of Keras's optimizers that half-precision variables round away.

Keras casts the constants of an optimizer to the dtype of each variable, and creates its states in that dtype. In
bfloat16, 0.999 becomes 1; in float16, small epsilons and the squares of small gradients become 0.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy

from tfmixed._utils import user_warnings
from tfmixed.formats import FORMATS, HALF


class Finding(NamedTuple):
    """A constant of an optimizer, or a state, that half precision rounds away.

    Args:
        optimizer: Class name of the optimizer.
        constant: Name of the constant, or an expression in constants.
        value: Its value.
        rounded: Its value in `dtype`.
        dtype: The dtype of the variables.
        variables: Number of variables of this dtype.
        consequence: The effect on training.
        severe: Whether weights do not move or do not stay finite on ordinary gradients.
    """

    optimizer: str
    constant: str
    value: float
    rounded: float
    dtype: str
    variables: int
    consequence: str
    severe: bool

    def __str__(self) -> str:
        value, rounded = (f"{number:.7g}" if number > 0.5 else f"{number:.2g}" for number in (self.value, self.rounded))
        return f"{self.constant} = {value} becomes {rounded}: {self.consequence}"


class _Loss(NamedTuple):
    """The fields of `Finding` that a rule knows."""

    constant: str
    value: float
    rounded: float
    consequence: str
    severe: bool = False


def _classes(*names: str) -> tuple[type, ...]:
    return tuple(getattr(keras.optimizers, name) for name in names if hasattr(keras.optimizers, name))


# The update has the factor sqrt(1 - beta_2**step), or divides by 1 - beta_1**step or 1 - beta_2**step.
_SCALED_BY_BETA_2 = _classes("Adam", "Muon")
_DIVIDED_BY_BETA_1 = _classes("Adam", "Adamax", "Lamb", "Muon")
_DIVIDED_BY_BETA_2 = _classes("Lamb", "Nadam", "ScheduleFreeAdamW")
# Squares below epsilon do not matter, since epsilon is under the same root; Adagrad starts from 0.1, and Adamax has no
# squares.
_HAVE_HARMLESS_SQUARES = _classes("Adadelta", "Adagrad", "Adamax", "RMSprop")
# Arguments of every optimizer. They are not decay rates, except one.
_COMMON = frozenset.intersection(
    *(frozenset(inspect.signature(kind).parameters) for kind in _classes("Adam", "Ftrl", "SGD"))
) - {"ema_momentum"}

_reported: weakref.WeakSet[Any] = weakref.WeakSet()


def has_float32_arithmetic(optimizer: Any) -> bool:
    """Returns whether an optimizer, or the one inside a loss-scaling one, updates half-precision variables safely."""
    return bool(getattr(type(_inner(optimizer)), "float32_arithmetic", False))


def keeps_small_updates(optimizer: Any) -> bool:
    """Returns whether an optimizer stores half-precision weights such that small updates are not lost."""
    return has_float32_arithmetic(optimizer) and getattr(_inner(optimizer), "weights", None) != "nearest"


def find(optimizer: Any, variables: Iterable[Any]) -> list[Finding]:
    """Returns the constants and states that half-precision variables round away.

    Args:
        optimizer: A Keras optimizer. Loss-scaling optimizers and `MultiOptimizer` are searched for those inside.
        variables: The trainable variables, or their dtypes.
    """
    found = []
    for part, own in _updating(optimizer, variables):
        dtypes = Counter(keras.backend.standardize_dtype(getattr(variable, "dtype", variable)) for variable in own)
        for dtype in HALF:
            losses = _losses(type(part), _constants(part), dtype) if dtypes[dtype] else ()
            found += [Finding(type(part).__name__, *loss[:3], dtype, dtypes[dtype], *loss[3:]) for loss in losses]
    return found


def describe(found: Iterable[Finding]) -> list[str]:
    """Returns one message for each optimizer and dtype, with a remedy."""
    messages = []
    for (optimizer, dtype, count), group in itertools.groupby(found, lambda finding: (finding[0], *finding[4:6])):
        variables = f"{count} {dtype} variable{'s'[: count != 1]}"
        lost = "; ".join(map(str, group))
        messages.append(f"{optimizer} updates {variables} in {dtype} arithmetic, where {lost}. {remedy(dtype)}.")
    return messages


def describe_default(owner: str, dtype: str) -> str:
    """Returns a message for an owner of half-precision variables without an optimizer yet, with Adam's defaults."""
    parameters = inspect.signature(keras.optimizers.Adam).parameters
    losses = _losses(keras.optimizers.Adam, _used({key: value.default for key, value in parameters.items()}), dtype)
    lost = "; ".join(str(Finding("Adam", *loss[:3], dtype, 0, *loss[3:])) for loss in losses)
    return f"{owner} keeps variables in {dtype}, and Keras's Adam computes in it, where {lost}. {remedy(dtype)}."


def remedy(dtype: str) -> str:
    """Returns a way to train variables of a half-precision dtype."""
    mixed = f"the policy 'mixed_{dtype}', whose variables are float32"
    return f"Use tfmixed.LowPrecisionOptimizer(optimizer) or {mixed}" if dtype == "bfloat16" else f"Use {mixed}"


def report(optimizer: Any, variables: Iterable[Any], tell: Callable[[str], None] = user_warnings.warn) -> None:
    """Reports the findings of an optimizer, once.

    Args:
        optimizer: The optimizer, as in `find`.
        variables: The trainable variables.
        tell: Function that takes a message. Defaults to a warning.
    """
    for part, own in _updating(optimizer, variables):
        if part not in _reported and (found := find(part, own)):
            _reported.add(part)
            for message in describe(found):
                tell(message)


def _inner(optimizer: Any) -> Any:
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _updating(optimizer: Any, variables: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yields the optimizers that compute in the dtypes of their variables, with these."""
    whole = _inner(optimizer)
    members = [] if has_float32_arithmetic(whole) else getattr(whole, "optimizers", ())
    pairs = [(member, member._trainable_variables if whole.built else variables) for member in members]
    for part, own in pairs or [(whole, variables)]:
        if not has_float32_arithmetic(part):
            yield part, list(own)


def _constants(optimizer: Any) -> dict[str, float]:
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable):
        try:
            rate = float(keras.ops.convert_to_numpy(rate))
        except Exception:  # in a compiled function, where variables have no values
            rate = None
    return _used({**vars(optimizer), "learning_rate": rate})


def _used(arguments: Mapping[str, Any]) -> dict[str, float]:
    unused = () if arguments.get("use_ema") else ("ema_momentum",)
    public = {name: value for name, value in arguments.items() if name[0] != "_" and name not in unused}
    is_number = {name: isinstance(value, int | float) and not isinstance(value, bool) for name, value in public.items()}
    return {name: float(value) for name, value in public.items() if is_number[name] and value > 0}


def _losses(kind: type, constants: Mapping[str, float], dtype: str) -> Iterator[_Loss]:
    rounded = {name: _round(value, dtype) for name, value in constants.items() if value < 1}
    for name, value in rounded.items():
        if value == 1 and name not in _COMMON:
            yield _Loss(name, constants[name], 1.0, *_of_rate(kind, name))
        elif value == 0 and not name.endswith("weight_decay"):
            yield _Loss(name, constants[name], 0.0, *_of_zero(name))
    yield from _epsilon_products(kind, constants, dtype)
    yield from _squares(kind, constants, dtype)
    yield from _weight_decay(constants, dtype)
    yield from _averages(constants, rounded, dtype)


def _round(value: float, dtype: str) -> float:
    return float(numpy.asarray(value, numpy.float32).astype(dtype))


def _of_rate(kind: type, name: str) -> tuple[str, bool]:
    """Returns the consequence of a decay rate of 1, and whether it is severe."""
    if name.endswith("beta_2") and issubclass(kind, _SCALED_BY_BETA_2):
        weights = "no weight that Muon updates as Adam does" if kind.__name__ == "Muon" else "no weight"
        return f"the step size has the factor sqrt(1 - {name}**step) = 0, and {weights} moves", True
    divided = {"beta_1": _DIVIDED_BY_BETA_1, "beta_2": _DIVIDED_BY_BETA_2}.get(name[-6:], ())
    if issubclass(kind, divided):
        return f"the update divides by 1 - {name}**step = 0, and weights become NaN or do not move", True
    return "the average that it weights never decays, or never changes", False


def _of_zero(name: str) -> tuple[str, bool]:
    """Returns the consequence of a constant of 0, and whether it is severe."""
    if name.startswith("epsilon"):
        return "where the second moment is 0, the update is 0 / 0 = NaN", True
    if name == "learning_rate":
        return "no weight moves", True
    return "its effect is lost", False


def _epsilon_products(kind: type, constants: Mapping[str, float], dtype: str) -> Iterator[_Loss]:
    epsilon = constants.get("epsilon", 0.0)
    if issubclass(kind, keras.optimizers.Adamax) and _round(epsilon, dtype):
        product = _round(epsilon, dtype) * (1 - constants.get("beta_1", 0.0))
        if _round(product, dtype) == 0:
            yield _Loss(
                "(1 - beta_1) * epsilon", product, 0.0, "where a gradient is 0, the update is 0 / 0 = NaN", True
            )


def _squares(kind: type, constants: Mapping[str, float], dtype: str) -> Iterator[_Loss]:
    """Yields a second moment whose root divides the update, and that is 0 for ordinary gradients."""
    has_epsilon = any(name.startswith("epsilon") for name in constants)
    if dtype != "float16" or not has_epsilon or issubclass(kind, _HAVE_HARMLESS_SQUARES):
        return
    rate = next((name for name in constants if name.endswith("beta_2")), None)
    square = "gradient**2" if rate is None else f"(1 - {rate}) * gradient**2"
    vanishing = FORMATS[dtype].smallest_subnormal / 2
    largest = math.sqrt(vanishing / (1 - constants.get(rate or "", 0.0)))
    consequence = (
        f"for gradients below {largest:.1g} the update divides by a second moment of 0, and weights jump, become NaN "
        "or do not move"
    )
    yield _Loss(square, vanishing, 0.0, consequence, True)


def _weight_decay(constants: Mapping[str, float], dtype: str) -> Iterator[_Loss]:
    """Yields weight decay that is below half the spacing of all weights."""
    for name, value in constants.items():
        share = value * constants.get("learning_rate", 1.0)
        if name.endswith("weight_decay") and share < FORMATS[dtype].epsilon / 4:
            yield _Loss(f"1 - {name} * learning_rate", 1 - share, 1.0, "weights do not decay")


def _averages(constants: Mapping[str, float], rounded: Mapping[str, float], dtype: str) -> Iterator[_Loss]:
    """Yields averages of weights that stop far away from the weights, and sums of gradients that stop growing."""
    epsilon = FORMATS[dtype].epsilon
    momentum = rounded.get("ema_momentum", 0.0)
    gap = epsilon / 2 / (1 - momentum) if momentum < 1 else 0.0
    if gap > 0.1:
        value = constants["ema_momentum"]
        yield _Loss("ema_momentum", value, momentum, f"averages stop up to {gap:.0%} away from the weights")
    steps, most = constants.get("gradient_accumulation_steps", 0.0), 2 / epsilon
    if steps > most:
        consequence = f"a sum of equal gradients does not grow after {most:.0f} steps"
        yield _Loss("gradient_accumulation_steps", steps, most, consequence)
