"""What rounding to half precision makes of gradients, from their counts by octave; exact for scales that are 2^n."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from tfmixed.formats import FORMATS, HALF, FloatFormat
from tfmixed.records import GradientRange, RangesRecord

# A convention, not a law: where no more of a tensor is flushed to 0, it trains as in float32.
TOLERANCE = 0.01
Octaves = Mapping[int, tuple[int, int, int, int]]
POWERS = range(-126, 128)  # of two, that are a normal float32


def held_in_half(record: RangesRecord) -> list[GradientRange]:
    """Returns the gradients that are held in half precision when the model trains; all of them where none is.

    Rounding noise is left out, unless it overflowed: that skips a step like any other.
    """
    held = [each for each in record.ranges if each.dtype in HALF] or record.ranges
    return [each for each in held if not each.noise or each.nonfinite]


@dataclass(frozen=True)
class Losses:
    """What becomes of gradients in half precision: counts of values, by their magnitude after rounding.

    Args:
        nonzeros: How many there are, finite and other than 0.
        zero: How many of them become 0 (underflow).
        subnormal: How many become subnormal, and keep less than the format's precision.
        overflow: How many become infinite.
    """

    nonzeros: int = 0
    zero: int = 0
    subnormal: int = 0
    overflow: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def share(self, count: int) -> float:
        """Returns a count relative to all values other than 0; 0 where there are none."""
        return count / self.nonzeros if self.nonzeros else 0.0


def losses(octaves: Octaves, scale: float = 1.0, precision: str = "float16") -> Losses:
    """Returns what becomes of values that are multiplied by `scale` and rounded to half precision.

    In float16 the counts are exact for each power of two. Other scales, and bfloat16's limits, cut through an octave,
    whose values are then taken to be spread evenly over the logarithm.

    Args:
        octaves: As in `GradientRange`.
        scale: The loss scale.
        precision: `"float16"` or `"bfloat16"`.
    """
    zero, normal, infinite = (limit / scale for limit in limits(precision))
    nonzeros, zeros = sum(map(sum, octaves.values())), _below(octaves, zero, or_equal=True)
    return Losses(nonzeros, zeros, _below(octaves, normal) - zeros, nonzeros - _below(octaves, infinite))


def limits(precision: str = "float16") -> tuple[float, float, float]:
    """Returns the largest magnitude that rounds to 0, the smallest to a normal number, the smallest to infinity."""
    format_ = format_of(precision)
    zero = format_.smallest_subnormal / 2  # a tie, which goes to the even one
    ulp = 2.0 ** math.floor(math.log2(format_.max)) * format_.epsilon
    return zero, format_.smallest_normal - zero, format_.max + ulp / 2


def format_of(precision: str) -> FloatFormat:
    """Returns the half-precision format of that name."""
    if precision not in HALF:
        raise ValueError(f'precision must be "float16" or "bfloat16", received {precision!r}')
    return FORMATS[precision]


def _below(octaves: Octaves, limit: float, or_equal: bool = False) -> int:
    mantissa, exponent = math.frexp(limit)
    octave, mantissa = exponent - 1, 2 * mantissa
    whole = sum(sum(parts) for each, parts in octaves.items() if each < octave)
    parts = octaves.get(octave, (0, 0, 0, 0))
    known = {1.0: int(or_equal), 2 - 2.0**-10: 2, 2 - 2.0**-11: 3}
    if mantissa in known:
        return whole + sum(parts[: known[mantissa]])
    return whole + round(sum(parts) * math.log2(mantissa))


def needed_scale(range_: GradientRange, precision: str = "float16", tolerance: float = TOLERANCE) -> float:
    """Returns the smallest power of two at which no more than `tolerance` of a gradient's values are flushed to 0."""

    def serves(power: int) -> bool:
        lost = losses(range_.octaves, 2.0**power, precision)
        return lost.share(lost.zero) <= tolerance

    return 2.0 ** min(POWERS[0] + bisect.bisect_left(POWERS, True, key=serves), POWERS[-1])


def largest_scale(range_: GradientRange, precision: str = "float16") -> float:
    """Returns the largest power of two at which no value of a gradient overflows."""
    *_, infinite = limits(precision)
    return power_below(infinite / range_.largest) if range_.largest else 2.0 ** POWERS[-1]


def power_below(limit: float) -> float:
    """Returns the largest power of two that is smaller, and a normal float32."""
    mantissa, exponent = math.frexp(limit)
    power = exponent - 2 if mantissa == 0.5 else exponent - 1
    return 2.0 ** min(max(power, POWERS[0]), POWERS[-1])


def power_of_two(magnitude: float) -> str:
    """Returns the power of two that a magnitude is not below, as people write it: `2^-31`."""
    return f"2^{math.floor(math.log2(magnitude))}"


def percent(share: float) -> str:
    """Returns a share as people read it: neither 0 nor 100 % stands for what only comes near."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if share < 0.0005:
        return "< 0.1 %"
    return f"{share:.1%}".replace("%", " %") if share < 0.9995 else "> 99.9 %"
