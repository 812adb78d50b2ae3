"""Argument checks. Each error names the argument and the value received."""

from __future__ import annotations

import functools
import math
from numbers import Integral, Real
from typing import Any

import numpy

from tfmixed.formats import FLOAT32


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """Returns `value` as a Python float if it is a real number and within the limits when rounded to float32."""
    # Infinities and NaN fail the open limits.
    if not isinstance(value, bool) and isinstance(value, Real):
        single = _float32(value)
        if above < single < below and least <= single <= most:
            return float(value)
    limits = [(above, "above"), (least, "at least"), (below, "below"), (most, "at most")]
    allowed = " and ".join(f"{word} {limit:g}" for limit, word in limits if math.isfinite(limit))
    raise ValueError(f"`{name}` must be a finite float32 number {allowed}".rstrip() + f". Received: {name}={value!r}")


def scale(name: str, value: Any) -> float:
    """Returns a loss scale as a Python float: positive, and a normal number in float32."""
    positive = number(name, value, above=0.0)
    if _float32(positive) < FLOAT32.smallest_normal:
        raise ValueError(f"`{name}` must be at least {FLOAT32.smallest_normal:g}. Received: {name}={value!r}")
    return positive


def count(name: str, value: Any, least: int) -> int:
    """Returns an integer of at least `least` as a Python int."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**31:
        raise ValueError(
            f"`{name}` must be a whole number, at least {least} and below 2**31. Received: {name}={value!r}"
        )
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """Returns `True` or `False`, and refuses truthy values of other types."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


@functools.cache
def bounds(initial_scale: float, min_scale: float | None, max_scale: float | None) -> tuple[float, float]:
    """Returns the float32 bounds of a scale. `None` stands for the limit of float32."""
    least = FLOAT32.smallest_normal if min_scale is None else min_scale
    most = FLOAT32.max if max_scale is None else max_scale
    low, high = _round(least, math.inf), _round(most, -math.inf)
    if low > high:
        raise ValueError(
            f"`min_scale` must not be above `max_scale`. Received: min_scale={min_scale!r}, max_scale={max_scale!r}"
        )
    if not least <= initial_scale <= most and not low <= _float32(initial_scale) <= high:
        raise ValueError(
            "`initial_scale` must be between `min_scale` and `max_scale`. Received: "
            f"initial_scale={initial_scale!r}, min_scale={min_scale!r}, max_scale={max_scale!r}"
        )
    return low, high


@functools.cache
def largest_factor(product: float, factor: float) -> float:
    """Returns the largest float32 whose product with `factor`, in float32 and in float64, is at most `product`."""
    limit = _round(min(product / factor * (1 + 2 * FLOAT32.epsilon), FLOAT32.max), math.inf)
    while max(_float32(limit * factor), _float32(limit * _float32(factor))) > product:
        limit = float(numpy.nextafter(numpy.float32(limit), numpy.float32(0)))
    return limit


def _float32(value: Any) -> float:
    with numpy.errstate(over="ignore"):
        try:
            return float(numpy.float32(float(value)))
        except OverflowError:  # an int or a Fraction beyond float64
            return math.inf


def _round(value: float, towards: float) -> float:
    single = numpy.float32(value)
    exact = float(single)  # NumPy would compare `value` as a float32
    beyond = exact > value if towards < 0 else exact < value
    return float(numpy.nextafter(single, numpy.float32(towards)) if beyond else single)
