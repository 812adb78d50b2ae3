"""Stochastic rounding, float32 numbers in two parts, and blocks of 8-bit codes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from backend import BACKEND, tf
from keras import ops
from thorough import covering

from tfmixed._core import rounding

LOWER = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
RNG = np.random.default_rng(0)
SINGLE = 254  # steps of a block of one sign
LARGEST, SMALLEST_NORMAL = float(np.finfo("float32").max), float(np.finfo("float32").smallest_normal)
HUGE = 2.0**126  # the largest value in a block


def patterns():
    """Returns float32 bit patterns with each of the 65,536 upper halves, each with several lower halves."""
    upper = np.arange(2**16, dtype="uint32")
    lower = [np.full(2**16, half, "uint32") for half in LOWER] + list(RNG.integers(0, 2**16, (2, 2**16), "uint32"))
    return np.concatenate([upper << 16 | half for half in lower])


def tensor(bits):
    """Returns float32 tensors with bit patterns: NaN keep their payload, which a conversion may change."""
    return ops.view(ops.convert_to_tensor(bits.view("int32")), "float32")


def bits(values):
    """Returns the unsigned bit patterns of a bfloat16 or float32 tensor."""
    size = 8 * np.dtype(np.float32).itemsize if "float32" in str(values.dtype) else 16
    return ops.convert_to_numpy(ops.view(values, f"int{size}")).view(f"uint{size}").astype("uint32")


def is_nan(pattern):
    return pattern & 0x7FFFFFFF > 0x7F800000


def p_value(count, draws, probability):
    """Returns the exact two-sided p-value of a binomial test."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, draws + 1)))])
    k = np.arange(draws + 1)
    logs = factorials[draws] - factorials - factorials[::-1]
    logs = logs + k * math.log(probability) + (draws - k) * math.log1p(-probability)
    return np.exp(logs[logs <= logs[count] + 1e-9]).sum()


# Random bits.


def bits_at(steps, size, stream=1):
    """Returns random bits of shape (steps, size)."""
    return ops.convert_to_numpy(ops.vectorized_map(lambda step: rounding.random_bits((size,), step, stream), steps))


def test_random_bits_are_the_same_everywhere():
    """On every backend, in every version: a saved run continues with the same noise."""
    values = ops.convert_to_numpy(rounding.random_bits((2, 3), 7, 5))
    np.testing.assert_array_equal(values, [[57492, 47697, 11387], [47666, 6816, 8057]])
    large = ops.convert_to_numpy(rounding.random_bits((3,), 2**31 - 1, 2**40 + 5))
    assert ((large >= 0) & (large < 2**16)).all()


@pytest.mark.parametrize("along", ["elements", "steps", "streams"])
def test_random_bits_are_uniform_and_uncorrelated(along):
    """Along elements of one step, steps of one element, and streams of one element and step.

    With n draws a correlation has a standard deviation of 1 / sqrt(n), and a chi-square of 255 degrees of freedom one
    of 22.6: five of them are a chance of 1 in a million each, for a hash that does not change.
    """
    count = 2**12 if along == "streams" else 2**15
    if along == "elements":
        draws = bits_at(ops.arange(3, 4), count)[0]
    elif along == "steps":
        draws = bits_at(ops.arange(count), 1)[:, 0]
    else:  # a stream is a number of steps apart from the first one
        steps = (np.arange(count) * 0x9E3779B9 + 3).astype("uint32").view("int32")
        draws = bits_at(ops.convert_to_tensor(steps), 1, 0)[:, 0]
    for part in (draws >> 8, draws & 255):
        counts = np.bincount(part, minlength=256)
        assert abs(((counts - count / 256) ** 2).sum() / (count / 256) - 255) < 5 * 22.6
    centered = draws - draws.mean()
    for lag in (1, 2, 3, 8, 64, 256):
        assert abs((centered[lag:] * centered[:-lag]).mean() / centered.var()) < 5 / count**0.5, lag


