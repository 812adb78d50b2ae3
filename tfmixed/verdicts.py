"""What the gradients of a step say: evidence of each replica, and a verdict on all of them. For every Keras backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import ml_dtypes
from keras import ops

from tfmixed.branching import when
from tfmixed.formats import FLOAT32
from tfmixed.gradients import holds_gradient, is_double, values_of, widened

# Below, values whose squares vanish in the sum may be large once they are unscaled.
_LEAST_SURE = 2.0**-40
# Optimizers, Keras's and TensorFlow 1's, whose state has no squares of gradients.
_LINEAR = ("SGD", "Lion", "GradientDescentOptimizer", "MomentumOptimizer")


class Verdict(NamedTuple):
    """What the gradients of one step say, on all replicas together.

    Args:
        finite: Boolean scalar: is every value of every unscaled gradient finite?
        bad: Boolean vector, one entry a variable of the optimizer: is a value of its gradient not?
        norm: float32 scalar, the L2 norm of all unscaled gradients together. Non-finite where a gradient is, and where
            the sum of squares leaves float32 (a norm above 1.8e19). Repeated rows of `tf.IndexedSlices` count one by
            one, as they do in `tf.linalg.global_norm`. With several replicas it is sqrt(replicas * the sum of their
            squared norms): the norm of their sum where they agree, above it where they do not. The norm itself would
            take a second reduction of all gradients.
        amax: float32 scalar, the largest absolute value on any replica; None where nobody asked.
        divisor: float32 scalar, what to divide the gradients by: the scale; or more, where finite gradients would
            overflow in the arithmetic of the inner optimizer.
    """

    finite: Any
    bad: Any
    norm: Any
    amax: Any
    divisor: Any

    @property
    def culprit(self) -> Any:
        """The index of the first variable whose gradient is not finite, an integer scalar; -1 where all are."""
        return ops.where(self.finite, -1, ops.argmax(ops.cast(self.bad, "int32")))


class Judge(NamedTuple):
    """Turns the scaled gradients of each replica into evidence, and the sum of the evidence into a verdict.

    The sum of squares is one pass that stores nothing. Where it shows that the norm, and so each value, is far from
    all limits, nothing else is looked at. Where it does not, because a gradient is not finite or because its square is
    not, each value is.

    The evidence is one float32 vector, since strategies sum and know no maximum: for each variable 1 if its gradient
    is not finite, then the sum of squares, then the replica's largest absolute value in a place of its own; all of it
    unscaled.

    Args:
        dtypes: Those of the optimizer's variables. A gradient must be finite in its variable's dtype.
        elements: How many numbers these variables hold together.
        raw: Indices of variables whose gradients are not scaled.
        replicas: How many there are.
        summands: How many gradients the inner optimizer adds up, over replicas and accumulated steps: their sum must
            be finite too.
        squares: The inner optimizer squares gradients as they are: their squares must be finite in the variable's dtype
            too, or its second moments would make every later step NaN.
        norms: It sums squares, to clip by the norm for instance: the sum must be finite in float32 too.
        needs_amax: Measure the largest absolute value in every step.
    """

    dtypes: tuple[str, ...]
    elements: int
    raw: frozenset[int] = frozenset()
    replicas: int = 1
    summands: int = 1
    squares: bool = False
    norms: bool = False
    needs_amax: bool = False

    @classmethod
    def of(cls, optimizer: Any, variables: Sequence[Any], replicas: int, needs_amax: bool) -> Judge:
        """Returns the judge of gradients of these variables that go to `optimizer`, Keras's or another."""
        linear = any(kind.__name__ in _LINEAR for kind in type(optimizer).__mro__)
        squares = not linear and getattr(optimizer, "clipvalue", None) is None
        by_norm = any(getattr(optimizer, name, None) is not None for name in ("clipnorm", "global_clipnorm"))
        return cls(
            dtypes=tuple(map(_dtype_of, variables)),
            elements=sum(map(_elements, variables)),
            raw=frozenset(index for index, variable in enumerate(variables) if holds_gradient(variable)),
            replicas=replicas,
            summands=replicas * (getattr(optimizer, "gradient_accumulation_steps", None) or 1),
            squares=squares and not by_norm,
            norms=squares or by_norm,
            needs_amax=needs_amax,
        )

    @classmethod
    def of_unknown(cls, gradients: Sequence[tuple[Any, bool]], replicas: int, needs_amax: bool) -> Judge:
        """Returns the judge of gradients whose variables are not known, only which of them are `raw`."""
        return cls(
            dtypes=tuple("float64" if is_double(values_of(each)) else "float32" for each, _ in gradients),
            elements=1,
            raw=frozenset(index for index, (_, is_raw) in enumerate(gradients) if is_raw),
            replicas=replicas,
            needs_amax=needs_amax,
        )

    def evidence(self, gradients: Sequence[Any], scale: Any, indices: Sequence[int], replica: Any = 0) -> Any:
        """Returns the evidence of one replica.

        Args:
            gradients: Of the scaled loss, at least one of them not None.
            scale: float32 scalar.
            indices: The index of each gradient's variable.
            replica: The number of this replica, from 0.
        """
        values = {index: values_of(each) for index, each in zip(indices, gradients, strict=True) if each is not None}
        scaled = _sum_of_squares([each for index, each in values.items() if index not in self.raw])
        others = _sum_of_squares([each for index, each in values.items() if index in self.raw])
        norm = ops.sqrt(scaled) / scale
        safe = ops.logical_and(norm <= self._limit(), ops.sqrt(others) <= self._limit())  # NaN compares False
        safe = ops.logical_and(safe, scale >= _LEAST_SURE)
        # Said on its own: a compiler may compare squares instead of roots, and the square of the limit is inf.
        safe = ops.logical_and(safe, ops.isfinite(scaled + others))
        count, places = len(self.dtypes), ops.equal(replica, ops.arange(self.replicas))

        def looked_at() -> Any:
            unscaled = {index: self._unscaled(index, each, scale) for index, each in values.items()}
            squares = ops.sum(ops.stack([_single(ops.sum(ops.square(each))) for each in unscaled.values()]))
            bad = [self._is_bad(index, unscaled[index]) if index in unscaled else 0.0 for index in range(count)]
            return ops.concatenate([ops.stack([*bad, squares]), ops.where(places, _peak(unscaled.values()), 0.0)])

        exact = when(ops.logical_not(safe), looked_at, (count + 1 + self.replicas,))
        squares = ops.where(safe, ops.square(norm) + others, exact[count])
        peaks = exact[count + 1 :]
        if self.needs_amax:
            unscaled = [self._unscaled(index, each, scale) for index, each in values.items()]
            peaks = ops.where(places, _peak(unscaled), 0.0)
        return ops.concatenate([exact[:count], ops.reshape(squares, (1,)), peaks])

    def verdict(self, evidence: Any, scale: Any) -> Verdict:
        """Returns the verdict on the sum of all evidence."""
        count = len(self.dtypes)
        bad = ops.greater(evidence[:count], 0.0)
        finite = ops.logical_not(ops.any(bad))
        norm, peak = ops.sqrt(self.replicas * evidence[count]), ops.max(evidence[count + 1 :])
        # Where nobody looked at each value the peak is 0, and there is nothing to shrink.
        shrink = ops.maximum(peak / self._peak_limit(), 1.0)
        divisor = scale * ops.where(finite, shrink, 1.0)
        return Verdict(finite, bad, norm, peak if self.needs_amax else None, divisor)

    def _unscaled(self, index: int, values: Any, scale: Any) -> Any:
        wide = widened(values)
        return wide if index in self.raw else wide / ops.cast(scale, wide.dtype)

    def _is_bad(self, index: int, values: Any) -> Any:
        # In a float64 variable a gradient of float32 can still be no more than float32's largest.
        kinds = (self.dtypes[index], keras.backend.standardize_dtype(values.dtype))
        limit = min(map(_largest, kinds))
        if self.squares or self.norms or self.summands > 1:
            limit = min(limit, FLOAT32.max)  # how much to shrink float64 is reckoned in float32
        good = ops.all(ops.abs(values) <= limit)  # NaN compares False
        # No `logical_not`: of a scalar, grappler makes `not x <= y` into `x > y` (TensorFlow 2.21), and NaN passes.
        return 1.0 - ops.cast(good, "float32")

    def _limit(self) -> float:
        """Returns the norm up to which all is well whatever the single values are."""
        return min(self._value_limit(), math.sqrt(FLOAT32.max) if self.norms else FLOAT32.max) * 0.99 / self.summands

    def _peak_limit(self) -> float:
        """Returns the largest value that the inner optimizer can be given."""
        together = math.sqrt(FLOAT32.max / self.elements) * 0.99 if self.norms else FLOAT32.max
        limit = min(self._value_limit(), together)
        # Below where rounding carries a sum over the edge, and where the reciprocal that XLA divides by is subnormal.
        return limit if self.summands == 1 else min(0.99 * limit / self.summands, 2.0**125)

    def _value_limit(self) -> float:
        largest = min(map(_largest, self.dtypes))
        return min(math.sqrt(largest) * 0.99 if self.squares else largest, FLOAT32.max)


