"""Compute speed and memory bandwidth of the backend's default device, measured through Keras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
from keras import ops

from tfmixed import hardware
from tfmixed._utils import timing

DTYPES = ("float32", "bfloat16", "float16")
_MIN_SECONDS = 0.02
_ROUNDS = 5
_MATMUL_SIZES = tuple(2**power for power in range(6, 14))
_CONV_CHANNELS = tuple(2**power for power in range(4, 10))
_IMAGE = 32
_MAX_REPEATS = 256
_CPU_LENGTH = 2**26  # 256 MiB


@dataclass(frozen=True)
class Speed:
    """Compute speed in one dtype.

    Args:
        dtype: The dtype of inputs, weights and results.
        matmul_tflops: 10^12 floating-point operations per second in products of square matrices, 2 n^3 each.
        conv_tflops: The same in 3 x 3 convolutions of 32 x 32 images with equal numbers of input and output channels.
    """

    dtype: str
    matmul_tflops: float
    conv_tflops: float


@dataclass(frozen=True)
class Measured:
    """Result of `measure`.

    Args:
        speeds: The speeds in float32, bfloat16 and float16, in this order.
        bandwidth_gb_s: 10^9 bytes per second between memory and processor, when one float32 array is added to another
            in place. Both are far larger than the caches. Two arrays are read and one is written.
    """

    speeds: tuple[Speed, ...]
    bandwidth_gb_s: float

    def of(self, dtype: str) -> Speed:
        """Returns the speed in a dtype."""
        return next(speed for speed in self.speeds if speed.dtype == dtype)

    def ratios(self, dtype: str) -> tuple[float, float]:
        """Returns the speedup of a dtype over float32, in matrix products and in convolutions."""
        speed, base = self.of(dtype), self.of("float32")
        return speed.matmul_tflops / base.matmul_tflops, speed.conv_tflops / base.conv_tflops


@dataclass
class Work:
    """A chain of equal steps. Each takes the result of the one before, so that no backend runs them in parallel.

    Args:
        step: Takes `values` and `operand`, and returns the next `values`.
        values: The first argument of the first step.
        operand: The second argument of each step.
        amount: The floating-point operations or bytes of one step.
        repeats: The number of steps of a run. Defaults to 1.
        in_place: Whether a step overwrites `values`. Defaults to `False`.
    """

    step: Callable[[Any, Any], Any]
    values: Any
    operand: Any
    amount: float
    repeats: int = 1
    in_place: bool = False

    def run(self) -> None:
        """Takes all steps and waits for the device."""
        values = self.values
        for _ in range(self.repeats):
            values = self.step(values, self.operand)
        if self.in_place:
            self.values = values  # JAX deletes the array that it overwrites
        # One number is fetched, which the device computes last. TensorFlow converts no bfloat16 scalar to numpy.
        ops.convert_to_numpy(ops.cast(values[(0,) * len(values.shape)], "float32"))


def measure() -> Measured:
    """Measures all dtypes and the memory bandwidth."""
    works = {"memory": addition(_CPU_LENGTH if hardware.describe().main.kind == "cpu" else 2**28)}
    works["memory"].repeats = max(1, round(_MIN_SECONDS / timing.elapsed(works["memory"].run)))
    for dtype in DTYPES:
        works[f"matmul {dtype}"] = _long_enough(partial(_matmul, dtype), _MATMUL_SIZES)
        works[f"conv {dtype}"] = _long_enough(partial(_conv, dtype), _CONV_CHANNELS)
    seconds = timing.medians(timing.interleaved({name: work.run for name, work in works.items()}, _ROUNDS))
    rates = {name: work.amount * work.repeats / seconds[name] for name, work in works.items()}
    speeds = (Speed(dtype, rates[f"matmul {dtype}"] / 1e12, rates[f"conv {dtype}"] / 1e12) for dtype in DTYPES)
    return Measured(tuple(speeds), rates["memory"] / 1e9)


def addition(length: int) -> Work:
    """Returns the in-place addition of two float32 arrays, which reads two arrays and writes one. It ran once."""
    values, step = ops.zeros((length,), "float32"), _add_in_place
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        values = tf.Variable(values)
    elif keras.backend.backend() == "jax":
        import jax

        step = jax.jit(ops.add, donate_argnums=0)
    work = Work(step, values, ops.ones((length,), "float32"), 3.0 * 4 * length, in_place=True)
    work.run()
    return work


def _add_in_place(values: Any, operand: Any) -> Any:
    if keras.backend.backend() == "tensorflow":
        # A returned value would share the memory of the variable, and the next addition would copy it.
        values.assign_add(operand, read_value=False)
        return values
    return values.add_(operand)


def _matmul(dtype: str, size: int) -> Work:
    # With a variance of 1/size the products keep the magnitude of their inputs.
    values, weights = _normal((size, size), 1.0, dtype), _normal((size, size), size**-0.5, dtype)
    return Work(_compiled(ops.matmul, values, weights), values, weights, 2.0 * size**3)


def _conv(dtype: str, channels: int) -> Work:
    shape = (channels // 8, _IMAGE, _IMAGE, channels)
    values, kernel = _normal(shape, 1.0, dtype), _normal((3, 3, channels, channels), (9 * channels) ** -0.5, dtype)
    amount = 2.0 * shape[0] * _IMAGE**2 * 9 * channels**2
    same_conv = partial(ops.conv, padding="same", data_format="channels_last")
    return Work(_compiled(same_conv, values, kernel), values, kernel, amount)


def _normal(shape: tuple[int, ...], deviation: float, dtype: str) -> Any:
    return ops.cast(keras.random.normal(shape, stddev=deviation, dtype="float32", seed=0), dtype)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns the function as the backend compiles it for these arguments."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False).get_concrete_function(*arguments)  # type: ignore[no-any-return]
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)  # type: ignore[no-any-return]
    return function


def _long_enough(build: Callable[[int], Work], sizes: Sequence[int]) -> Work:
    """Returns the smallest work that takes `_MIN_SECONDS`, or else the largest, repeated.

    The size is not fixed, because an emulated dtype can be 100 times slower than float32.
    """
    for size in sizes:
        work = build(size)
        work.run()  # compiles
        # The fastest of three, so that a slow moment does not count as a long run.
        if min(timing.elapsed(work.run) for _ in range(3)) >= _MIN_SECONDS:
            return work
    while timing.elapsed(work.run) < _MIN_SECONDS and work.repeats < _MAX_REPEATS:
        work = replace(work, repeats=2 * work.repeats)
    return work