def test_steps_streams_and_elements_are_independent():
    """Differences between neighbors in two of them at once are uniform too."""
    near = [bits_at(ops.arange(first, first + 64), 512, stream) for first, stream in ((0, 1), (1, 1), (0, 2), (0, 3))]
    for index, one in enumerate(near):
        for two in near[index + 1 :]:
            product = ((one - 32767.5) * (two - 32767.5)).mean() / (2**32 / 12)
            assert abs(product) < 5 / one.size**0.5
            assert abs(((one - two) % 2**16).mean() / 2**16 - 0.5) < 5 * 12**-0.5 / one.size**0.5


# Stochastic rounding.


@pytest.mark.parametrize("noise", [0, 1, 0x7FFF, 0x8000, 0xFFFF, "random"])
def test_a_number_becomes_one_of_its_two_neighbors(noise):
    """For each upper half: exact values stay, infinities and NaN too, and a finite one becomes no infinity."""
    pattern = patterns()
    random = RNG.integers(0, 2**16, pattern.shape) if noise == "random" else np.full(pattern.shape, noise)
    rounded = bits(rounding.to_bfloat16(tensor(pattern), ops.convert_to_tensor(random.astype("int32"))))
    upper, lower, magnitude = pattern >> 16, pattern & 0xFFFF, pattern & 0x7FFFFFFF
    np.testing.assert_array_equal(is_nan(rounded << 16), is_nan(pattern))
    number = ~is_nan(pattern)
    assert np.isin(rounded - upper, (0, 1))[number].all()
    goes_up = (lower + random >= 2**16) & (magnitude < 0x7F7F0000)
    np.testing.assert_array_equal(rounded[number], (upper + goes_up)[number])
    np.testing.assert_array_equal((rounded & 0x7FFF == 0x7F80)[number], (magnitude == 0x7F800000)[number])
    with np.errstate(invalid="ignore", over="ignore"):
        nearest = pattern.view("float32").astype(ml_dtypes.bfloat16).view("uint16").astype("uint32")
    assert ((nearest == upper) | (nearest == upper + 1))[number].all()  # ml_dtypes agrees on the neighbors


@pytest.mark.parametrize("along", ["elements", "steps"])
@pytest.mark.parametrize("upper", [0x3F80, 0xC2AA, 0x0003], ids=["1", "-85", "subnormal"])
def test_rounding_is_unbiased(along, upper):
    """A number between its neighbors goes up as often as its distance tells: p of the exact binomial test."""
    noise, lower = _noise(along), np.array([1, 0x0123, 0x4000, 0x5555, 0x8000, 0xC000, 0xFFFF], "uint32")
    pattern = np.repeat(upper << 16 | lower[:, None], noise.size, axis=1)
    rounded = bits(rounding.to_bfloat16(tensor(pattern), ops.convert_to_tensor(noise)))
    for half, row in zip(lower, rounded, strict=True):
        assert p_value(int((row == upper + 1).sum()), noise.size, half / 2**16) > 1e-3


_NOISE = {}


def _noise(along):
    if along not in _NOISE:
        shape = {"elements": (1, 2**17), "steps": (2**16, 2)}[along]
        _NOISE[along] = bits_at(ops.arange(shape[0]), shape[1], 4).reshape(-1).astype("int32")
    return _NOISE[along]


# Two parts.


def test_two_parts_are_the_number():
    """For each upper half with ties and neighbors of ties. The upper part is the nearest, ties away from zero."""
    pattern = patterns()
    upper, lower = rounding.split(tensor(pattern))
    joined, number = bits(rounding.join(upper, lower)), ~is_nan(pattern)
    np.testing.assert_array_equal(joined[number], pattern[number])
    rounded = bits(upper)
    np.testing.assert_array_equal(rounded[number], (pattern + 0x8000 >> 16)[number])
    np.testing.assert_array_equal(is_nan(rounded << 16), ~number)
    assert is_nan(joined[~number]).all()
    is_tie = pattern & 0xFFFF == 0x8000
    with np.errstate(invalid="ignore", over="ignore"):
        nearest = pattern.view("float32").astype(ml_dtypes.bfloat16).view("uint16").astype("uint32")
    np.testing.assert_array_equal(rounded[number & ~is_tie], nearest[number & ~is_tie])


