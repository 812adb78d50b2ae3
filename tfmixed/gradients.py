"""Gradients: unscaled, judged finite or not, measured. For every Keras backend.

A gradient is a tensor, a `tf.IndexedSlices` or None; None stands for "no path from the loss" and is passed through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import ml_dtypes
from keras import ops

from tfmixed.formats import FLOAT32


class Verdict(NamedTuple):
    """What the unscaled gradients of one step say, on all replicas together.

    Args:
        finite: Boolean scalar: is every value of every gradient finite?
        bad: Boolean vector, one entry a variable of the optimizer: is a value of its gradient not?
        norm: float32 scalar, the L2 norm of all gradients together. Non-finite where a gradient is, and where the sum
            of squares leaves float32 (a norm above 1.8e19). Repeated rows of `tf.IndexedSlices` count one by one, as
            they do in `tf.linalg.global_norm`. With several replicas it is sqrt(replicas * the sum of their squared
            norms): the norm of their sum where they agree, above it where they do not. The norm itself would take a
            second reduction of all gradients.
        amax: float32 scalar, the largest absolute value on any replica; None where nobody asked.
    """

    finite: Any
    bad: Any
    norm: Any
    amax: Any


class Judge(NamedTuple):
    """Turns the gradients of each replica into evidence, and the sum of the evidence into a verdict.

    The evidence is one float32 vector, since strategies sum and know no maximum: for each variable 1 if its gradient
    is not finite, then the sum of squares, then the replica's largest absolute value in a place of its own.

    Args:
        dtypes: Those of the optimizer's variables. A gradient must be finite in its variable's dtype.
        replicas: How many there are.
        summands: How many gradients the inner optimizer adds up, over replicas and accumulated steps: their sum must
            be finite too.
        squares: The inner optimizer squares gradients as they are: their squares must be finite in the variable's dtype
            too, or its second moments would make every later step NaN.
        norms: It sums squares, to clip by the norm for instance: the sum must be finite in float32 too.
        needs_amax: Measure the largest absolute value too.
    """

    dtypes: tuple[str, ...]
    replicas: int = 1
    summands: int = 1
    squares: bool = False
    norms: bool = False
    needs_amax: bool = False

    def evidence(self, gradients: Sequence[Any], indices: Sequence[int], replica: Any = 0) -> Any:
        """Returns the evidence of one replica.

        Args:
            gradients: Unscaled, at least one of them not None.
            indices: The index of each gradient's variable.
            replica: The number of this replica, from 0.
        """
        values = {index: _values(each) for index, each in zip(indices, gradients, strict=True) if each is not None}
        squares = {index: ops.sum(ops.square(ops.cast(each, "float32"))) for index, each in values.items()}
        bad = {index: self._is_bad(values[index], squares[index], self.dtypes[index]) for index in values}
        parts = [bad.get(index, 0.0) for index in range(len(self.dtypes))] + [sum(squares.values())]
        if self.needs_amax:
            peaks = [ops.cast(ops.max(ops.abs(each), initial=0), "float32") for each in values.values()]
            peak = ops.max(ops.stack(peaks))
            parts += [ops.where(ops.equal(replica, place), peak, 0.0) for place in range(self.replicas)]
        return ops.stack(parts)

    def verdict(self, evidence: Any) -> Verdict:
        """Returns the verdict on the sum of all evidence."""
        count = len(self.dtypes)
        bad = ops.greater(evidence[:count], 0.0)
        norm = ops.sqrt(self.replicas * evidence[count])
        amax = ops.max(evidence[count + 1 :]) if self.needs_amax else None
        return Verdict(ops.logical_not(ops.any(bad)), bad, norm, amax)

    def _is_bad(self, values: Any, square: Any, dtype: str) -> Any:
        largest = float(ml_dtypes.finfo(dtype).max)
        limit = min(
            math.sqrt(largest) if self.squares else largest,
            float(ml_dtypes.finfo(keras.backend.standardize_dtype(values.dtype)).max),
        )
        good = ops.all(ops.abs(values) <= limit / self.summands)  # NaN compares False
        if self.norms:
            good = ops.logical_and(good, square <= FLOAT32.max / self.summands**2 / len(self.dtypes))
        return ops.cast(ops.logical_not(good), "float32")


def unscale(gradient: Any, scale: Any) -> Any:
    """Returns `gradient / scale` in its own sparsity, in float32 at least, as Keras does.

    By division, since the reciprocal of a scale above 2**126 is subnormal.

    Args:
        gradient: Tensor of any shape and floating dtype, `tf.IndexedSlices`, or None.
        scale: float32 scalar.
    """
    if gradient is None:
        return None
    if _is_sparse(gradient):
        return type(gradient)(unscale(gradient.values, scale), gradient.indices, gradient.dense_shape)
    return ops.divide(gradient, scale)


def _values(gradient: Any) -> Any:
    return gradient.values if _is_sparse(gradient) else gradient


def _is_sparse(gradient: Any) -> bool:
    # By name: the other backends have no TensorFlow to ask for the class.
    return type(gradient).__name__ == "IndexedSlices"
