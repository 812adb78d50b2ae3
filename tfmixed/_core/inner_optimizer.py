"""Properties of an inner optimizer, asked of each part of a `MultiOptimizer`: its code, its numbers, its limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy

from tfmixed._core import control_flow

# They derive several scalars of the step number for each variable, and make sparse gradients dense by themselves.
ADAMS = (keras.optimizers.Adam, keras.optimizers.AdamW, keras.optimizers.Adamax, keras.optimizers.Lamb)
_NUMBERS = (bool, int, float, str, numpy.generic, type(None))


@contextlib.contextmanager
def scalars_read_once(
    inner: keras.optimizers.Optimizer, variables: Sequence[Any], counts: bool = True
) -> Iterator[None]:
    """Makes `inner.apply` read step and learning rate once, instead of once a variable.

    What these kinds derive of them, Adam's powers for instance, TensorFlow then computes once too: a read it may not
    share, what comes after it may. With small variables that is a seventh of an update. Others are left alone.

    Args:
        inner: The optimizer.
        variables: All that it may write.
        counts: Whether this is the step's last call of `apply`, the one that counts it.
    """
    if not reads_scalars(inner, variables):
        yield
        return
    frozen = [each for each in (inner.iterations, inner._learning_rate) if isinstance(each, keras.Variable)]
    mapping = [(variable, variable.value.value()) for variable in frozen]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        yield
    # What was written by tf.Variable's own methods is written; what went through Keras's, the scope has held back.
    held = [inner._learning_rate] if counts else [inner._learning_rate, inner.iterations]
    for variable in (*inner.variables, *variables):
        value = scope.get_current_value(variable)
        if value is not None and not any(variable is each for each in held):
            variable.assign(value)


def reads_scalars(inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> bool:
    """Returns whether `scalars_read_once` is of use, and nothing that `inner.apply` calls may write by Keras's ways."""
    plain = not any(variable.constraint is not None for variable in variables) and _is_of_keras([inner._learning_rate])
    return type(inner) in ADAMS and plain and not branches(inner) and control_flow.is_single_tensorflow()


def is_known(inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> bool:
    """Returns whether all that an update runs is Keras's own code."""
    rates = [part._learning_rate for part in parts(inner)]
    return _is_of_keras([*parts(inner), *rates, *(each.constraint for each in variables)])


def python_state(inner: keras.optimizers.Optimizer) -> tuple[tuple[Any, ...], list[Any]]:
    """Returns what an update may read of Python, as a key, and the objects that the key holds by identity.

    Two keys are equal only while the objects of one of them are alive: whoever keeps a key keeps these too.
    """
    found: list[tuple[str, Any]] = []
    for part in parts(inner):
        rate = part._learning_rate
        schedule = vars(rate) if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) else {}
        # What is private besides is Keras's own: variables, and caches that an update fills.
        public = (item for each in (vars(part), schedule) for item in each.items() if not item[0].startswith("_"))
        found += [("", part), ("", rate), *public]
    return tuple((name, _frozen(value)) for name, value in found), [value for _, value in found]


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple) and all(isinstance(each, _NUMBERS) for each in value):
        return tuple(value)
    return value if isinstance(value, _NUMBERS) else id(value)


def branches(inner: Any) -> list[str]:
    """Returns the arguments that make an update accumulate gradients or average weights in a branch of its own."""
    names = ("gradient_accumulation_steps", "ema_overwrite_frequency")
    found = [(part, name, getattr(part, name, None)) for part in parts(inner) for name in names]
    return [f"{type(part).__name__}({name}={value})" for part, name, value in found if value]


def parts(inner: Any) -> list[Any]:
    """Returns an optimizer and, if it is a `MultiOptimizer`, those that it hands variables to."""
    members = getattr(inner, "optimizers", None)
    return [inner, *(members if isinstance(members, list | tuple) else ())]


def _is_of_keras(members: Sequence[Any]) -> bool:
    return all(each is None or type(each).__module__.startswith("keras.") for each in members)
