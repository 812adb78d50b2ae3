"""Gradients: unscaled, judged finite or not, measured. For every Keras backend.

A gradient is a tensor, a `tf.IndexedSlices` or None; None stands for "no path from the loss" and is passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops


def unscale(gradient: Any, scale: Any) -> Any:
    """Returns `gradient / scale` in the gradient's own dtype and sparsity.

    The division is done in float32 at least. Division, since the reciprocal of a scale above 2**126 is subnormal.

    Args:
        gradient: Tensor of any shape and floating dtype, `tf.IndexedSlices`, or None.
        scale: float32 scalar.
    """
    return _map(lambda values: ops.cast(ops.divide(values, scale), values.dtype), gradient)


def finite_flags(gradients: Sequence[Any]) -> Any:
    """Returns a boolean vector: for each gradient that is not None, whether all of its values are finite."""
    return ops.stack([ops.all(ops.isfinite(values)) for values in _values(gradients)])


def global_norm(gradients: Sequence[Any]) -> Any:
    """Returns the L2 norm of all gradients together, a float32 scalar.

    Non-finite where a gradient is, and where the sum of squares leaves float32 (a norm above 1.8e19). Repeated
    rows of `tf.IndexedSlices` count one by one, as they do in `tf.linalg.global_norm`.
    """
    squares = [ops.sum(ops.square(ops.cast(values, "float32"))) for values in _values(gradients)]
    return ops.sqrt(ops.sum(ops.stack(squares)))


def largest(gradients: Sequence[Any]) -> Any:
    """Returns the largest absolute value of all gradients, a float32 scalar."""
    peaks = [ops.max(ops.abs(ops.cast(values, "float32")), initial=0.0) for values in _values(gradients)]
    return ops.max(ops.stack(peaks))


def _values(gradients: Sequence[Any]) -> list[Any]:
    return [gradient.values if _is_sparse(gradient) else gradient for gradient in gradients if gradient is not None]


def _map(function: Callable[[Any], Any], gradient: Any) -> Any:
    if gradient is None:
        return None
    if _is_sparse(gradient):
        return type(gradient)(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def _is_sparse(gradient: Any) -> bool:
    # By name: the other backends have no TensorFlow to ask for the class.
    return type(gradient).__name__ == "IndexedSlices"
