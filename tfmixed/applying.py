"""Optimizers from outside, to which a loop gives gradients: Keras's own, and those with `apply_gradients`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfmixed import gradients


def check(optimizer: Any) -> None:
    """Refuses optimizers that scale or unscale by themselves.

    Raises:
        ValueError: It is one.
    """
    if any("LossScale" in kind.__name__ for kind in type(optimizer).__mro__):
        raise ValueError(
            f"optimizer must not scale the loss itself, received a {type(optimizer).__name__}: pass the one that it "
            "wraps. Under mixed_float16 `compile(..., auto_scale_loss=False)` keeps Keras from wrapping it"
        )
    factor = getattr(optimizer, "loss_scale_factor", None)
    if factor is not None:
        raise ValueError(f"optimizer.loss_scale_factor must be None, received {factor}")


def build(optimizer: Any, variables: Sequence[Any]) -> None:
    """Makes Keras's variables, which no branch can. TensorFlow 1 leaves the graph for its slots by itself."""
    if _is_keras(optimizer) and not optimizer.built:
        optimizer.build(variables)


def apply(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    """Gives unscaled gradients to an optimizer."""
    if _is_keras(optimizer):
        optimizer.apply(grads, variables)
        return
    own = [each.value if isinstance(each, keras.Variable) else each for each in variables]
    optimizer.apply_gradients(zip(grads, own, strict=True), **arguments)


def written(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Returns the variables that `apply` writes; slots of TensorFlow 1 are where their variables are."""
    return [*variables, *(optimizer.variables if _is_keras(optimizer) else ())]


def raw(optimizer: Any, count: int) -> list[bool]:
    """Returns which of so many gradients are of variables that hold their gradients, as far as it is known."""
    known = getattr(optimizer, "_trainable_variables", ())
    return [gradients.holds_gradient(each) for each in known] if len(known) == count else [False] * count


def _is_keras(optimizer: Any) -> bool:
    return isinstance(optimizer, keras.optimizers.Optimizer)
