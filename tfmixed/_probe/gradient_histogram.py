"""Histograms of gradients, filled by hooks on tensors during the backward pass, for every Keras backend.

A magnitude is read from the bits of its float32 value, whose exponent names the octave. So counts do not depend on how
a device treats subnormal numbers, and half-precision gradients are counted without rounding.
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
    if backend == "tensorflow":
        import tensorflow

        gradient = tensorflow.convert_to_tensor(gradient)
    elif backend == "jax" and gradient.dtype.itemsize == 2:
        # Through the bits of its magnitude: on GPUs XLA omits a rounding to 16 bits that is followed by a cast to 32.
        gradient = ops.view(ops.bitwise_and(ops.view(gradient, "uint16"), 0x7FFF), gradient.dtype)
    gradient = ops.cast(gradient, "float32")
    magnitudes = _magnitudes(gradient if scale == 1 else gradient / scale)
    if backend == "tensorflow":
        import tensorflow

        tensorflow.numpy_function(histogram.add, magnitudes, [])
    elif backend == "jax":
        import jax

        jax.debug.callback(histogram.add, *magnitudes)
    else:
        histogram.add(*map(ops.convert_to_numpy, magnitudes))


def _magnitudes(gradient: Any) -> tuple[Any, Any, Any]:
    """Returns counts by octave and part, and the bits of the smallest nonzero and the largest finite magnitude."""
    bits = ops.bitwise_and(_bits(gradient), 0x7FFFFFFF)
    mantissa = ops.bitwise_and(bits, 2**_MANTISSA_BITS - 1)
    part = sum(ops.cast(ops.greater_equal(mantissa, limit), "int32") for limit in _PART_LIMITS)
    counts = _bincount(ops.right_shift(bits, _MANTISSA_BITS) * PARTS + part)
    finite = ops.less(bits, _INFINITY_BITS)
    nonzero = ops.where(ops.logical_and(finite, ops.greater(bits, 0)), bits, _INFINITY_BITS)
    return counts, ops.min(nonzero, initial=_INFINITY_BITS), ops.max(ops.where(finite, bits, 0), initial=0)


def _bits(values: Any) -> Any:
    values = ops.reshape(values, (-1,))
    if keras.backend.backend() != "tensorflow":
        return ops.view(values, "int32")
    import tensorflow  # Keras 3.15's `view` needs a known shape

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


def hooked(call: Callable[..., Any], histogram: Histogram, scale: float, perturbed: bool = False) -> Callable[..., Any]:
    """Returns a layer's `call` with a gradient hook on each output.

    Masks and the float32 values that `tfmixed` attaches to half-precision tensors are kept.

    Args:
        call: The `call` of the layer.
        histogram: The histogram that the gradients are added to.
        scale: The loss scale that they are divided by.
        perturbed: Whether the gradients that flow on are perturbed. Defaults to False.
    """

    def backward(gradient: Any) -> Any:
        add_gradient(histogram, gradient, scale)
        return perturb(gradient) if perturbed else gradient

    def hook(x: Any) -> Any:
        if not _is_dense_float(x):
            return x
        y = _with_hook(x, backward)
        if (mask := get_tensor_attr(x, "_keras_mask")) is not None:
            set_tensor_attr(y, "_keras_mask", mask)
        if (wide := get_tensor_attr(x, "_tfmixed_wide")) is not None:
            set_tensor_attr(y, "_tfmixed_wide", _with_hook(wide, backward))
        return y

    @functools.wraps(call)
    def hooked_call(*args: Any, **kwargs: Any) -> Any:
        return tree.map_structure(hook, call(*args, **kwargs))

    return hooked_call


def perturb(gradient: Any) -> Any:
    """Returns a gradient with each value increased or decreased by 1/16, depending on a hash of its bits."""
    increased = ops.less(_bits(ops.cast(gradient, "float32")) * _HASH, 0)
    factors = ops.where(increased, 1 + _PERTURBATION, 1 - _PERTURBATION)
    return gradient * ops.cast(ops.reshape(factors, ops.shape(gradient)), gradient.dtype)


def _is_dense_float(x: Any) -> bool:
    if not ops.is_tensor(x) or type(x).__name__ in ("RaggedTensor", "SparseTensor", "IndexedSlices", "BCOO"):
        return False
    return "float" in keras.backend.standardize_dtype(x.dtype)


def _with_hook(tensor: Any, backward: Callable[[Any], Any]) -> Any:
    """Returns a tensor of the same values whose gradient is what `backward` returns for the gradient that arrives."""
    backend = keras.backend.backend()
    if backend == "torch":
        if tensor.requires_grad:
            tensor = tensor.view_as(tensor)  # a later in-place operation does not affect the hook
            tensor.register_hook(backward)
        return tensor
    if backend == "jax":
        import jax

        identity = jax.custom_vjp(lambda tensor: tensor)
        identity.defvjp(lambda tensor: (tensor, None), lambda _, gradient: (backward(gradient),))
        return identity(tensor)
    import tensorflow

    return tensorflow.custom_gradient(lambda tensor: (tensorflow.identity(tensor), backward))(tensor)
