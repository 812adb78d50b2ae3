"""What an inner optimizer runs and reads: whether all of it is Keras's code, its numbers, and its scalars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from tfmixed import branching

# They derive several scalars of the step number for each variable, and make sparse gradients dense by themselves.
ADAMS = (keras.optimizers.Adam, keras.optimizers.AdamW, keras.optimizers.Adamax, keras.optimizers.Lamb)


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
    return type(inner) in ADAMS and plain and not branches(inner) and branching.is_single_tensorflow()


def is_known(inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> bool:
    """Returns whether all that an update runs is Keras's own code."""
    parts = _parts(inner)
    return _is_of_keras([*parts, *(part._learning_rate for part in parts), *(each.constraint for each in variables)])


def numbers_of(inner: keras.optimizers.Optimizer) -> tuple[Any, ...]:
    """Returns the hyperparameters that are no variables, and which objects stand for the others."""
    plain = (bool, int, float, str)
    return tuple(
        (
            id(part),
            id(part._learning_rate),
            *((key, value) for key, value in vars(part).items() if type(value) in plain),
        )
        for part in _parts(inner)
    )


def branches(inner: keras.optimizers.Optimizer) -> bool:
    """Returns whether an update accumulates gradients or averages weights in a branch of its own."""
    return any(part.gradient_accumulation_steps or part.ema_overwrite_frequency for part in _parts(inner))


def _parts(inner: keras.optimizers.Optimizer) -> tuple[keras.optimizers.Optimizer, ...]:
    """Returns the optimizer and, if it is a `MultiOptimizer`, those that it hands variables to."""
    return (inner, *getattr(inner, "optimizers", ()))


def _is_of_keras(parts: Sequence[Any]) -> bool:
    return all(part is None or type(part).__module__.startswith("keras.") for part in parts)
