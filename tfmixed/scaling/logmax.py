"""`LogMaxScale`: a loss scale from the statistics of the largest gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy

from tfmixed.formats import FLOAT32
from tfmixed.scaling import validation
from tfmixed.scaling.base import ScalingRule


class LogMaxState(NamedTuple):
    """State of a `LogMaxScale`, all float32 scalars. Averages are exponential, before bias correction.

    Args:
        scale: The loss scale.
        mean: Fast average of log2(amax).
        slow_mean: Slow average of log2(amax).
        slow_square: Slow average of log2(amax) squared.
        fast_bias: `beta1` to the power of the number of steps. The bias correction divides `mean` by 1 minus it.
        slow_bias: `beta2` to the power of the number of steps.
    """

    scale: Any
    mean: Any
    slow_mean: Any
    slow_square: Any
    fast_bias: Any
    slow_bias: Any


# Wide limits for float32 arithmetic: log2 of a float32 is between -149 and 128.
_RANGES = {
    "beta1": {"least": 0.0, "below": 1.0},
    "beta2": {"least": 0.0, "below": 1.0},
    "std_devs": {"least": 0.0, "most": 2.0**32},
    "log_max": {"least": -256.0, "most": 256.0},
    "overflow_log2": {"least": -(2.0**32), "most": 2.0**32},
}


@dataclass(frozen=True)
class LogMaxScale(ScalingRule):
    """A loss scale that keeps the largest gradient a few standard deviations below overflow.

        x = log2(amax) if finite else overflow_log2
        mean, slow_mean, slow_square = averages of x, x, x * x  (decay beta1, beta2, beta2; bias-corrected as in Adam)
        deviation = sqrt(max(slow_square - slow_mean**2, 0))
        scale = 2 ** (log_max - (mean + std_devs * deviation)), kept within [min_scale, max_scale]

    A step whose gradients are all 0 does not change the state.

    Args:
        initial_scale: Scale of the first step. Defaults to 1.
        beta1: Decay of the fast average, in [0, 1). Defaults to 0.99.
        beta2: Decay of the slow averages, in [0, 1). Defaults to 0.999.
        std_devs: Headroom in standard deviations. Defaults to 3.09, which 0.1% of normally distributed steps exceed.
        log_max: log2 of the magnitude to stay below. Defaults to 16, float16's first overflow.
        overflow_log2: The x of a step that overflowed. `None` uses `log_max`. Defaults to None.
        min_scale: Lower bound. Defaults to 1.
        max_scale: Upper bound. Defaults to `2**14`.

    Raises:
        ValueError: If an argument is out of range, or `next` is called without `amax`.

    Source: the LogMax scaler of NVIDIA's OpenSeq2Seq, "Mixed precision training".

    Example:
    >>> [round(scale) for scale in simulate(LogMaxScale(max_scale=2**20), "TT", amax=[2.0, 2.0])]
    [32768, 32768]
    """

    needs_amax: ClassVar[bool] = True
    initial_scale: float = 1.0
    beta1: float = 0.99
    beta2: float = 0.999
    std_devs: float = 3.09
    log_max: float = 16.0
    overflow_log2: float | None = None
    min_scale: float = 1.0
    max_scale: float = 2.0**14

    def __post_init__(self) -> None:
        for name in ("initial_scale", "min_scale", "max_scale"):
            object.__setattr__(self, name, validation.scale(name, getattr(self, name)))
        for name, limits in _RANGES.items():
            if getattr(self, name) is not None or name != "overflow_log2":
                object.__setattr__(self, name, validation.number(name, getattr(self, name), **limits))
        validation.bounds(self.initial_scale, self.min_scale, self.max_scale)

    @property
    def bounds(self) -> tuple[float, float]:
        return validation.bounds(self.initial_scale, self.min_scale, self.max_scale)

    def start(self) -> LogMaxState:
        scale = numpy.clip(self.initial_scale, *self.bounds)
        return LogMaxState(*(numpy.float32(number) for number in (scale, 0, 0, 0, 1, 1)))

    def next(self, state: LogMaxState, finite: Any, amax: Any = None, xp: Any = numpy) -> LogMaxState:
        if amax is None:
            raise ValueError("`amax` must be the largest absolute gradient of the step. Received: amax=None")
        overflow = xp.logical_not(xp.logical_and(finite, amax <= FLOAT32.max))  # also if NaN
        # Subnormals count as 0, since TensorFlow flushes them and NumPy does not.
        measured = xp.logical_and(xp.logical_not(overflow), amax >= FLOAT32.smallest_normal)
        overflow_log2 = self.log_max if self.overflow_log2 is None else self.overflow_log2
        x = xp.where(overflow, overflow_log2, _log(xp.where(measured, amax, 1.0), xp) / math.log(2))
        mean = self.beta1 * state.mean + (1 - self.beta1) * x
        slow_mean = self.beta2 * state.slow_mean + (1 - self.beta2) * x
        slow_square = self.beta2 * state.slow_square + (1 - self.beta2) * (x * x)
        fast_bias, slow_bias = state.fast_bias * self.beta1, state.slow_bias * self.beta2
        center = slow_mean / (1 - slow_bias)
        deviation = xp.sqrt(xp.maximum(slow_square / (1 - slow_bias) - center * center, 0.0))
        cutoff = mean / (1 - fast_bias) + self.std_devs * deviation
        low, high = self.bounds
        exponent = xp.minimum(xp.maximum(self.log_max - cutoff, math.log2(low)), math.log2(high))
        scale = xp.minimum(xp.maximum(xp.exp(exponent * math.log(2)), low), high)
        after = LogMaxState(scale, mean, slow_mean, slow_square, fast_bias, slow_bias)
        informative = xp.logical_or(overflow, measured)
        return LogMaxState(*(xp.where(informative, new, old) for new, old in zip(after, state, strict=True)))


def _log(x: Any, xp: Any) -> Any:
    return (xp.log if hasattr(xp, "log") else xp.math.log)(x)  # TensorFlow has it only in tf.math
