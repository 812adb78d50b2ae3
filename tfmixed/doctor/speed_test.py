"""How fast this machine computes and copies, measured through the active Keras backend.

Each number is of one device, the backend's default. A run is at least 20 ms long where the largest size allows it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from tfmixed import hardware

DTYPES = ("float32", "bfloat16", "float16")
_LONG_ENOUGH = 0.02  # seconds
_ROUNDS = 5
_MATMUL_SIZES = tuple(2**power for power in range(6, 14))
_CONV_CHANNELS = tuple(2**power for power in range(4, 10))
_IMAGE = 32
_MAX_REPEATS = 256
# What a step starts with, the step, and how much it is.
_Steps = tuple[Any, Callable[[Any], Any], float]


@dataclass(frozen=True)
class Speed:
    """What one dtype achieves.

    Args:
        dtype: Of inputs, weights and results.
        matmul_tflops: 10^12 floating-point operations per second in a product of square matrices, 2 n^3 each.
        conv_tflops: The same in a 3 x 3 convolution of 32 x 32 images with as many channels out as in.
    """

    dtype: str
    matmul_tflops: float
    conv_tflops: float


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Args:
        speeds: One for each of float32, bfloat16 and float16, in this order.
        bandwidth_gb_s: 10^9 bytes per second between memory and processor: one float32 array is added to another in
            place, each far larger than the caches. Counted are two arrays read and one written.
    """

    speeds: tuple[Speed, ...]
    bandwidth_gb_s: float

    def of(self, dtype: str) -> Speed:
        """Returns the speed of a dtype."""
        return next(speed for speed in self.speeds if speed.dtype == dtype)

    def ratios(self, dtype: str) -> tuple[float, float]:
        """Returns how many times as fast as float32 a dtype is, in matrix products and in convolutions."""
        speed, base = self.of(dtype), self.of("float32")
        return speed.matmul_tflops / base.matmul_tflops, speed.conv_tflops / base.conv_tflops


@dataclass(frozen=True)
class Work:
    """Something to repeat, and how much of it a run is.

    Args:
        run: Does it, and waits until the device has done it.
        amount: Floating-point operations, or bytes.
    """

    run: Callable[[], None]
    amount: float

    def seconds(self) -> float:
        """Runs once and returns how long it took."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def measure() -> Measured:
    """Measures all dtypes and the memory, in turns, so that a slow moment of the machine hits all of them."""
    works = [build(dtype) for build in (_matmul, _conv) for dtype in DTYPES]
    *flops, bandwidth = rates([*works, _addition()])
    speeds = zip(DTYPES, flops[: len(DTYPES)], flops[len(DTYPES) :], strict=True)
    return Measured(tuple(Speed(dtype, matmul / 1e12, conv / 1e12) for dtype, matmul, conv in speeds), bandwidth / 1e9)


def rates(works: Sequence[Work], rounds: int = _ROUNDS) -> list[float]:
    """Returns the amount per second of each work, by the median of `rounds` runs in turns."""
    times = [[work.seconds() for work in works] for _ in range(rounds)]
    return [work.amount / statistics.median(taken) for work, taken in zip(works, zip(*times, strict=True), strict=True)]


def _matmul(dtype: str) -> Work:
    def build(size: int) -> _Steps:
        # A variance of 1/size keeps the products at the size of their inputs, however many follow each other.
        values, weights = _normal((size, size), 1.0, dtype), _normal((size, size), size**-0.5, dtype)
        multiply = _compiled(ops.matmul, values, weights)
        return values, lambda each: multiply(each, weights), 2.0 * size**3

    return _grown(build, _MATMUL_SIZES)


def _conv(dtype: str) -> Work:
    def build(channels: int) -> _Steps:
        shape = (channels // 8, _IMAGE, _IMAGE, channels)
        values, kernel = _normal(shape, 1.0, dtype), _normal((3, 3, channels, channels), (9 * channels) ** -0.5, dtype)
        convolve = _compiled(_same_conv, values, kernel)
        return values, lambda each: convolve(each, kernel), 2.0 * shape[0] * _IMAGE**2 * 9 * channels**2

    return _grown(build, _CONV_CHANNELS)


def _same_conv(values: Any, kernel: Any) -> Any:
    return ops.conv(values, kernel, padding="same", data_format="channels_last")


def _grown(build: Callable[[int], _Steps], sizes: Sequence[int]) -> Work:
    """Returns the smallest work that takes long enough, or the largest: an emulated format can be 100 times slower."""
    for size in sizes:
        work = _chain(*build(size))
        work.run()  # compiles
        # The fastest of three: a slow moment must not pass for a long run.
        if min(work.seconds() for _ in range(3)) >= _LONG_ENOUGH:
            return work
    repeats = 1
    while work.seconds() < _LONG_ENOUGH and repeats < _MAX_REPEATS:
        repeats *= 2
        work = _chain(*build(size), repeats)
        work.run()
    return work


def _chain(start: Any, step: Callable[[Any], Any], amount: float, repeats: int = 1) -> Work:
    """Returns `repeats` steps as one work, each on the result of the one before: no backend runs them side by side."""

    def run() -> None:
        values = start
        for _ in range(repeats):
            values = step(values)
        _wait(values)

    return Work(run, amount * repeats)


def _addition() -> Work:
    # 256 MiB on a CPU, 1 GiB on an accelerator.
    length = 2**26 if hardware.describe().main.kind == "cpu" else 2**28
    add, amount = _in_place_addition((length,)), 3.0 * 4 * length
    work = Work(lambda: _wait(add()), amount)
    work.run()
    repeats = max(1, round(_LONG_ENOUGH / work.seconds()))

    def run() -> None:
        for _ in range(repeats):
            values = add()
        _wait(values)

    return Work(run, amount * repeats)


def _in_place_addition(shape: tuple[int, ...]) -> Callable[[], Any]:
    ones = ops.ones(shape, "float32")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return _assigned_addition(tf, tf.Variable(tf.zeros(shape)), ones)
    if keras.backend.backend() == "torch":
        values = ops.zeros(shape, "float32")
        return lambda: values.add_(ones)
    return _donated_addition(shape, ones)


def _assigned_addition(tf: Any, variable: Any, ones: Any) -> Callable[[], Any]:
    def add() -> None:
        variable.assign_add(ones)  # its result, if returned, would share the memory, and the next one copy it first

    compiled = tf.function(add, autograph=False)

    def run() -> Any:
        compiled()
        return variable

    return run


def _donated_addition(shape: tuple[int, ...], ones: Any) -> Callable[[], Any]:
    import jax

    add = jax.jit(lambda values, more: values + more, donate_argnums=0)
    held = [ops.zeros(shape, "float32")]

    def run() -> Any:
        held[0] = add(held[0], ones)
        return held[0]

    return run


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns the function as the backend compiles it for tensors like these."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False).get_concrete_function(*arguments)  # type: ignore[no-any-return]
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)  # type: ignore[no-any-return]
    return function


def _normal(shape: tuple[int, ...], deviation: float, dtype: str) -> Any:
    return ops.cast(keras.random.normal(shape, stddev=deviation, dtype="float32", seed=0), dtype)


def _wait(values: Any) -> None:
    """Fetches one number, which no device has before the rest."""
    # In float32: TensorFlow hands no scalar of bfloat16 to numpy.
    ops.convert_to_numpy(ops.cast(values[(0,) * len(values.shape)], "float32"))
