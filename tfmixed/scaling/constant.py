"""`ConstantScale`: a fixed loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from tfmixed.scaling import validation
from tfmixed.scaling.base import ScalingRule


class ConstantState(NamedTuple):
    """State of a `ConstantScale`.

    Args:
        scale: The loss scale, a float32 scalar.
    """

    scale: Any


@dataclass(frozen=True)
class ConstantScale(ScalingRule):
    """A fixed loss scale.

        scale = value
        each step:
            if not finite and skip_nonfinite: skip the update
            else: apply it

    Args:
        value: The loss scale. Must be positive.
        skip_nonfinite: Whether to skip steps with non-finite gradients. `False` applies every step without a check,
            so that an overflow destroys the weights. Defaults to `True`.

    Raises:
        ValueError: If an argument is out of range.

    Source: Micikevicius et al., "Mixed Precision Training", 2017, section 3.2.

    Example:
    >>> simulate(ConstantScale(128.0), "TFT")
    [128.0, 128.0, 128.0]
    """

    value: float
    skip_nonfinite: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", validation.scale("value", self.value))
        validation.boolean("skip_nonfinite", self.skip_nonfinite)

    @property
    def bounds(self) -> tuple[float, float]:
        scale = float(numpy.float32(self.value))
        return scale, scale

    def start(self) -> ConstantState:
        return ConstantState(numpy.float32(self.value))

    def next(self, state: ConstantState, finite: Any, amax: Any = None, xp: Any = numpy) -> ConstantState:
        return state
