"""Checks gradients for overflow and computes their global norm, together for all replicas. For every Keras backend."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from tfmixed._core.control_flow import when
from tfmixed._core.gradients import holds_gradient, values_of, widened
from tfmixed._core.inner_optimizer import largest_gradient
from tfmixed.formats import FLOAT32

# Between these scales the square of a scale is far from the limits of float32. Below the first, the square of a value
# that is large once it is unscaled can vanish.
_SURE_SCALES = 2.0**-40, 2.0**40
# Room for sums of squares in another order, such as those of a clip by the norm.
_MARGIN = 1.01


class Verdict(NamedTuple):
    """What the gradients of one step say, on all replicas together.

    Args:
        finite: Boolean scalar: is every value of every unscaled gradient finite, and so is `norm`?
        bad: Boolean vector, one entry a variable of the optimizer: those whose gradient has a value that is not
            finite. Where all values are and their norm is not, those of the largest norm.
        norm: float32 scalar, the L2 norm of all unscaled gradients together. It is finite just where the step is. A
            norm above 1.8e19 is not, since float32 cannot hold its square. Repeated rows of `tf.IndexedSlices` count
            one by one, as they do in `tf.linalg.global_norm`. With several replicas it is sqrt(replicas * the sum of
            their squared norms): the norm of their sum where they agree, above it where they do not. The norm itself
            would take a second reduction of all gradients.
        amax: float32 scalar, the largest absolute value on any replica; None where nobody asked.
    """

    finite: Any
    bad: Any
    norm: Any
    amax: Any

    @property
    def culprit(self) -> Any:
        """The index of the first variable whose gradient is not finite, an integer scalar; -1 where all are."""
        return ops.where(self.finite, -1, ops.argmax(ops.cast(self.bad, "int32")))


class Judge(NamedTuple):
    """Turns the scaled gradients of each replica into evidence, and the sum of the evidence into a verdict.

    The evidence is one float32 vector: for each variable the sum of the squares of its unscaled gradient, NaN if a
    value is not finite. Strategies sum and know no maximum, so each replica has a place of its own for its largest
    absolute value, where that is asked for.

    The sum of squares is one pass that stores nothing. Where it shows that all values are within their limits, nothing
    else is looked at.

    Args:
        limits: For each variable the largest value of its unscaled gradient that counts as finite.
        raw: Indices of variables whose gradients are not scaled.
        replicas: How many there are.
        needs_amax: Measure the largest absolute value.
    """

    limits: tuple[float, ...]
    raw: frozenset[int] = frozenset()
    replicas: int = 1
    needs_amax: bool = False

    @classmethod
    def of(cls, optimizer: Any, variables: Sequence[Any], replicas: int, needs_amax: bool) -> Judge:
        """Returns the judge of gradients of these variables that go to `optimizer`, Keras's or another."""
        dtypes = [_dtype_of(variable) for variable in variables]
        limits = {dtype: largest_gradient(optimizer, dtype) / replicas for dtype in set(dtypes)}
        return cls(
            limits=tuple(limits[dtype] for dtype in dtypes),
            raw=frozenset(index for index, variable in enumerate(variables) if holds_gradient(variable)),
            replicas=replicas,
            needs_amax=needs_amax,
        )

    @classmethod
    def of_unknown(cls, raw: Sequence[bool], replicas: int, needs_amax: bool) -> Judge:
        """Returns the judge of gradients whose variables are not known, only which of them are `raw`."""
        indices = frozenset(index for index, is_raw in enumerate(raw) if is_raw)
        return cls((FLOAT32.max,) * len(raw), indices, replicas, needs_amax)

    def evidence(self, gradients: Sequence[Any], scale: Any, indices: Sequence[int], replica: Any = 0) -> Any:
        """Returns the evidence of one replica.

        Args:
            gradients: Of the scaled loss, at least one of them not None.
            scale: float32 scalar.
            indices: The index of each gradient's variable.
            replica: The number of this replica, from 0.
        """
        values: dict[int, list[Any]] = {}  # a variable that is given twice has two
        for index, gradient in zip(indices, gradients, strict=True):
            if gradient is not None:
                values.setdefault(index, []).append(values_of(gradient))
        count = len(self.limits)
        scaled = ops.stack([_sum(map(_sum_of_squares, values.get(index, ()))) for index in range(count)])
        factor = ops.square(scale)
        if self.raw:
            factor = ops.where(ops.convert_to_tensor([index in self.raw for index in range(count)]), 1.0, factor)
        quick, bounds = scaled / factor, [min(limit**2, FLOAT32.max / _MARGIN) for limit in self.limits]
        safe = ops.all(quick <= ops.convert_to_tensor(bounds, "float32"))  # NaN compares False
        for known in (scale >= _SURE_SCALES[0], scale <= _SURE_SCALES[1]):
            safe = ops.logical_and(safe, known)

        def looked_at() -> Any:
            return ops.stack(
                [_sum(self._squares(index, each, scale) for each in values.get(index, ())) for index in range(count)]
            )

        squares = ops.where(safe, quick, when(ops.logical_not(safe), looked_at, (count,)))
        if not self.needs_amax:
            return squares
        peak = _peak([self._unscaled(index, each, scale) for index, found in values.items() for each in found])
        return ops.concatenate([squares, ops.where(ops.equal(replica, ops.arange(self.replicas)), peak, 0.0)])

    def verdict(self, evidence: Any) -> Verdict:
        """Returns the verdict on the sum of all evidence."""
        count = len(self.limits)
        squares = evidence[:count]
        total = self.replicas * ops.sum(squares)
        # No comparison: of a scalar, grappler makes `not x <= y` into `x > y` (TensorFlow 2.21), and NaN passes.
        finite = ops.isfinite(_MARGIN * total)
        rank = ops.where(ops.isnan(squares), math.inf, ops.minimum(squares, FLOAT32.max))
        bad = ops.logical_and(ops.logical_not(finite), ops.equal(rank, ops.max(rank)))
        return Verdict(finite, bad, ops.sqrt(total), ops.max(evidence[count:]) if self.needs_amax else None)

    def _unscaled(self, index: int, values: Any, scale: Any) -> Any:
        wide = widened(values)
        return wide if index in self.raw else wide / ops.cast(scale, wide.dtype)

    def _squares(self, index: int, values: Any, scale: Any) -> Any:
        unscaled = self._unscaled(index, values, scale)
        good = ops.all(ops.abs(unscaled) <= self.limits[index])  # NaN compares False
        return ops.where(good, _single(ops.sum(ops.square(unscaled))), math.nan)


def _dtype_of(variable: Any) -> str:
    # TensorFlow 1's variables of old have a dtype of references.
    return str(keras.backend.standardize_dtype(getattr(variable.dtype, "base_dtype", variable.dtype)))


def _single(value: Any) -> Any:
    return ops.cast(value, "float32")


def _sum(values: Iterable[Any]) -> Any:
    found = list(values)
    return functools.reduce(operator.add, found) if found else 0.0


def _sum_of_squares(values: Any) -> Any:
    wide = widened(values)
    if keras.backend.backend() != "tensorflow":
        return _single(ops.sum(ops.square(wide)))
    import tensorflow as tf

    return _single(2.0 * tf.nn.l2_loss(wide))  # one kernel, and no temporary


def _peak(values: Sequence[Any]) -> Any:
    peaks = ops.stack([_single(ops.max(ops.abs(each), initial=0)) for each in values])
    return ops.minimum(ops.max(peaks), FLOAT32.max)
