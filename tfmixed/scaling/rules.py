"""The rules `ConstantScale` and `DynamicScale`, and what a rule is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy

from tfmixed.scaling import validation


class ScalingRule:
    """Base of all rules. A subclass is a frozen dataclass with `start`, `next` and `bounds`.

    Deriving from it registers the class by name, so that a saved optimizer can be restored.
    """

    needs_amax: ClassVar[bool] = False
    skip_nonfinite: bool = True
    _classes: ClassVar[dict[str, type[ScalingRule]]] = {}

    def __init_subclass__(cls) -> None:
        ScalingRule._classes[cls.__name__] = cls

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest scale that this rule can reach."""
        raise NotImplementedError

    def start(self) -> Any:
        """Returns the state before the first step: a NamedTuple of numpy scalars whose first field is `scale`."""
        raise NotImplementedError

    def next(self, state: Any, finite: Any, amax: Any = None, xp: Any = numpy) -> Any:
        """Returns the state after one step.

        Args:
            state: The state before it.
            finite: Boolean scalar: were all unscaled gradients finite?
            amax: float32 scalar, the largest absolute unscaled gradient; only where `needs_amax`.
            xp: `numpy`, `tensorflow` or `keras.ops`.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Returns a dictionary that `scaling.get` turns into an equal rule."""
        return {"rule": type(self).__name__, **asdict(cast("Any", self))}

    @staticmethod
    def from_config(config: dict[str, Any]) -> ScalingRule:
        """Returns the rule that `get_config` described.

        Raises:
            ValueError: No class of that name is known, or its fields are others.
        """
        name, fields = config.get("rule"), {key: value for key, value in config.items() if key != "rule"}
        if not isinstance(name, str) or name not in ScalingRule._classes:
            raise ValueError(f"rule must be one of {', '.join(ScalingRule._classes)}, received {name!r}")
        try:
            return ScalingRule._classes[name](**fields)
        except TypeError as error:
            raise ValueError(f"the fields of {name} do not fit, received {sorted(fields)}: {error}") from None


class ConstantState(NamedTuple):
    """State of a `ConstantScale`.

    Args:
        scale: float32 scalar, the loss scale.
    """

    scale: Any


@dataclass(frozen=True)
class ConstantScale(ScalingRule):
    """A loss scale that never moves.

        scale = value
        each step:
            if not finite and skip_nonfinite: skip the update
            else: apply it

    Args:
        value: The scale, above 0.
        skip_nonfinite: Skip steps with a non-finite gradient. False applies every step unchecked, as a plain
            multiplication of the loss would: an overflow then destroys the weights.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Source: Micikevicius et al., "Mixed Precision Training", 2017, section 3.2.

    Example:
    >>> simulate(ConstantScale(128.0), "TFT")
    [128.0, 128.0, 128.0]
    """

    value: float
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", validation.scale("value", self.value))
        if not isinstance(self.skip_nonfinite, bool):
            raise ValueError(f"skip_nonfinite must be True or False, received {self.skip_nonfinite!r}")

    @property
    def bounds(self) -> tuple[float, float]:
        scale = float(numpy.float32(self.value))
        return scale, scale

    def start(self) -> ConstantState:
        return ConstantState(numpy.float32(self.value))

    def next(self, state: ConstantState, finite: Any, amax: Any = None, xp: Any = numpy) -> ConstantState:
        return state


