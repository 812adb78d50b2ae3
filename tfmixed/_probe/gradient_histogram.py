"""Taps on tensors: what is an identity forward counts the gradient that flows back. For every Keras backend.

A magnitude is read from the bits of its float32: the eight that are the exponent name its octave. So counts do not
depend on what a device does with subnormal numbers, and half-precision gradients are counted as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy
from keras import ops, tree
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

from tfmixed.records import GradientRange, Kind

OCTAVES, PARTS = 256, 4  # exponents of float32; see `GradientRange`
_MANTISSA_BITS, _BIAS = 23, 127
_FIRST_PART, _SECOND_PART = 2**23 - 2**13, 2**23 - 2**12  # mantissas of 2 - 2^-10 and 2 - 2^-11
_FINITE = 255 << _MANTISSA_BITS  # the bits of infinity
_PERTURBATION = 1 / 16
_HASH = -1_640_531_535  # 2^32 divided by the golden ratio, as an int32


class Tally:
    """Counts the magnitudes of one tensor's gradient. `add` takes what `magnitudes` returns."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all."""
        self.counts = numpy.zeros(OCTAVES * PARTS, "int64")
        self.smallest, self.largest = _FINITE, 0

    def add(self, counts: Any, smallest: Any, largest: Any) -> None:
        """Adds one gradient."""
        self.counts += numpy.asarray(counts)
        self.smallest, self.largest = min(self.smallest, int(smallest)), max(self.largest, int(largest))

    def range(self, name: str, kind: Kind, layer: str, dtype: str, noise: bool = False) -> GradientRange:
        """Returns what was counted, as a record."""
        octaves = self.counts.reshape(OCTAVES, PARTS).tolist()
        (zeros, *subnormal), nonfinite = octaves[0], sum(octaves[-1])
        found = {-_BIAS: (0, *subnormal)} | {place - _BIAS: tuple(octaves[place]) for place in range(1, OCTAVES - 1)}
        return GradientRange(
            name,
            kind,
            layer,
            dtype,
            zeros=zeros,
            nonfinite=nonfinite,
            largest=_magnitude(self.largest),
            smallest=_magnitude(self.smallest) if self.largest else 0.0,
            octaves={exponent: parts for exponent, parts in found.items() if any(parts)},
            noise=noise,
        )

    def cancels(self, perturbed: Tally) -> bool:
        """Returns whether this gradient cancels to less than 2^-10 of what it is the sum of.

        Args:
            perturbed: The same gradient, of a step whose taps perturb.
        """
        return _magnitude(perturbed.largest) > 2.0**10 * _PERTURBATION * _magnitude(self.largest)


def _magnitude(bits: int) -> float:
    return float(numpy.int32(bits).view("float32"))


def magnitudes(gradient: Any) -> tuple[Any, Any, Any]:
    """Returns counts by octave and part, and the bits of the smallest and the largest magnitude, 0 left out.

    Args:
        gradient: A float32 tensor.
    """
    bits = ops.bitwise_and(_bits(ops.reshape(gradient, (-1,))), 0x7FFFFFFF)
    mantissa = ops.bitwise_and(bits, 2**_MANTISSA_BITS - 1)
    limits = (1, _FIRST_PART, _SECOND_PART)
    part = sum(ops.cast(ops.greater_equal(mantissa, limit), "int32") for limit in limits)
    counts = _bincount(ops.right_shift(bits, _MANTISSA_BITS) * PARTS + part)
    finite = ops.less(bits, _FINITE)
    smallest = ops.min(ops.where(ops.logical_and(finite, ops.greater(bits, 0)), bits, _FINITE), initial=_FINITE)
    return counts, smallest, ops.max(ops.where(finite, bits, 0), initial=0)