def _dtype_of(variable: Any) -> str:
    # TensorFlow 1's variables of old have a dtype of references.
    return str(keras.backend.standardize_dtype(getattr(variable.dtype, "base_dtype", variable.dtype)))


def _elements(variable: Any) -> int:
    # Under TensorFlow 1's behavior a dimension is an object.
    return math.prod(variable.shape.as_list() if hasattr(variable.shape, "as_list") else variable.shape)


def _largest(dtype: str) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def _single(value: Any) -> Any:
    return ops.cast(value, "float32")


def _sum_of_squares(values: Sequence[Any]) -> Any:
    numbers = [_square(each) for each in values]
    if not numbers:
        return ops.zeros(())
    if keras.backend.backend() != "tensorflow":
        return ops.sum(ops.stack(numbers))
    import tensorflow as tf

    return tf.add_n(numbers)


def _square(values: Any) -> Any:
    wide = widened(values)
    if keras.backend.backend() != "tensorflow":
        return _single(ops.sum(ops.square(wide)))
    import tensorflow as tf

    return _single(2.0 * tf.nn.l2_loss(wide))  # one kernel, and no temporary


def _peak(values: Any) -> Any:
    peaks = ops.stack([_single(ops.max(ops.abs(each), initial=0)) for each in values])
    return ops.minimum(ops.max(peaks), FLOAT32.max)
