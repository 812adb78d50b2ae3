"""Histograms of gradients, filled during the backward pass, for every Keras backend.

A magnitude is read from the bits of its float32 value, whose exponent names the octave. So counts do not depend on how
a device treats subnormal numbers, and half-precision gradients are counted without rounding.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy
from keras import ops

from tfmixed._probe import tensor_hooks
from tfmixed.records import GradientRange, Kind

OCTAVES, PARTS = 256, 4  # exponents of float32; see `GradientRange`
_MANTISSA_BITS, _BIAS = 23, 127
_PART_LIMITS = (1, 2**23 - 2**13, 2**23 - 2**12)  # mantissas above 1, of 2 - 2^-10 and of 2 - 2^-11
_INFINITY_BITS = 255 << _MANTISSA_BITS
_PERTURBATION = 1 / 16
_HASH = -1_640_531_535  # 2^32 divided by the golden ratio, as an int32


class Histogram:
    """Histogram of the magnitudes of one tensor's gradient."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Removes all counts."""
        self.counts = numpy.zeros(OCTAVES * PARTS, "int64")
        self.smallest, self.largest = _INFINITY_BITS, 0

    def add(self, counts: Any, smallest: Any, largest: Any) -> None:
        """Adds the results of `_magnitudes` for one gradient."""
        self.counts += numpy.asarray(counts)
        self.smallest, self.largest = min(self.smallest, int(smallest)), max(self.largest, int(largest))

    def range(self, name: str, kind: Kind, layer: str, dtype: str, noise: bool = False) -> GradientRange:
        """Returns the histogram as a record."""
        octaves = self.counts.reshape(OCTAVES, PARTS).tolist()
        (zeros, *subnormal), nonfinite = octaves[0], sum(octaves[-1])
        octaves[0] = [0, *subnormal]
        return GradientRange(
            name,
            kind,
            layer,
            dtype,
            zeros=zeros,
            nonfinite=nonfinite,
            largest=_magnitude(self.largest),
            smallest=_magnitude(self.smallest) if self.largest else 0.0,
            octaves={place - _BIAS: tuple(parts) for place, parts in enumerate(octaves[:-1]) if any(parts)},
            noise=noise,
        )

    def cancels(self, perturbed: Histogram) -> bool:
        """Returns whether this gradient cancels to less than 2^-10 of the terms that it is the sum of.

        Args:
            perturbed: The histogram of the same gradient in a perturbed step.
        """
        return _magnitude(perturbed.largest) > 2.0**10 * _PERTURBATION * _magnitude(self.largest)


def _magnitude(bits: int) -> float:
    return float(numpy.int32(bits).view("float32"))


def add_gradient(histogram: Histogram, gradient: Any, scale: float = 1.0) -> None:
    """Adds a gradient to a histogram, immediately or whenever the traced function runs.

    Args:
        histogram: The histogram.
        gradient: A floating tensor, dense or `tf.IndexedSlices`. float64 is rounded to float32.
        scale: The loss scale. The gradient is divided by it in float32, which is exact for powers of two. Defaults to
            1.
    """
    backend = keras.backend.backend()
    gradient = tensor_hooks.dense(gradient)
    if backend == "jax" and gradient.dtype.itemsize == 2:
        # Through the bits of its magnitude: on GPUs XLA omits a rounding to 16 bits that is followed by a cast to 32.
        gradient = ops.view(ops.bitwise_and(ops.view(gradient, "uint16"), 0x7FFF), gradient.dtype)
    gradient = ops.cast(gradient, "float32")
    tensor_hooks.deliver(histogram.add, *_magnitudes(gradient if scale == 1 else gradient / scale))


def _magnitudes(gradient: Any) -> tuple[Any, Any, Any]:
    """Returns counts by octave and part, and the bits of the smallest nonzero and the largest finite magnitude."""
    bits = ops.bitwise_and(tensor_hooks.bits(gradient), 0x7FFFFFFF)
    mantissa = ops.bitwise_and(bits, 2**_MANTISSA_BITS - 1)
    part = sum(ops.cast(ops.greater_equal(mantissa, limit), "int32") for limit in _PART_LIMITS)
    counts = _bincount(ops.right_shift(bits, _MANTISSA_BITS) * PARTS + part)
    finite = ops.less(bits, _INFINITY_BITS)
    nonzero = ops.where(ops.logical_and(finite, ops.greater(bits, 0)), bits, _INFINITY_BITS)
    return counts, ops.min(nonzero, initial=_INFINITY_BITS), ops.max(ops.where(finite, bits, 0), initial=0)


def _bincount(values: Any) -> Any:
    size, backend = OCTAVES * PARTS, keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        return tensorflow.math.bincount(values, minlength=size, maxlength=size)
    if backend == "jax":
        import jax

        return jax.numpy.bincount(values, length=size)
    return values.bincount(minlength=size)


def perturb(gradient: Any) -> Any:
    """Returns a gradient with each value increased or decreased by 1/16, depending on a hash of its bits."""
    increased = ops.less(tensor_hooks.bits(ops.cast(gradient, "float32")) * _HASH, 0)
    factors = ops.where(increased, 1 + _PERTURBATION, 1 - _PERTURBATION)
    return gradient * ops.cast(ops.reshape(factors, ops.shape(gradient)), gradient.dtype)
