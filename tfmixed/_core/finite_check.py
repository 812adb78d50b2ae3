"""Checks gradients for overflow and computes their global norm across replicas. For every Keras backend."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy

from tfmixed._core import scalar_ops as ops
from tfmixed._core.control_flow import cond
from tfmixed._core.gradients import holds_gradient, values_of, widened
from tfmixed._core.inner_optimizer import parts
from tfmixed.formats import FLOAT32

# Between these scales the square of a scale is far from the limits of float32. Below the first, the square of a value
# that is large after unscaling can vanish.
_SAFE_SCALES = 2.0**-40, 2.0**40
# Room for sums of squares in another order, such as those of a clip by the norm.
_MARGIN = 1.01
# Checking gradients of one shape together copies them. Elements of one gradient up to which that is done, and of all
# gradients up to which nothing else is.
_SMALL = 2**16
_FEW = {"jax": 2**20, "tensorflow": 2**15, "torch": 0}


class CheckResult(NamedTuple):
    """Result of a finite check, or of several checks of one step together. The same on all replicas.

    Args:
        finite: Boolean scalar, True if all values of the unscaled gradients, and `norm`, are finite.
        squares: float32 vector with one entry for each variable of the optimizer: the sum of the squares of its
            gradient, NaN if a value is not finite. None if only `first` is known.
        norm: float32 scalar, the L2 norm of all unscaled gradients together, finite if and only if the step is. A norm
            above 1.8e19 is not finite, since float32 cannot hold its square. Repeated rows of `tf.IndexedSlices` count
            one by one, as in `tf.linalg.global_norm`. With several replicas it is sqrt(replicas * the sum of their
            squared norms), which is the norm of the summed gradients where replicas agree and above it where they
            differ. The exact norm would take a second reduction of all gradients.
        amax: float32 scalar, the largest absolute value on any replica, or None if it was not measured.
        first: Integer scalar, the `first_overflow` of several checks. Defaults to None.
    """

    finite: Any
    squares: Any
    norm: Any
    amax: Any
    first: Any = None

    @property
    def overflowed(self) -> Any:
        """Boolean vector, True for each variable whose gradient has a value that is not finite.

        If all values are finite and their norm is not, True for the gradients of the largest norm. Computed when it is
        read, since a finite step does not read it.
        """
        rank = ops.where(ops.isnan(self.squares), math.inf, ops.minimum(self.squares, FLOAT32.max))
        return ops.logical_and(ops.logical_not(self.finite), ops.equal(rank, ops.max(rank)))

    @property
    def first_overflow(self) -> Any:
        """Index of the first variable whose gradient is not finite, an integer scalar; -1 if all are finite."""
        if self.squares is None:
            return self.first
        return ops.where(self.finite, -1, ops.argmax(ops.cast(self.overflowed, "int32")))


class FiniteCheck(NamedTuple):
    """Finite check of one optimizer: `measure` on each replica, a sum over replicas, then `result`.

    `measure` returns one float32 vector: for each variable the sum of the squares of its unscaled gradient, NaN if a
    value is not finite. Strategies can sum and not take a maximum, so each replica has its own entry for the largest
    absolute value, if that is measured.

    The sum of squares is one pass that stores nothing. If it shows that all values are within their limits, nothing
    else is computed.

    Args:
        limits: Largest finite value of the unscaled gradient of each variable.
        raw: Indices of variables whose gradients are not scaled.
        replicas: Number of replicas. Defaults to 1.
        needs_amax: If True, measures the largest absolute value. Defaults to False.
    """

    limits: tuple[float, ...]
    raw: frozenset[int] = frozenset()
    replicas: int = 1
    needs_amax: bool = False

    @classmethod
    def for_variables(cls, optimizer: Any, variables: Sequence[Any], replicas: int, needs_amax: bool) -> FiniteCheck:
        """Returns the check of gradients of these variables for `optimizer`, of Keras or another library."""
        dtypes = [_dtype_of(variable) for variable in variables]
        limits = {dtype: _largest_gradient(optimizer, dtype) / replicas for dtype in set(dtypes)}
        return cls(
            limits=tuple(limits[dtype] for dtype in dtypes),
            raw=frozenset(index for index, variable in enumerate(variables) if holds_gradient(variable)),
            replicas=replicas,
            needs_amax=needs_amax,
        )

    @classmethod
    def for_gradients(cls, raw: Sequence[bool], replicas: int, needs_amax: bool) -> FiniteCheck:
        """Returns the check of gradients whose variables are unknown, except for which of them are `raw`."""
        indices = frozenset(index for index, is_raw in enumerate(raw) if is_raw)
        return cls((FLOAT32.max,) * len(raw), indices, replicas, needs_amax)

    @ops.quiet
    def measure(self, gradients: Sequence[Any], scale: Any, indices: Sequence[int], replica: Any = 0) -> Any:
        """Returns the statistics of one replica, which `result` takes summed over replicas.

        Args:
            gradients: Gradients of the scaled loss, at least one of them not None.
            scale: float32 scalar.
            indices: Index of each gradient's variable.
            replica: Number of this replica. Defaults to 0.
        """
        values: dict[int, list[Any]] = {}  # a variable that is given twice has two
        for index, gradient in zip(indices, gradients, strict=True):
            if gradient is not None:
                values.setdefault(index, []).append(values_of(gradient))
        squares = self._all_squares(values, scale) if _are_small(values) else self._quick_squares(values, scale)
        if not self.needs_amax:
            return squares
        unscaled = (self._unscaled(index, tensor, scale) for index, found in values.items() for tensor in found)
        peaks = _vector([_single(keras.ops.max(keras.ops.abs(tensor), initial=0)) for tensor in unscaled])
        peak = ops.minimum(ops.max(peaks), FLOAT32.max)
        return ops.concatenate([squares, ops.where(ops.equal(replica, ops.arange(self.replicas)), peak, 0.0)])

    def _quick_squares(self, values: Mapping[int, Sequence[Any]], scale: Any) -> Any:
        """Returns the sums of squares. Values are checked one by one only if the sums do not show them to be finite."""
        count = len(self.limits)
        scaled = _sums_of_squares(values, count)
        factor = ops.square(scale)
        if self.raw:
            factor = ops.where(ops.convert_to_tensor([index in self.raw for index in range(count)]), 1.0, factor)
        quick, bounds = scaled / factor, [min(limit**2, FLOAT32.max / _MARGIN) for limit in self.limits]
        is_safe = ops.all(quick <= ops.convert_to_tensor(bounds, "float32"))  # NaN compares False
        for is_known in (scale >= _SAFE_SCALES[0], scale <= _SAFE_SCALES[1]):
            is_safe = ops.logical_and(is_safe, is_known)

        if ops.ON_HOST:
            return quick if is_safe else self._all_squares(values, scale)
        check_all = functools.partial(self._all_squares, values, scale)
        return ops.where(is_safe, quick, cond(ops.logical_not(is_safe), check_all, (count,)))

    def _all_squares(self, values: Mapping[int, Sequence[Any]], scale: Any) -> Any:
        """Returns the sums of squares, with each value checked, in one operation for all small gradients of a shape."""
        groups: dict[Any, list[tuple[int, Any]]] = {}
        for index, found in values.items():
            for tensor in found:
                kind = str(tensor.shape), tensor.dtype, self.limits[index], index in self.raw
                is_small = _size(tensor) <= _SMALL and not _is_in_parts()
                groups.setdefault(kind if is_small else id(tensor), []).append((index, tensor))
        squares: dict[int, list[Any]] = {}
        for members in groups.values():
            indices, tensors = zip(*members, strict=True)
            is_one = len(tensors) == 1
            unscaled = self._unscaled(indices[0], tensors[0] if is_one else keras.ops.stack(tensors), scale)
            is_finite = keras.ops.abs(unscaled) <= self.limits[indices[0]]  # NaN compares False
            finite = keras.ops.where(is_finite, keras.ops.square(unscaled), math.nan)
            sums = _single(keras.ops.sum(finite, axis=None if is_one else tuple(range(1, len(finite.shape)))))
            for index, number in zip(indices, [sums] if is_one else keras.ops.unstack(sums, len(indices)), strict=True):
                squares.setdefault(index, []).append(number)
        return _vector([_sum(squares.get(index, ())) for index in range(len(self.limits))])

    @ops.quiet
    def result(self, statistics: Any) -> CheckResult:
        """Returns the result of the statistics summed over all replicas."""
        count = len(self.limits)
        squares = statistics[:count]
        total = self.replicas * ops.sum(squares)
        # No comparison: of a scalar, grappler makes `not x <= y` into `x > y` (TensorFlow 2.21), and NaN passes.
        finite = ops.isfinite(_MARGIN * total)
        amax = ops.max(statistics[count:]) if self.needs_amax else None
        return CheckResult(finite, squares, ops.sqrt(total), amax)

    def _unscaled(self, index: int, values: Any, scale: Any) -> Any:
        wide = widened(values)
        return wide if index in self.raw else wide / keras.ops.cast(scale, wide.dtype)


def _are_small(values: Mapping[int, Sequence[Any]]) -> bool:
    """Returns whether it is faster to check each value than to branch."""
    size = sum(map(_size, itertools.chain.from_iterable(values.values())))
    return size <= _FEW[keras.backend.backend()] and not _is_in_parts()


def _is_in_parts() -> bool:
    """Returns whether `keras.distribution` may split gradients, so that a stack of them would gather them."""
    return keras.distribution.distribution() is not None


def _size(tensor: Any) -> float:
    """Returns the number of elements, infinity if it is not known."""
    is_known = getattr(tensor.shape, "rank", 0) is not None and None not in tuple(tensor.shape)
    return math.prod(tensor.shape) if is_known else math.inf


def _dtype_of(variable: Any) -> str:
    if isinstance(variable, keras.Variable):
        return variable.dtype
    # Reference variables of TensorFlow 1 have a dtype of references.
    return str(keras.backend.standardize_dtype(getattr(variable.dtype, "base_dtype", variable.dtype)))


def _single(value: Any) -> Any:
    return keras.ops.cast(value, "float32")


def _sum(values: Iterable[Any]) -> Any:
    found = list(values)
    return functools.reduce(operator.add, found) if found else 0.0


def _vector(scalars: Sequence[Any]) -> Any:
    """Returns a vector of scalar tensors, on PyTorch on the host."""
    vector = keras.ops.stack(scalars)
    return ops.convert_to_numpy(vector) if ops.ON_HOST else vector


def _sums_of_squares(values: Mapping[int, Sequence[Any]], count: int) -> Any:
    """Returns for each of `count` variables the sum of the squares of its gradients."""
    if not ops.ON_HOST:
        return _vector([_sum(map(_sum_of_squares, values.get(index, ()))) for index in range(count)])
    import torch

    places = [index for index, found in values.items() for _ in found]
    with torch.no_grad():
        norms = torch._foreach_norm([widened(tensor) for found in values.values() for tensor in found])
        squares = numpy.square(torch.stack(norms).float().cpu().numpy())  # waits for the device, once in a step
    sums = numpy.zeros(count, "float32")
    numpy.add.at(sums, places, squares)
    return sums


def _sum_of_squares(values: Any) -> Any:
    wide = widened(values)
    if keras.backend.backend() != "tensorflow":
        return _single(keras.ops.sum(keras.ops.square(wide)))
    import tensorflow as tf

    return _single(2.0 * tf.nn.l2_loss(wide))  # one kernel, and no temporary


def _largest_gradient(optimizer: Any, dtype: str) -> float:
    """Returns the largest gradient that `optimizer` can take for variables of a floating-point dtype.

    A gradient must be finite in that dtype, with all those that are accumulated. It is also squared in that dtype, for
    second moments, unless the optimizer is known not to square it, or clips it first. If the dtype has the range of
    float32, the limit is that of float32: a norm that float32 can hold has a square and sums that it can hold.
    """
    largest = float(ml_dtypes.finfo(dtype).max)
    if largest > FLOAT32.max / 2:  # the largest bfloat16 number is a little below
        return FLOAT32.max
    root, limit = math.sqrt(largest), largest
    for part in parts(optimizer)[1:] or [optimizer]:
        limit = min(limit, largest / (getattr(part, "gradient_accumulation_steps", None) or 1))
        if not (_is_linear(part) or _clip(part) <= root):
            limit = min(limit, root)
    return 0.99 * limit  # rounding to the dtype must not exceed its largest number


def _is_linear(optimizer: Any) -> bool:
    """Returns whether an optimizer keeps no squares of gradients in its variables' dtype.

    Compares the function that takes the step, since a subclass that overrides it may do anything.
    """
    kinds, name = (keras.optimizers.SGD, keras.optimizers.Lion), "update_step"
    if not isinstance(optimizer, keras.optimizers.Optimizer) and keras.backend.backend() == "tensorflow":
        from tensorflow.compat.v1 import train

        kinds, name = (train.GradientDescentOptimizer, train.MomentumOptimizer), "_resource_apply_dense"
    step = getattr(getattr(optimizer, name, None), "__func__", None)
    return any(step is getattr(kind, name) for kind in kinds)


def _clip(optimizer: Any) -> float:
    """Returns the largest value that an optimizer's own clipping lets through."""
    bounds = (getattr(optimizer, name, None) for name in ("clipnorm", "global_clipnorm", "clipvalue"))
    return min((float(bound) for bound in bounds if bound and bound > 0), default=math.inf)