# 8-bit blocks.


def encoded(values, noise=None, jit=False):
    """Returns codes, scales and decoded values as NumPy arrays."""

    def code(values, noise):
        codes, scales = rounding.to_blocks(values, noise)
        return codes, scales, rounding.from_blocks(codes, scales, values.shape)

    if jit:
        code = jitted(code)
    return [ops.convert_to_numpy(part) for part in code(ops.convert_to_tensor(values), noise)]


def jitted(function):
    """Returns a function compiled by XLA, which divides and handles subnormal numbers in other ways."""
    if BACKEND == "tensorflow":
        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    return function


def check_bound(values, decoded):
    """Checks the error that the docstring of `to_blocks` states."""
    padded = [np.pad(array.reshape(-1).astype("float64"), (0, -array.size % 256)) for array in (values, decoded)]
    blocks, found = (array.reshape(-1, 256) for array in padded)
    largest, n = np.abs(blocks).max(1, keepdims=True), np.where(blocks.min(1, keepdims=True) < 0, 127, SINGLE)
    largest = np.where(largest < SMALLEST_NORMAL, math.inf, largest)  # becomes 0
    shares, error = np.abs(blocks) / largest, np.abs(found - blocks)
    k = np.minimum(np.floor(shares**0.25 * n), n - 1)
    step = ((k + 1) ** 4 - k**4) / n**4
    # float32 arithmetic, and results below the smallest normal number, which some kernels take for 0.
    limit = np.where(np.isinf(largest), SMALLEST_NORMAL, step * largest) * (1 + 1e-5) + 1e-6 * np.abs(blocks)
    assert (error <= limit + SMALLEST_NORMAL).all()
    assert (error <= 4 / n * np.where(np.isinf(largest), 1, largest) + SMALLEST_NORMAL).all()


SCALES = (1e-38, 1e-36, 1e-33, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e30, 8e37)


def blocks_of(sign, decades):
    """Returns float32 values in blocks of many scales, the last of which is short."""
    values = RNG.normal(size=(len(SCALES), 3, 256)) * 10.0 ** RNG.uniform(-decades, 0, (len(SCALES), 3, 256))
    values *= np.reshape(SCALES, (-1, 1, 1))
    if sign != "both":
        values = np.abs(values)
    if sign == "hardly":
        values[:, :, 1] = -1e-12 * values.max(2)
    return values.clip(-HUGE, HUGE).astype("float32").reshape(-1)[:-9]


