"""Underflow and overflow of gradients in half precision, computed from their histograms by octave."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

from tfmixed.formats import FORMATS, HALF, FloatFormat
from tfmixed.records import GradientError, GradientRange, RangesRecord

TOLERANCE = 0.01  # share of a tensor that may be flushed to 0, by convention
Octaves = Mapping[int, tuple[int, int, int, int]]
POWERS = range(-126, 128)  # exponents of the powers of two that are normal float32 numbers


def held_in_half(record: RangesRecord) -> list[GradientRange]:
    """Returns the gradients that are held in half precision when the model trains, or all of them if none is.

    Rounding noise is left out unless it overflowed, since an overflow skips the step.
    """
    held = [gradient for gradient in record.ranges if gradient.dtype in HALF] or record.ranges
    return [gradient for gradient in held if not gradient.noise or gradient.nonfinite]


@dataclass(frozen=True)
class Losses:
    """Number of gradient values that half precision loses.

    Args:
        nonzeros: Number of finite, nonzero values. Defaults to 0.
        zero: Number of values that become 0 (underflow). Defaults to 0.
        subnormal: Number of values that become subnormal, with reduced precision. Defaults to 0.
        overflow: Number of values that become infinite. Defaults to 0.
    """

    nonzeros: int = 0
    zero: int = 0
    subnormal: int = 0
    overflow: int = 0

    def __add__(self, other: Losses) -> Losses:
        return Losses(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def share(self, count: int) -> float:
        """Returns a count relative to all nonzero values; 0 if there are none."""
        return count / self.nonzeros if self.nonzeros else 0.0

    def percentages(self) -> list[str]:
        """Returns the shares that become 0, subnormal and infinite, as in a table."""
        return [percent(self.share(count)) for count in (self.zero, self.subnormal, self.overflow)]


@dataclass(frozen=True)
class UpdateLoss:
    """Updates of weights, and those that rounding to nearest discards: the weight stays the same.

    Args:
        count: Number of nonzero updates. Defaults to 0.
        size: Sum of their magnitudes. Defaults to 0.
        lost_count: Number of the discarded ones. Defaults to 0.
        lost_size: Sum of their magnitudes. Defaults to 0.
    """

    count: int = 0
    size: float = 0.0
    lost_count: int = 0
    lost_size: float = 0.0

    def __add__(self, other: UpdateLoss) -> UpdateLoss:
        return UpdateLoss(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """The discarded share of the update, 0 to 1: of the sum of its magnitudes."""
        return min(self.lost_size / self.size, 1.0) if self.size else 0.0

    @property
    def share_of_elements(self) -> float:
        """The discarded share of the nonzero elements, 0 to 1."""
        return self.lost_count / self.count if self.count else 0.0


def update_loss(gradient: GradientRange | GradientError, precision: str, scale: float = 1.0) -> UpdateLoss:
    """Returns what is lost of the updates of a variable, and if updates were `scale` times as large.

    Args:
        gradient: The record of the variable.
        precision: The format that holds the variable: `"float16"` or `"bfloat16"`.
        scale: A factor, for which counts are exact if it is a power of two. Others are rounded up to one.
            Defaults to 1.
    """
    octaves = gradient.updates.get(format_of(precision).name, {})
    limit = -1 - math.ceil(math.log2(scale))
    parts = [UpdateLoss(*part, *(part if octave < limit else ())) for octave, part in octaves.items()]
    return sum(parts, UpdateLoss())


def update_lost(gradient: GradientRange | GradientError, precision: str) -> str:
    """Returns the share of a variable's update that rounding discards, as in a table. Empty if it is unknown."""
    if not gradient.updates:
        return ""
    loss = update_loss(gradient, precision)
    return percent(loss.share) if loss.count else "no update"


def weight_format(records: Iterable[GradientRange | GradientError]) -> str:
    """Returns the half-precision format in which weights are held; bfloat16 if there is none."""
    return "float16" if any(record.rounded_to == "float16" for record in records) else "bfloat16"


def losses(octaves: Octaves, scale: float = 1.0, precision: str = "float16") -> Losses:
    """Returns the losses of values that are multiplied by `scale` and rounded to half precision.

    In float16 the counts are exact for scales that are powers of two. For other scales, and for bfloat16, the values of
    an octave are assumed to be spread evenly on a logarithmic scale.

    Args:
        octaves: Counts by octave and part, as in `GradientRange`.
        scale: The loss scale. Defaults to 1.
        precision: `"float16"` or `"bfloat16"`. Defaults to `"float16"`.
    """
    zero, normal, infinite = (limit / scale for limit in limits(precision))
    nonzeros, zeros = sum(map(sum, octaves.values())), _below(octaves, zero, or_equal=True)
    return Losses(nonzeros, zeros, _below(octaves, normal) - zeros, nonzeros - _below(octaves, infinite))


def limits(precision: str = "float16") -> tuple[float, float, float]:
    """Returns the largest magnitude that rounds to 0, the smallest to a normal number, and the smallest to infinity."""
    format_ = format_of(precision)
    zero = format_.smallest_subnormal / 2  # a tie, which rounds to even
    ulp = 2.0 ** math.floor(math.log2(format_.max)) * format_.epsilon
    return zero, format_.smallest_normal - zero, format_.max + ulp / 2


def format_of(precision: str) -> FloatFormat:
    """Returns the half-precision format of that name."""
    if precision not in HALF:
        raise ValueError(f'`precision` must be "float16" or "bfloat16". Received: precision={precision!r}')
    return FORMATS[precision]


def _below(octaves: Octaves, limit: float, or_equal: bool = False) -> int:
    """Counts the values below a limit."""
    mantissa, octave = math.frexp(limit)
    octave, mantissa = octave - 1, 2 * mantissa
    whole = sum(sum(parts) for exponent, parts in octaves.items() if exponent < octave)
    parts = octaves.get(octave, (0, 0, 0, 0))
    known = {1.0: int(or_equal), 2 - 2.0**-10: 2, 2 - 2.0**-11: 3}
    if mantissa in known:
        return whole + sum(parts[: known[mantissa]])
    return whole + round(sum(parts) * math.log2(mantissa))


def needed_scale(range_: GradientRange, precision: str = "float16", tolerance: float = TOLERANCE) -> float:
    """Returns the smallest power of two at which at most `tolerance` of a gradient's values are flushed to 0."""

    def suffices(power: int) -> bool:
        lost = losses(range_.octaves, 2.0**power, precision)
        return lost.share(lost.zero) <= tolerance

    return 2.0 ** min(POWERS[0] + bisect.bisect_left(POWERS, True, key=suffices), POWERS[-1])


def largest_scale(range_: GradientRange, precision: str = "float16") -> float:
    """Returns the largest power of two at which no value of a gradient overflows."""
    *_, infinite = limits(precision)
    return power_below(infinite / range_.largest) if range_.largest else 2.0 ** POWERS[-1]


def power_below(limit: float) -> float:
    """Returns the largest power of two below `limit` that is a normal float32."""
    mantissa, exponent = math.frexp(limit)
    power = exponent - 2 if mantissa == 0.5 else exponent - 1
    return 2.0 ** min(max(power, POWERS[0]), POWERS[-1])


def power_of_two(magnitude: float) -> str:
    """Returns the largest power of two up to a magnitude, as text: `2^-31`."""
    return f"2^{math.floor(math.log2(magnitude))}"


def percent(share: float) -> str:
    """Returns a share as text; only exact values become `0 %` and `100 %`."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if share < 0.0005:
        return "< 0.1 %"
    return f"{share:.1%}".replace("%", " %") if share < 0.9995 else "> 99.9 %"
