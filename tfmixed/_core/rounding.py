"""Rounds float32 tensors to fewer bits: stochastic rounding, float32 split into two parts, blocks of 8-bit codes.

Works on bits, so that infinities, NaN and subnormal numbers keep their meaning on every backend. Random bits are a hash
of a counter: the same on every replica, worker and backend, and the same after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from tfmixed.formats import FLOAT32

# Values of a block of 8-bit codes share one scale.
BLOCK = 256
# XLA multiplies by the reciprocal, which must not be subnormal: kernels take it for 0.
_LARGEST_SCALE = 2.0**126
_MAGNITUDE, _INFINITY, _LARGEST_BFLOAT16, _QUIET = 0x7FFFFFFF, 0x7F800000, 0x7F7F0000, 0x400000


def random_bits(shape: Sequence[int], step: Any, stream: Any) -> Any:
    """Returns 16 pseudorandom bits for each element.

    Args:
        shape: Shape of the result.
        step: Integer scalar.
        stream: Integer, or int32 scalar. Streams are parts of one long sequence, from different places.

    Returns:
        An int32 tensor of values from 0 to 65,535.

    Source: a multiply-xorshift-multiply hash of a counter, with two primes of xxHash.
    """
    key = _mixed(ops.cast(step, "int32") + _times(stream, 0x9E3779B9))
    bits = _mixed(ops.arange(math.prod(shape), dtype="int32") + key)
    return ops.reshape(ops.bitwise_and(ops.right_shift(bits, 16), 0xFFFF), shape)


def to_bfloat16(values: Any, bits: Any) -> Any:
    """Rounds to one of the two neighbors in bfloat16, to the upper one with a probability equal to the distance from
    the lower one, so that the expectation is the value.

    Values between the largest bfloat16 number and infinity become the largest number. NaN stays NaN.

    Args:
        values: float32 tensor.
        bits: Random bits of the same shape.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015.
    """
    pattern = ops.view(values, "int32")
    magnitude = ops.bitwise_and(pattern, _MAGNITUDE)
    # A carry must reach neither infinity nor the sign, and a NaN must not lose all bits that make it one.
    pattern = ops.where(magnitude > _INFINITY, ops.bitwise_or(pattern, _QUIET), pattern)
    return _upper_half(pattern + ops.where(magnitude >= _LARGEST_BFLOAT16, 0, bits))


def split(values: Any) -> tuple[Any, Any]:
    """Splits float32 values into the nearest bfloat16 values and int16 differences of the bit patterns.

    A tie is rounded away from zero: rounded to even, both ties at an even number would have the same two parts.

    Source: the 16-bit remainders of Megatron-LM's distributed optimizer.
    """
    pattern = ops.view(values, "int32")
    is_nan = ops.bitwise_and(pattern, _MAGNITUDE) > _INFINITY
    pattern = ops.where(is_nan, _INFINITY + _QUIET, pattern)
    lower = ops.right_shift(ops.left_shift(pattern, 16), 16)
    return _upper_half(pattern + 0x8000), ops.cast(lower, "int16")


def join(upper: Any, lower: Any) -> Any:
    """Returns the float32 values that `split` has split.

    An upper half that was written since gives a value within half a bfloat16 step of it, and never NaN.
    """
    pattern, lower = ops.left_shift(ops.cast(ops.view(upper, "int16"), "int32"), 16), ops.cast(lower, "int32")
    magnitude = ops.bitwise_and(pattern, _MAGNITUDE)
    is_outside = ops.where(lower < 0, magnitude == 0, magnitude >= _INFINITY)
    return ops.view(pattern + ops.where(is_outside, 0, lower), "float32")


def to_blocks(values: Any, bits: Any = None) -> tuple[Any, Any]:
    """Encodes values in blocks of 256, with 8 bits for each value and a float32 scale for each block.

    Code `k` of a block stands for `(k / n)**4 * scale`, where `scale` is the largest magnitude in the block, and `n` is
    254 if no value is negative, else 127 for each sign. So second moments, which are never negative, have twice the
    resolution. In such a block no normal number has code 0, since an update may be divided by it. Encoding decoded
    values, rounded to nearest, gives the same values.

    A value becomes one of its two neighbors: an error below `4 / n` of the block's largest magnitude, and below
    `((k + 1)**4 - k**4) / n**4` of it at code `k`. NaN becomes 0, and magnitudes above 2**126 become 2**126,
    infinities included. If all magnitudes of a block are subnormal, they become 0.

    Args:
        values: float32 tensor.
        bits: Random bits of the codes' shape. Defaults to None, rounding to nearest.

    Returns:
        uint8 codes of shape (blocks, 256), 128 for 0 in blocks of both signs, and float32 scales of shape (blocks, 1),
        negative for blocks of both signs.

    Source: the block-wise quantization of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, with
    a power for the dynamic tree.
    """
    flat = ops.reshape(values, (-1,))
    blocks = ops.reshape(ops.pad(flat, [(0, -flat.shape[0] % BLOCK)]), (-1, BLOCK))
    blocks = ops.where(ops.isnan(blocks), 0.0, ops.clip(blocks, -_LARGEST_SCALE, _LARGEST_SCALE))
    magnitudes = ops.abs(blocks)
    largest = ops.max(magnitudes, axis=1, keepdims=True)
    scale = ops.where(largest < FLOAT32.smallest_normal, 0.0, largest)
    # Codes of a block of one sign include the values of one of both: decoded ones may lack the negative values.
    is_signed = ops.min(blocks, axis=1, keepdims=True) < 0
    count = ops.where(is_signed, 127.0, 254.0)
    shares = magnitudes / ops.where(scale > 0, scale, math.inf)
    code = ops.minimum(ops.floor(ops.sqrt(ops.sqrt(shares)) * count), count - 1)
    lower, upper = _power(code / count), _power((code + 1) / count)
    threshold = 0.5 if bits is None else (ops.cast(bits, "float32") + 0.5) / 2**16
    code = code + ops.cast(shares - lower > threshold * (upper - lower), "float32")
    code = ops.where(ops.logical_and(magnitudes > 0, ops.logical_not(is_signed)), ops.maximum(code, 1.0), code)
    code = ops.where(is_signed, 128 + ops.sign(blocks) * code, code)
    return ops.cast(code, "uint8"), ops.where(is_signed, -scale, scale)


def from_blocks(codes: Any, scales: Any, shape: Sequence[int]) -> Any:
    """Returns the float32 values of codes, of the shape that they had."""
    is_signed = scales < 0
    code = ops.cast(codes, "float32")
    shares = ops.where(is_signed, code - 128, code) / ops.where(is_signed, 127.0, 254.0)
    values = ops.sign(shares) * _power(shares) * ops.abs(scales)
    return ops.reshape(ops.reshape(values, (-1,))[: math.prod(shape)], shape)


def _power(shares: Any) -> Any:
    return ops.square(ops.square(shares))


def _upper_half(pattern: Any) -> Any:
    return ops.view(ops.cast(ops.right_shift(pattern, 16), "int16"), "bfloat16")


def _mixed(bits: Any) -> Any:
    """Returns int32 numbers whose upper 16 bits depend on all bits of the given ones."""
    # int32 wraps and shifts its sign on every backend, and PyTorch has no arithmetic for uint32.
    bits = bits * _signed(0x9E3779B1)
    bits = ops.bitwise_xor(bits, ops.bitwise_and(ops.right_shift(bits, 15), 0x1FFFF))
    return bits * _signed(0x85EBCA77)


def _times(stream: Any, factor: int) -> Any:
    return _signed(stream * factor) if isinstance(stream, int) else stream * _signed(factor)


def _signed(number: int) -> int:
    """Returns the int32 with the low 32 bits of a number."""
    return (number + 2**31) % 2**32 - 2**31
