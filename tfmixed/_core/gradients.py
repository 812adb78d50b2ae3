"""Gradients and unscaling. For every Keras backend.

A gradient is a tensor, a `tf.IndexedSlices` or None, which stands for no path from the loss and is passed through.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy
from keras import ops

from tfmixed._core import scalar_ops

# The reciprocal of a larger scale is subnormal, which kernels take for 0.
_LARGEST_RECIPROCAL = 2.0**126


def unscale(gradient: Any, scale: Any, largest: float) -> Any:
    """Returns `gradient / scale`, dense or sparse as it is, in float32 at least, as Keras does.

    Multiplies by the reciprocal, since a division takes twice the time of all the rest of a compiled update. If that
    could be subnormal, in two parts.

    Args:
        gradient: Tensor of any shape and floating dtype, `tf.IndexedSlices`, or None.
        scale: float32 scalar.
        largest: Largest value that the scale can take.
    """

    def unscaled(values: Any) -> Any:
        wide = widened(values)  # on PyTorch a scalar widens no vector
        if largest <= _LARGEST_RECIPROCAL:
            return ops.multiply(wide, 1.0 / scale)
        part = ops.where(scale > 2.0**64, 2.0**-64, 1.0)
        return ops.multiply(ops.multiply(wide, 1.0 / (scale * part)), part)

    return None if gradient is None else with_values(gradient, unscaled)


def unscale_all(gradients: Sequence[Any], raw: Iterable[bool], scale: Any, largest: float) -> list[Any]:
    """Returns gradients unscaled, except for the `raw` ones, which are not scaled."""
    is_scaled = [not is_raw and gradient is not None for gradient, is_raw in zip(gradients, raw, strict=True)]
    scaled = itertools.compress(gradients, is_scaled)
    if scalar_ops.ON_HOST:
        unscaled = iter(_unscaled_at_once(list(scaled), scale))
    else:
        unscaled = (unscale(gradient, scale, largest) for gradient in scaled)
    return [next(unscaled) if is_one else gradient for gradient, is_one in zip(gradients, is_scaled, strict=True)]


def _unscaled_at_once(gradients: Sequence[Any], scale: Any) -> Sequence[Any]:
    """Returns PyTorch's gradients unscaled by a scale on the host, in one operation for all of them."""
    import torch

    wide, scale = [widened(gradient) for gradient in gradients], float(scale)
    if scale == 1 or not wide:
        return wide
    with torch.no_grad():
        if scale > _LARGEST_RECIPROCAL:
            return torch._foreach_div(wide, scale)
        return torch._foreach_mul(wide, float(numpy.float32(1) / numpy.float32(scale)))


def holds_gradient(variable: Any) -> bool:
    """Returns whether `variable` is overwritten with its gradient, as the scales of float8 layers are."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def raw(variables: Iterable[Any]) -> list[bool]:
    """Returns for each variable whether its gradient is not scaled, because it overwrites the variable."""
    return [holds_gradient(variable) for variable in variables]


def path(variable: Any) -> str:
    """Returns the unique name of a variable: Keras's path or TensorFlow's name."""
    return str(getattr(variable, "path", variable.name))


def is_sparse(gradient: Any) -> bool:
    """Returns whether `gradient` is a `tf.IndexedSlices`."""
    # By name, since other backends may have no TensorFlow to import.
    return type(gradient).__name__ == "IndexedSlices"


def values_of(gradient: Any) -> Any:
    """Returns the values of a gradient, for `tf.IndexedSlices` those of its rows."""
    return gradient.values if is_sparse(gradient) else gradient


def with_values(gradient: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a gradient, dense or sparse as it is, with `function` of its values."""
    if not is_sparse(gradient):
        return function(gradient)
    return type(gradient)(function(gradient.values), gradient.indices, gradient.dense_shape)


def widened(values: Any) -> Any:
    """Returns a tensor in float32 at least."""
    if scalar_ops.ON_HOST and str(values.dtype) == "torch.float32":
        return values
    is_double = keras.backend.standardize_dtype(values.dtype) == "float64"
    return values if is_double else ops.cast(values, "float32")
