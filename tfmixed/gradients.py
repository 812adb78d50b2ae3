"""Gradients: unscaled, judged finite or not, measured. For every Keras backend.

A gradient is a tensor, a `tf.IndexedSlices` or None; None stands for "no path from the loss" and is passed through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops


class Verdict(NamedTuple):
    """What the unscaled gradients of one step say.

    Args:
        finite: Boolean scalar: is every value of every gradient finite?
        culprit: int32 scalar: index of the first variable whose gradient is not; meaningless where all are.
        norm: float32 scalar, the L2 norm of all gradients together. Non-finite where a gradient is, and where the sum
            of squares leaves float32 (a norm above 1.8e19). Repeated rows of `tf.IndexedSlices` count one by one, as
            they do in `tf.linalg.global_norm`.
        amax: float32 scalar, the largest absolute value; None where nobody asked.
    """

    finite: Any
    culprit: Any
    norm: Any
    amax: Any = None


def judge(
    gradients: Sequence[Any], indices: Sequence[int], needs_amax: bool = False, needs_norm: bool = False
) -> Verdict:
    """Returns the verdict on unscaled gradients.

    Args:
        gradients: At least one of them not None.
        indices: The index of each gradient's variable.
        needs_amax: Measure the largest absolute value too.
        needs_norm: Count a norm that leaves float32 as an overflow: clipping by it would make NaN of finite gradients.
    """
    values = _values(gradients)
    squares = ops.stack([ops.sum(ops.square(ops.cast(value, "float32"))) for value in values])
    norm = ops.sqrt(ops.sum(squares))
    flags = ops.isfinite(squares) if needs_norm else ops.stack([ops.all(ops.isfinite(value)) for value in values])
    finite = ops.isfinite(norm) if needs_norm else ops.all(flags)
    owners = [index for index, gradient in zip(indices, gradients, strict=True) if gradient is not None]
    culprit = ops.take(ops.convert_to_tensor(owners, "int32"), ops.argmin(ops.cast(flags, "int32")))
    return Verdict(finite, culprit, norm, largest(gradients) if needs_amax else None)


def unscale(gradient: Any, scale: Any) -> Any:
    """Returns `gradient / scale` in the gradient's own dtype and sparsity.

    The quotient is taken in float32 at least. By division, since the reciprocal of a scale above 2**126 is subnormal.

    Args:
        gradient: Tensor of any shape and floating dtype, `tf.IndexedSlices`, or None.
        scale: float32 scalar.
    """
    if gradient is None:
        return None
    if _is_sparse(gradient):
        return type(gradient)(unscale(gradient.values, scale), gradient.indices, gradient.dense_shape)
    return ops.cast(ops.divide(gradient, scale), gradient.dtype)


def largest(gradients: Sequence[Any]) -> Any:
    """Returns the largest absolute value of all gradients, a float32 scalar."""
    peaks = [ops.max(ops.abs(ops.cast(values, "float32")), initial=0.0) for values in _values(gradients)]
    return ops.max(ops.stack(peaks))


def _values(gradients: Sequence[Any]) -> list[Any]:
    return [gradient.values if _is_sparse(gradient) else gradient for gradient in gradients if gradient is not None]


def _is_sparse(gradient: Any) -> bool:
    # By name: the other backends have no TensorFlow to ask for the class.
    return type(gradient).__name__ == "IndexedSlices"
