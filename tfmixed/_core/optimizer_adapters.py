"""Optimizers from outside, to which a loop gives gradients: Keras's own, and those with `apply_gradients`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from tfmixed._core import gradients
from tfmixed._core.inner_optimizer import parts


def check(optimizer: Any) -> None:
    """Refuses what is no optimizer, and optimizers that scale or unscale by themselves.

    Raises:
        TypeError: It has no `apply_gradients`.
        ValueError: It scales by itself.
    """
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "apply_gradients", None)):
        raise TypeError(f"optimizer must be an optimizer, one with apply_gradients, received {optimizer!r}")
    if _scales(optimizer):
        raise ValueError(
            f"optimizer must not scale the loss itself, received a {type(optimizer).__name__}: pass the one that it "
            "wraps. Under mixed_float16 `compile(..., auto_scale_loss=False)` keeps Keras from wrapping it"
        )
    for part in parts(optimizer):
        factor = getattr(part, "loss_scale_factor", None)
        if factor is not None:
            raise ValueError(f"optimizer.loss_scale_factor must be None, received {factor} of a {type(part).__name__}")


def _scales(optimizer: Any) -> bool:
    # Keras 3's; what Keras 2's and ours can do; TensorFlow 1's, which has no method for it, by its name there.
    return (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or hasattr(optimizer, "get_unscaled_gradients")
        or any(kind.__name__ == "MixedPrecisionLossScaleOptimizer" for kind in type(optimizer).__mro__)
    )


def check_gradients(grads: Any) -> list[Any]:
    """Returns gradients as a list.

    Raises:
        TypeError: One is neither a tensor nor `tf.IndexedSlices` nor None.
    """
    found = list(grads)
    for each in found:
        if not (each is None or gradients.is_sparse(each) or keras.ops.is_tensor(each)):
            raise TypeError(f"grads must hold tensors, tf.IndexedSlices and None, received {each!r}")
    return found


def split(grads_and_vars: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Returns the gradients and the variables of pairs.

    Raises:
        TypeError: They are no such pairs.
    """
    pairs = list(grads_and_vars)
    for each in pairs:
        if not isinstance(each, tuple | list) or len(each) != 2 or not hasattr(each[1], "assign"):
            raise TypeError(
                f"grads_and_vars must hold pairs of a gradient and its variable, received {each!r}: pass "
                "zip(grads, variables)"
            )
    return check_gradients(each for each, _ in pairs), [each for _, each in pairs]


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


def known(optimizer: Any, count: int) -> list[Any] | None:
    """Returns the variables of so many gradients, None where the optimizer was not built with as many."""
    variables = getattr(optimizer, "_trainable_variables", ())
    return list(variables) if len(variables) == count else None


def _is_keras(optimizer: Any) -> bool:
    return isinstance(optimizer, keras.optimizers.Optimizer)
