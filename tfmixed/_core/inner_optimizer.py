"""Inspects inner optimizers and the members of a `MultiOptimizer`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy

from tfmixed._core import control_flow

# They compute several scalars from the step number for each variable, and make sparse gradients dense.
ADAMS = (keras.optimizers.Adam, keras.optimizers.AdamW, keras.optimizers.Adamax, keras.optimizers.Lamb)
# Names in files of variables that only split weights have.
LOW_BITS = "low_bits_"
_NUMBERS = (bool, int, float, str, numpy.generic, type(None))


@contextlib.contextmanager
def scalars_read_once(
    inner: keras.optimizers.Optimizer, variables: Sequence[Any], counts: bool = True
) -> Iterator[None]:
    """Makes `inner.apply` read step and learning rate once, instead of once for each variable.

    TensorFlow then also shares what optimizers such as Adam compute from them, which it cannot do across several reads.
    With small variables this saves a seventh of an update. Does nothing for other optimizers.

    Args:
        inner: The optimizer.
        variables: Trainable variables that it may write.
        counts: If False, the step is not counted, since another call of `apply` follows. Defaults to True.
    """
    if not reads_scalars(inner, variables):
        yield
        return
    scalars = inner.iterations, inner._learning_rate
    frozen = [scalar for scalar in scalars if isinstance(scalar, keras.Variable)]
    mapping = [(variable, variable.value.value()) for variable in frozen]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        yield
    # Writes by tf.Variable's own methods are done. Writes through Keras's variables are still in the scope.
    held = [inner._learning_rate] if counts else [inner._learning_rate, inner.iterations]
    for variable in (*inner.variables, *variables):
        value = scope.get_current_value(variable)
        if value is not None and not any(variable is scalar for scalar in held):
            variable.assign(value)


def reads_scalars(inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> bool:
    """Returns whether `scalars_read_once` saves reads, and no other code writes through Keras's variables."""
    is_plain = _is_of_keras([inner._learning_rate]) and all(variable.constraint is None for variable in variables)
    return type(inner) in ADAMS and is_plain and not branches(inner) and control_flow.is_single_tensorflow()


def is_known(inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> bool:
    """Returns whether an update runs only Keras's own code."""
    rates = [part._learning_rate for part in parts(inner)]
    return _is_of_keras([*parts(inner), *rates, *(variable.constraint for variable in variables)])


def python_state(inner: keras.optimizers.Optimizer) -> tuple[tuple[Any, ...], list[Any]]:
    """Returns the Python values that an update may read, as a key, and the objects that the key holds by identity.

    Keep these objects as long as the key, since an id is unique only while its object is alive.
    """
    found: list[tuple[str, Any]] = []
    for part in parts(inner):
        rate = part._learning_rate
        schedule = vars(rate) if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) else {}
        # Other private attributes are Keras's variables, and caches that an update fills.
        public = [(name, value) for name, value in (*vars(part).items(), *schedule.items()) if name[0] != "_"]
        found += [("", part), ("", rate), *public]
    return tuple((name, _frozen(value)) for name, value in found), [value for _, value in found]


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple) and all(isinstance(number, _NUMBERS) for number in value):
        return tuple(value)
    return value if isinstance(value, _NUMBERS) else id(value)


def branches(inner: Any) -> list[str]:
    """Returns the arguments with which an update branches to accumulate gradients or average weights."""
    names = ("gradient_accumulation_steps", "ema_overwrite_frequency")
    found = [(part, name, getattr(part, name, None)) for part in parts(inner) for name in names]
    return [f"{type(part).__name__}({name}={value})" for part, name, value in found if value]


def parts(inner: Any) -> list[Any]:
    """Returns an optimizer and, if it is a `MultiOptimizer`, those that it consists of, without their wrappers."""
    if hasattr(inner, "inner_optimizer"):
        return parts(inner.inner_optimizer)
    members = getattr(inner, "optimizers", None)
    return (
        [inner, *(part for member in members for part in parts(member))]
        if isinstance(members, list | tuple)
        else [inner]
    )


def saved_variables(inner: keras.optimizers.Optimizer) -> dict[str, keras.Variable]:
    """Returns the variables that a file holds by name, numbered as by Keras."""
    if hasattr(inner, "saved_variables"):
        return inner.saved_variables()
    return {str(number): variable for number, variable in enumerate(inner.variables)}


def _is_of_keras(members: Sequence[Any]) -> bool:
    return all(member is None or type(member).__module__.startswith("keras.") for member in members)
