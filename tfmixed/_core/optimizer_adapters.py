"""Optimizers that a `GradScaler` steps: Keras's own, and those with `apply_gradients`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from tfmixed._core import gradients
from tfmixed._core.inner_optimizer import parts


def check(optimizer: Any) -> None:
    """Checks that `optimizer` is an optimizer, and does not scale or unscale by itself."""
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "apply_gradients", None)):
        raise TypeError(f"`optimizer` must be an optimizer, with `apply_gradients`. Received: {optimizer!r}")
    if _scales(optimizer):
        raise ValueError(
            "`optimizer` must not scale the loss itself. Pass the optimizer that it wraps. Under mixed_float16 "
            "`compile(..., auto_scale_loss=False)` keeps Keras from wrapping it. "
            f"Received: a {type(optimizer).__name__}"
        )
    for part in parts(optimizer):
        factor = getattr(part, "loss_scale_factor", None)
        if factor is not None:
            raise ValueError(
                f"`optimizer.loss_scale_factor` must be None. Received: {factor} of a {type(part).__name__}"
            )


def _scales(optimizer: Any) -> bool:
    # Keras 3's class, the method of Keras 2's and ours, and TensorFlow 1's class, which has no method of its own.
    return (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or hasattr(optimizer, "get_unscaled_gradients")
        or any(kind.__name__ == "MixedPrecisionLossScaleOptimizer" for kind in type(optimizer).__mro__)
    )


def check_gradients(grads: Any) -> list[Any]:
    """Returns gradients as a list, after a check of their types."""
    found = list(grads)
    for gradient in found:
        if not (gradient is None or gradients.is_sparse(gradient) or keras.ops.is_tensor(gradient)):
            raise TypeError(f"`grads` must be tensors, tf.IndexedSlices and None. Received: {gradient!r}")
    return found


def split(grads_and_vars: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Returns the gradients and the variables of pairs, after a check of their types."""
    pairs = list(grads_and_vars)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not hasattr(pair[1], "assign"):
            raise TypeError(
                "`grads_and_vars` must be pairs of a gradient and its variable. Pass `zip(grads, variables)`. "
                f"Received: {pair!r}"
            )
    return check_gradients(gradient for gradient, _ in pairs), [variable for _, variable in pairs]


def build(optimizer: Any, variables: Sequence[Any]) -> None:
    """Builds a Keras optimizer, which no branch can do. TensorFlow 1 leaves the graph for its slots by itself."""
    if is_keras(optimizer) and not optimizer.built:
        optimizer.build(variables)


def apply(optimizer: Any, grads: Sequence[Any], variables: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Applies unscaled gradients with an optimizer."""
    if is_keras(optimizer):
        optimizer.apply(grads, variables)
        return
    own = [variable.value if isinstance(variable, keras.Variable) else variable for variable in variables]
    optimizer.apply_gradients(zip(grads, own, strict=True), **options)


def written_variables(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Returns the variables that `apply` writes. Slots of TensorFlow 1 are on the devices of their variables."""
    return [*variables, *(optimizer.variables if is_keras(optimizer) else ())]


def variables_of(optimizer: Any, count: int) -> list[Any] | None:
    """Returns the variables that an optimizer was built with, or None if they are not `count`."""
    variables = getattr(optimizer, "_trainable_variables", ())
    return list(variables) if len(variables) == count else None


def is_keras(optimizer: Any) -> bool:
    """Returns whether it is an optimizer of Keras 3, whose `apply` takes gradients and variables."""
    return isinstance(optimizer, keras.optimizers.Optimizer)
