"""`DynamicScale`: a loss scale that backs off on overflow and grows after a run of finite steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy

from tfmixed.scaling import validation
from tfmixed.scaling.base import ScalingRule


class DynamicState(NamedTuple):
    """State of a `DynamicScale`.

    Args:
        scale: The loss scale, a float32 scalar.
        good_steps: Integer scalar, the finite steps that count towards the next growth.
        strikes_left: Integer scalar, the overflows left before the scale backs off.
        since_change: Integer scalar, the steps since the scale last grew or backed off.
        overflows: Integer scalar, the overflows since the scale last backed off.
    """

    scale: Any
    good_steps: Any
    strikes_left: Any
    since_change: Any
    overflows: Any


_COUNTS = {"growth_interval": 1, "hysteresis": 1, "growth_delay": 0}
_RANGES = {
    "growth_factor": {"above": 1.0, "most": 2.0**20},
    "backoff_factor": {"least": 2.0**-20, "below": 1.0},
    "tolerance": {"least": 0.0, "most": 1.0},
}


@dataclass(frozen=True)
class DynamicScale(ScalingRule):
    """A loss scale that backs off on overflow and grows after a run of finite steps.

        if finite:    good_steps += 1
        else:         good_steps = -growth_delay;  strikes_left -= 1;  overflows += 1
        if good_steps == growth_interval:
            scale = min(scale * growth_factor, max_scale);  good_steps = 0;  strikes_left = hysteresis
        if not finite and strikes_left <= 0 and overflows / steps since the last change >= tolerance:
            scale = max(scale * backoff_factor, min_scale);  overflows = 0

    Args:
        initial_scale: Scale of the first step. Too high costs a few skipped steps, too low thousands of steps with
            lost gradients. Defaults to `2**15`.
        growth_factor: Factor of each growth, above 1 and at most `2**20`. Defaults to 2.
        backoff_factor: Factor of each backoff, below 1 and at least `2**-20`. Defaults to 0.5.
        growth_interval: Number of consecutive finite steps before the scale grows. Defaults to 2000.
        hysteresis: Number of overflows before the scale backs off. Defaults to 1, a backoff at each overflow.
        refill: Event that restores the hysteresis: `"growth"`, `"change"` (growth or backoff) or `"finite"` (any
            finite step). Defaults to `"growth"`.
        min_scale: Lower bound. `None` is float32's smallest normal number, and a backoff that would pass it is
            dropped. Defaults to 1.
        max_scale: Upper bound. `None` is float32's largest number, and a growth that would pass it is dropped.
            Defaults to `2**24`.
        growth_delay: Number of finite steps, at the start and after each overflow, that do not count towards a
            growth. Defaults to 0.
        tolerance: Share of overflows, among the steps since the last change, from which the scale backs off.
            Defaults to 0.

    Raises:
        ValueError: If an argument is out of range.

    Source: PyTorch's `GradScaler` (growth and backoff), Megatron-LM (hysteresis), fairseq (tolerance), TensorFlow 1's
    contrib (`"change"`).

    Example:
    >>> simulate(DynamicScale(initial_scale=8, growth_interval=2), "TTFT")
    [8.0, 16.0, 8.0, 8.0]
    """

    initial_scale: float = 2.0**15
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    refill: Literal["growth", "change", "finite"] = "growth"
    min_scale: float | None = 1.0
    max_scale: float | None = 2.0**24
    growth_delay: int = 0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("initial_scale", "min_scale", "max_scale"):
            if getattr(self, name) is not None or name == "initial_scale":
                object.__setattr__(self, name, validation.scale(name, getattr(self, name)))
        for name, limits in _RANGES.items():
            object.__setattr__(self, name, validation.number(name, getattr(self, name), **limits))
        for name, least in _COUNTS.items():
            object.__setattr__(self, name, validation.count(name, getattr(self, name), least))
        if self.refill not in ("growth", "change", "finite"):
            raise ValueError(f'`refill` must be "growth", "change" or "finite". Received: refill={self.refill!r}')
        validation.bounds(self.initial_scale, self.min_scale, self.max_scale)

    @property
    def bounds(self) -> tuple[float, float]:
        return validation.bounds(self.initial_scale, self.min_scale, self.max_scale)

    def start(self) -> DynamicState:
        scale = numpy.float32(numpy.clip(self.initial_scale, *self.bounds))
        return DynamicState(scale, *(numpy.int32(count) for count in (-self.growth_delay, self.hysteresis, 0, 0)))

    def next(self, state: DynamicState, finite: Any, amax: Any = None, xp: Any = numpy) -> DynamicState:
        overflow = xp.logical_not(finite)
        good_steps = xp.where(finite, state.good_steps + 1, -self.growth_delay)
        grow = good_steps >= self.growth_interval
        # The lower limit of 0 prevents integer overflow in a long run of overflows.
        strikes_left = xp.where(finite, state.strikes_left, xp.maximum(state.strikes_left - 1, 0))
        since_change = state.since_change + 1
        overflows = xp.where(overflow, state.overflows + 1, state.overflows)
        back_off = xp.logical_and(overflow, strikes_left <= 0)
        if self.tolerance:
            back_off = xp.logical_and(back_off, overflows / since_change >= self.tolerance)
        change = xp.logical_or(grow, back_off)
        refill = {"growth": grow, "change": change, "finite": finite}[self.refill]
        lower = xp.where(back_off, self._backed_off(state.scale, xp), state.scale)
        return DynamicState(
            scale=xp.where(grow, self._grown(state.scale, xp), lower),
            good_steps=xp.where(grow, 0, good_steps),
            strikes_left=xp.where(refill, self.hysteresis, strikes_left),
            since_change=xp.where(change, 0, since_change),
            overflows=xp.where(back_off, 0, overflows),
        )

    def _grown(self, scale: Any, xp: Any) -> Any:
        # `where` evaluates both branches. The limit keeps the product finite in the branch that is not selected.
        limit = validation.largest_factor(self.bounds[1], self.growth_factor)
        beyond = scale if self.max_scale is None else self.bounds[1]
        return xp.where(scale > limit, beyond, _product(xp.minimum(scale, limit), self.growth_factor, xp))

    def _backed_off(self, scale: Any, xp: Any) -> Any:
        lower, floor = _product(scale, self.backoff_factor, xp), self.bounds[0]
        return xp.where(lower < floor, scale, lower) if self.min_scale is None else xp.maximum(lower, floor)


def _product(scale: Any, factor: float, xp: Any) -> Any:
    # A factor that float32 cannot represent, such as 0.7, is applied in float64 and the product rounded once, because
    # the error of a rounded factor accumulates. A product, since Grappler and XLA rewrite quotients by constants. JAX
    # has no float64 by default and uses the nearest float32 factor.
    if factor == float(numpy.float32(factor)):
        return scale * factor
    is_tensorflow = hasattr(xp, "cast") and hasattr(xp, "float64")  # which does not promote dtypes
    product = xp.multiply(xp.cast(scale, "float64") if is_tensorflow else scale, numpy.asarray(factor))
    return xp.cast(product, "float32") if hasattr(xp, "cast") else product.astype("float32")
