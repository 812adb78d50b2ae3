"""What a gradient is, and how it is unscaled. For every Keras backend.

A gradient is a tensor, a `tf.IndexedSlices` or None; None stands for "no path from the loss" and is passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops

# From here on the reciprocal of a scale is subnormal, which kernels take for 0.
_LARGEST_RECIPROCAL = 2.0**126


def unscale(gradient: Any, scale: Any, largest: float) -> Any:
    """Returns `gradient / scale` in its own sparsity, in float32 at least, as Keras does.

    Multiplies by the reciprocal: a division takes twice the time of all the rest of a compiled update.

    Args:
        gradient: Tensor of any shape and floating dtype, `tf.IndexedSlices`, or None.
        scale: float32 scalar.
        largest: What the scale can at most be.
    """

    def unscaled(values: Any) -> Any:
        wide = widened(values)  # on PyTorch a scalar widens no vector
        return ops.divide(wide, scale) if largest > _LARGEST_RECIPROCAL else ops.multiply(wide, 1.0 / scale)

    return None if gradient is None else with_values(gradient, unscaled)


def unscale_all(gradients: Sequence[Any], raw: Iterable[bool], scale: Any, largest: float) -> list[Any]:
    """Returns all of them unscaled, but for those that never were scaled."""
    return [each if is_raw else unscale(each, scale, largest) for each, is_raw in zip(gradients, raw, strict=True)]


def holds_gradient(variable: Any) -> bool:
    """Returns whether `variable` is overwritten with its gradient as it is: the scales of float8 layers."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def raw(variables: Iterable[Any]) -> list[bool]:
    """Returns which gradients of variables are not scaled: those that their variables are overwritten with."""
    return [holds_gradient(each) for each in variables]


def path(variable: Any) -> str:
    """Returns the name by which a variable is told from others: Keras's path, TensorFlow's name."""
    return str(getattr(variable, "path", variable.name))


def is_sparse(gradient: Any) -> bool:
    """Returns whether `gradient` is a `tf.IndexedSlices`."""
    # By name: the other backends have no TensorFlow to ask for the class.
    return type(gradient).__name__ == "IndexedSlices"


def values_of(gradient: Any) -> Any:
    """Returns the numbers that a gradient holds, of a `tf.IndexedSlices` those of its rows."""
    return gradient.values if is_sparse(gradient) else gradient


def with_values(gradient: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a gradient in its own sparsity that holds `function` of its numbers."""
    if not is_sparse(gradient):
        return function(gradient)
    return type(gradient)(function(gradient.values), gradient.indices, gradient.dense_shape)


def is_double(values: Any) -> bool:
    """Returns whether a tensor is float64."""
    return bool(keras.backend.standardize_dtype(values.dtype) == "float64")


def widened(values: Any) -> Any:
    """Returns a tensor in float32 at least."""
    return values if is_double(values) else ops.cast(values, "float32")