def noise_of(values):
    shape = -(-values.size // 256), 256
    return ops.convert_to_tensor(RNG.integers(0, 2**16, shape).astype("int32"))


@pytest.mark.parametrize(("sign", "noisy", "jit"), covering(2, ["both", "one", "hardly"], [False, True], [False, True]))
def test_blocks_are_within_the_bound(sign, noisy, jit):
    """Of the docstring, for scales from 1e-38 to 3e38 and magnitudes that span twelve decades."""
    values = blocks_of(sign, decades=12)
    decoded = encoded(values, noise_of(values) if noisy else None, jit)[2]
    assert np.isfinite(decoded).all()
    check_bound(values, decoded)


@pytest.mark.parametrize(("sign", "jit"), covering(1, ["hardly", "both", "one"], [True, False]))
def test_blocks_of_decoded_values_decode_to_the_same(sign, jit):
    """Bit for bit, since files hold decoded values. Also if no negative value has a code of its own."""
    values = blocks_of(sign, decades=6)
    once = encoded(values, noise_of(values), jit)[2]
    np.testing.assert_array_equal(encoded(once, None, jit)[2], once)


@pytest.mark.parametrize("shape", [(), (257,), (5, 7, 11)], ids=str)
def test_shapes(shape):
    """Of any size, with a block that is not full."""
    values = RNG.normal(size=shape).astype("float32")
    codes, scales, decoded = encoded(values)
    blocks = -(-values.size // 256)
    assert (codes.shape, scales.shape, decoded.shape) == ((blocks, 256), (blocks, 1), shape)
    assert (codes.dtype, scales.dtype, decoded.dtype) == ("uint8", "float32", "float32")
    check_bound(values, decoded)


def test_every_code_is_kept():
    """All codes of blocks of one sign, and of both."""
    for codes, scale in ((np.arange(SINGLE + 1), 1.5), (np.arange(1, 256), -1.5)):
        block = np.pad(codes, (0, 256 - len(codes)), constant_values=codes[-1]).astype("uint8")[None]
        decoded = rounding.from_blocks(
            ops.convert_to_tensor(block), ops.convert_to_tensor([[scale]], "float32"), (256,)
        )
        again, scales, _ = encoded(ops.convert_to_numpy(decoded))
        np.testing.assert_array_equal(again, block)
        np.testing.assert_array_equal(scales, [[scale]])


SPECIAL = {
    "zeros": ([0.0, -0.0, 0.0], [0.0, 0.0, 0.0]),
    "one": ([-2.5], [-2.5]),
    "infinite": ([math.inf, 1.0, -math.inf], [HUGE, 0.0, -HUGE]),
    "nan": ([math.nan, 2.0, -math.nan], [0.0, 2.0, 0.0]),
    "all nan": ([math.nan] * 3, [0.0] * 3),
    "largest": ([LARGEST, -HUGE], [HUGE, -HUGE]),
    "subnormal": ([1e-39, -1e-40, 1e-45], [0.0, 0.0, 0.0]),
    "smallest": ([SMALLEST_NORMAL, 0.0], [SMALLEST_NORMAL, 0.0]),
}


@pytest.mark.parametrize("noise", [None, 0, 0xFFFF])
@pytest.mark.parametrize("jit", [False, True])
def test_special_values_in_blocks(noise, jit):
    """Zeros, infinities, NaN and subnormal numbers give finite ones."""
    given, wanted = (
        np.stack([np.pad(np.array(pair[index], "float32"), (0, 256 - len(pair[0]))) for pair in SPECIAL.values()])
        for index in (0, 1)
    )
    noise = None if noise is None else ops.full(given.shape, noise, "int32")
    _, scales, decoded = encoded(given, noise, jit)
    assert np.isfinite(scales).all()
    limit = np.abs(wanted).max(1) * (np.abs(wanted).max(1) == HUGE) * 127.0**-4  # 1.0 beside it
    for name, row, right, error in zip(SPECIAL, decoded, wanted, limit, strict=True):
        np.testing.assert_allclose(row, right, atol=error, err_msg=name)


def test_a_nonzero_value_of_a_block_of_one_sign_has_a_nonzero_code():
    """Whatever its magnitude: an update may be divided by it."""
    values = (10.0 ** np.linspace(-37, 38, 256)).astype("float32")
    for noise in (None, ops.full((1, 256), 0xFFFF, "int32")):
        for block in (values, values * np.float32(1e-20), values[::-1].copy()):
            codes = encoded(block, noise)[0]
            assert (codes[0][block >= SMALLEST_NORMAL] > 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_are_unbiased(sign):
    """With random bits a value goes to the upper one of its neighbors as often as its distance tells."""
    draws, n = 2**16, SINGLE if sign == 1 else 127
    for share in (0.9, 0.25, 1.7e-3):
        values = np.full((draws // 256, 256), share, "float32")
        values[:, 0] = sign
        noise = _noise("elements")[:draws].reshape(-1, 256)
        decoded = encoded(values.reshape(-1), ops.convert_to_tensor(noise))[2].reshape(-1, 256)[:, 1:]
        k = math.floor(share**0.25 * n)
        lower, upper = (k / n) ** 4, ((k + 1) / n) ** 4
        np.testing.assert_allclose(np.where(decoded > share, upper, lower), decoded, rtol=1e-5)
        count, size = int((decoded > share).sum()), decoded.size
        assert p_value(count, size, (np.float32(share) - lower) / (upper - lower)) > 1e-3
