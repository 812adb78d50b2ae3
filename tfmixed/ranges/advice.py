"""Advice on the loss scale for the gradients of a model, as a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tfmixed._probe.rounding_model import POWERS, held_in_half, largest_scale, needed_scale, power_of_two
from tfmixed.records import GradientRange, RangesRecord, short


def lowest(gradients: Iterable[GradientRange], precision: str, tolerance: float) -> float:
    """Returns the smallest power of two at which at most `tolerance` of any gradient's values are flushed to 0."""
    return max((needed_scale(gradient, precision, tolerance) for gradient in gradients), default=2.0 ** POWERS[0])


def highest(gradients: Iterable[GradientRange], precision: str) -> float:
    """Returns the largest power of two at which no value overflows."""
    return min((largest_scale(gradient, precision) for gradient in gradients), default=2.0 ** POWERS[-1])


def advice(record: RangesRecord, precision: str, tolerance: float) -> str:
    """Returns the scales to choose from, or the layers that need float32, as a sentence."""
    half = held_in_half(record)
    if nonfinite := [gradient.name for gradient in half if gradient.nonfinite]:
        return f"no scale helps, since gradients are not finite in {record.precision}: {_names(nonfinite)}."
    if not any(gradient.nonzeros for gradient in half):
        return "all gradients are 0: measure on other batches."
    low, high = lowest(half, precision, tolerance), highest(half, precision)
    if low <= 1 <= high:
        return f"no scale is needed{_reason(half, precision)}."
    if low <= high:
        return f"{_between(low, high)} works."
    return _conflict(half, precision, tolerance)


def _reason(half: Sequence[GradientRange], precision: str) -> str:
    if precision == "float16":
        return ""
    smallest = min(gradient.smallest for gradient in half if gradient.smallest)
    largest = max(gradient.largest for gradient in half)
    reach = f"{power_of_two(smallest)} to {power_of_two(largest)}"
    return f": {precision} has the exponents of float32, and these gradients go from {reach}"


def _conflict(half: Sequence[GradientRange], precision: str, tolerance: float) -> str:
    """Returns the two gradients that exclude a common scale, and the fewest layers that need float32."""
    limits = [(held, needed_scale(held, precision, tolerance), largest_scale(held, precision)) for held in half]
    smallest, low, _ = max(limits, key=lambda limit: limit[1])
    largest, _, high = min(limits, key=lambda limit: limit[2])
    # Of all limits, the scale that works for most layers; of several, the highest.
    scales = sorted({scale for _, *both in limits for scale in both}, reverse=True)
    excluded = [{gradient.layer for gradient, low, high in limits if not low <= scale <= high} for scale in scales]
    fewest = min(excluded, key=len)
    sentence = (
        f"no single scale works: `{smallest.name}` needs at least {short(low)}, `{largest.name}` overflows above "
        f"{short(high)}; put {_names(sorted(fewest))} in float32"
    )
    rest = [gradient for gradient in half if gradient.layer not in fewest]
    if any(gradient.nonzeros for gradient in rest):
        sentence += f", and {_between(lowest(rest, precision, tolerance), highest(rest, precision))} works"
    return f"{sentence}."


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _between(low: float, high: float) -> str:
    return f"any scale from {short(low)} to {short(high)}" if low < high else f"the scale {short(low)}"