def count(gradient: Any, tally: Tally, scale: float = 1.0) -> None:
    """Counts a gradient, now or whenever what is being traced runs.

    Args:
        gradient: A floating tensor, dense or `tf.IndexedSlices`. float64 is rounded to float32.
        tally: Where it is added.
        scale: What it is divided by before, in float32: exact for powers of two.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        gradient = tensorflow.convert_to_tensor(gradient)
    elif backend == "jax" and gradient.dtype.itemsize == 2:
        # Through the bits of its magnitude: on GPUs XLA leaves out a rounding to 16 bits that ends in a cast to 32.
        gradient = ops.view(ops.bitwise_and(ops.view(gradient, "uint16"), 0x7FFF), gradient.dtype)
    gradient = ops.cast(gradient, "float32")
    found = magnitudes(gradient if scale == 1 else gradient / scale)
    if backend == "tensorflow":
        import tensorflow

        tensorflow.numpy_function(tally.add, found, [])
    elif backend == "jax":
        import jax

        jax.debug.callback(tally.add, *found)
    else:
        tally.add(*map(ops.convert_to_numpy, found))


def tap(tensor: Any, tally: Tally, scale: float = 1.0, perturbed: bool = False) -> Any:
    """Returns a tensor of the same values whose gradient is counted, divided by `scale`.

    Args:
        tensor: A floating tensor.
        tally: Where its gradient is added.
        scale: What the gradient is divided by before it is counted.
        perturbed: Should what flows on be what `perturb` makes of it? Defaults to False.
    """

    def backward(gradient: Any) -> Any:
        count(gradient, tally, scale)
        return perturb(gradient) if perturbed else gradient

    return _TAPS[keras.backend.backend()](tensor, backward)


def perturb(gradient: Any) -> Any:
    """Returns a gradient with each value larger or smaller by a sixteenth, which of both its own bits decide."""
    bits = _bits(ops.reshape(ops.cast(gradient, "float32"), (-1,)))
    factors = ops.where(ops.less(bits * _HASH, 0), 1 + _PERTURBATION, 1 - _PERTURBATION)
    return gradient * ops.cast(ops.reshape(factors, ops.shape(gradient)), gradient.dtype)


def tapped(call: Callable[..., Any], tally: Tally, scale: float, perturbed: bool = False) -> Callable[..., Any]:
    """Returns a layer's `call` with taps on all that it gives, which stays what it is to Keras and to `inplace`."""

    def tap_one(x: Any) -> Any:
        if not _is_dense_float(x):
            return x
        y = tap(x, tally, scale, perturbed)
        if (mask := get_tensor_attr(x, "_keras_mask")) is not None:
            set_tensor_attr(y, "_keras_mask", mask)
        if (wide := get_tensor_attr(x, "_tfmixed_wide")) is not None:
            set_tensor_attr(y, "_tfmixed_wide", tap(wide, tally, scale, perturbed))
        return y

    @functools.wraps(call)
    def tapped_call(*args: Any, **kwargs: Any) -> Any:
        return tree.map_structure(tap_one, call(*args, **kwargs))

    return tapped_call


def _is_dense_float(x: Any) -> bool:
    if not ops.is_tensor(x) or type(x).__name__ in ("RaggedTensor", "SparseTensor", "IndexedSlices", "BCOO"):
        return False
    return "float" in keras.backend.standardize_dtype(x.dtype)


def _tap_tensorflow(tensor: Any, through: Callable[[Any], Any]) -> Any:
    import tensorflow

    @tensorflow.custom_gradient  # type: ignore[untyped-decorator]
    def identity(tensor: Any) -> Any:
        return tensorflow.identity(tensor), through

    return identity(tensor)


def _tap_jax(tensor: Any, through: Callable[[Any], Any]) -> Any:
    import jax

    @jax.custom_vjp  # type: ignore[untyped-decorator]
    def identity(tensor: Any) -> Any:
        return tensor

    identity.defvjp(lambda tensor: (tensor, None), lambda _, gradient: (through(gradient),))
    return identity(tensor)


def _tap_torch(tensor: Any, through: Callable[[Any], Any]) -> Any:
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor)  # what is written in place later does not take the hook along
        tensor.register_hook(through)
    return tensor


_TAPS = {"tensorflow": _tap_tensorflow, "jax": _tap_jax, "torch": _tap_torch}


def _bits(values: Any) -> Any:
    if keras.backend.backend() != "tensorflow":
        return ops.view(values, "int32")
    import tensorflow  # of unknown shapes Keras 3.15 can make no view

    return tensorflow.bitcast(values, "int32")


def _bincount(values: Any) -> Any:
    size, backend = OCTAVES * PARTS, keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        return tensorflow.math.bincount(values, minlength=size, maxlength=size)
    if backend == "jax":
        import jax

        return jax.numpy.bincount(values, length=size)
    return values.bincount(minlength=size)
