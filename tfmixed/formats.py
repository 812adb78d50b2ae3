"""Numeric properties of float16, bfloat16 and float32."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes


@dataclass(frozen=True)
class FloatFormat:
    """Range and precision of a binary floating-point format.

    Args:
        name: Name of the dtype in Keras.
        max: Largest finite value. Values that would round above it overflow.
        smallest_normal: Smallest positive value with full precision.
        smallest_subnormal: Smallest positive value. Half of it rounds to 0 (underflow).
        epsilon: Distance from 1.0 to the next larger value.

    Example:
    >>> FORMATS["float16"].max
    65504.0
    """

    name: str
    max: float
    smallest_normal: float
    smallest_subnormal: float
    epsilon: float

    @classmethod
    def of(cls, name: str) -> FloatFormat:
        """Returns the format of a dtype."""
        info = ml_dtypes.finfo(name)
        numbers = (info.max, info.smallest_normal, info.smallest_subnormal, info.eps)
        return cls(name, *(float(number) for number in numbers))


FORMATS = {name: FloatFormat.of(name) for name in ("float16", "bfloat16", "float32")}
FLOAT32 = FORMATS["float32"]
HALF = ("float16", "bfloat16")
# Forms of weights and optimizer states of a `LowPrecisionOptimizer`.
WEIGHTS = ("stochastic", "split", "nearest")
STATES = ("float32", "bfloat16", "int8")