class DynamicState(NamedTuple):
    """State of a `DynamicScale`.

    Args:
        scale: float32 scalar, the loss scale.
        good_steps: Integer scalar, finite steps that count towards the next growth.
        strikes_left: Integer scalar, overflows that are still to come before the scale backs off.
        since_change: Integer scalar, steps since the scale last grew or backed off.
        overflows: Integer scalar, overflows since the scale last backed off.
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
    """A loss scale that backs off at overflows and grows when there were none for a while.

        if finite:    good_steps += 1
        else:         good_steps = -growth_delay;  strikes_left -= 1;  overflows += 1
        if good_steps == growth_interval:
            scale = min(scale * growth_factor, max_scale);  good_steps = 0;  strikes_left = hysteresis
        if not finite and strikes_left <= 0 and overflows / steps since the last change >= tolerance:
            scale = max(scale * backoff_factor, min_scale);  overflows = 0

    Args:
        initial_scale: Scale of the first step. Too high costs a few skipped steps, too low thousands.
        growth_factor: Factor of a growth, above 1 and at most 2**20.
        backoff_factor: Factor of a backoff, below 1 and at least 2**-20.
        growth_interval: Finite steps in a row that let the scale grow.
        hysteresis: Overflows that it takes for a backoff. 1 backs off at each.
        refill: When spent hysteresis comes back: at each `"growth"`, at each `"change"` of the scale, down as well as
            up, or at each `"finite"` step.
        min_scale: Floor. None: float32's smallest normal; a backoff that would pass it does not happen.
        max_scale: Ceiling. None: float32's largest value; a growth that would pass it does not happen.
        growth_delay: Finite steps at the start and after an overflow that do not count towards a growth.
        tolerance: Share of overflows among the steps since the last change from which the scale backs off.

    Raises:
        ValueError: An argument is out of range; the message names it and the value.

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
            raise ValueError(f'refill must be "growth", "change" or "finite", received {self.refill!r}')
        validation.bounds(self.initial_scale, self.min_scale, self.max_scale)

    @property
    def bounds(self) -> tuple[float, float]:
        return validation.bounds(self.initial_scale, self.min_scale, self.max_scale)

    def start(self) -> DynamicState:
        return DynamicState(
            numpy.float32(numpy.clip(self.initial_scale, *self.bounds)),
            *(numpy.int32(count) for count in (-self.growth_delay, self.hysteresis, 0, 0)),
        )

    def next(self, state: DynamicState, finite: Any, amax: Any = None, xp: Any = numpy) -> DynamicState:
        overflow = xp.logical_not(finite)
        good_steps = xp.where(finite, state.good_steps + 1, -self.growth_delay)
        grow = good_steps >= self.growth_interval
        # Held at 0, so that a long run of overflows cannot wrap the counter.
        strikes_left = xp.where(finite, state.strikes_left, xp.maximum(state.strikes_left - 1, 0))
        since_change = state.since_change + 1
        overflows = xp.where(overflow, state.overflows + 1, state.overflows)
        back_off = xp.logical_and(overflow, strikes_left <= 0)
        if self.tolerance:
            back_off = xp.logical_and(back_off, overflows / since_change >= self.tolerance)
        changes = xp.logical_or(grow, back_off)
        refills = {"growth": grow, "change": changes, "finite": finite}[self.refill]
        lower = xp.where(back_off, self._backed_off(state.scale, xp), state.scale)
        return DynamicState(
            scale=xp.where(grow, self._grown(state.scale, xp), lower),
            good_steps=xp.where(grow, 0, good_steps),
            strikes_left=xp.where(refills, self.hysteresis, strikes_left),
            since_change=xp.where(changes, 0, since_change),
            overflows=xp.where(back_off, 0, overflows),
        )

    def _grown(self, scale: Any, xp: Any) -> Any:
        # The limit keeps the product finite in the branch that is not selected too: no inf, no warning.
        limit = validation.largest_factor(self.bounds[1], self.growth_factor)
        beyond = scale if self.max_scale is None else self.bounds[1]
        return xp.where(scale > limit, beyond, _times(xp.minimum(scale, limit), self.growth_factor, xp))

    def _backed_off(self, scale: Any, xp: Any) -> Any:
        lower, floor = _times(scale, self.backoff_factor, xp), self.bounds[0]
        return xp.where(lower < floor, scale, lower) if self.min_scale is None else xp.maximum(lower, floor)


def _times(scale: Any, factor: float, xp: Any) -> Any:
    # A factor that float32 has not, such as 0.7, is applied in float64 and rounded once: its error would add up over
    # many steps. One product and no quotient, because Grappler and XLA fold constants and turn quotients around. On
    # JAX, which has no float64 unless told so, the factor is float32's nearest.
    if factor == float(numpy.float32(factor)):
        return scale * factor
    is_tensorflow = hasattr(xp, "cast") and hasattr(xp, "float64")  # it does not promote by itself
    product = xp.multiply(xp.cast(scale, "float64") if is_tensorflow else scale, numpy.asarray(factor))
    return xp.cast(product, "float32") if hasattr(xp, "cast") else product.astype("float32")
