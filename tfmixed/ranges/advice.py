"""Which loss scale suits a model's gradients, or why none does, as a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tfmixed._probe.rounding_model import POWERS, held_in_half, largest_scale, needed_scale, power_of_two
from tfmixed.records import GradientRange, RangesRecord, short


def lowest(ranges: Iterable[GradientRange], precision: str, tolerance: float) -> float:
    """Returns the smallest power of two at which no more than `tolerance` of any gradient's values are flushed to 0."""
    return max((needed_scale(each, precision, tolerance) for each in ranges), default=2.0 ** POWERS[0])


def highest(ranges: Iterable[GradientRange], precision: str) -> float:
    """Returns the largest power of two at which no value overflows."""
    return min((largest_scale(each, precision) for each in ranges), default=2.0 ** POWERS[-1])


def verdict(record: RangesRecord, precision: str, tolerance: float) -> str:
    """Returns which scale to choose, as a sentence."""
    half = held_in_half(record)
    if bad := [each.name for each in half if each.nonfinite]:
        return f"no scale mends gradients that are not finite in {record.precision}: {_names(bad)}."
    if not any(each.nonzeros for each in half):
        return "all gradients are 0: measure on other batches."
    low, high = lowest(half, precision, tolerance), highest(half, precision)
    if low <= 1 <= high:
        return f"no scale is needed{_why(half, precision)}."
    if low <= high:
        return f"{_between(low, high)} works."
    return _conflict(half, precision, tolerance)


def _why(half: Sequence[GradientRange], precision: str) -> str:
    if precision == "float16":
        return ""
    smallest = min(each.smallest for each in half if each.smallest)
    largest = max(each.largest for each in half)
    reach = f"{power_of_two(smallest)} to {power_of_two(largest)}"
    return f": {precision} has the exponents of float32, and these gradients go from {reach}"


def _conflict(half: Sequence[GradientRange], precision: str, tolerance: float) -> str:
    """Returns which layers keep a scale from working for all, and the fewest that float32 would free it from."""
    spans = [(each, needed_scale(each, precision, tolerance), largest_scale(each, precision)) for each in half]
    neediest, low, _ = max(spans, key=lambda span: span[1])
    largest, _, high = min(spans, key=lambda span: span[2])
    # Of the scales that suit one of them, the one that suits most layers; of several the highest.
    aside = min(
        ({each.layer for each, least, most in spans if not least <= scale <= most} for scale in _candidates(spans)),
        key=len,
    )
    sentence = (
        f"no single scale works: `{neediest.name}` needs {short(low)} at least, `{largest.name}` overflows above "
        f"{short(high)}; put {_names(sorted(aside))} in float32"
    )
    rest = [each for each in half if each.layer not in aside]
    if any(each.nonzeros for each in rest):
        sentence += f", and {_between(lowest(rest, precision, tolerance), highest(rest, precision))} works"
    return f"{sentence}."


def _candidates(spans: Iterable[tuple[GradientRange, float, float]]) -> list[float]:
    return sorted({scale for _, *both in spans for scale in both}, reverse=True)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _between(low: float, high: float) -> str:
    return f"any scale from {short(low)} to {short(high)}" if low < high else f"the scale {short(low)}"
