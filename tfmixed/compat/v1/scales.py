"""The loss scales of TensorFlow 1, its `experimental` ones and `tf.contrib`'s managers: each stands for a rule."""

from __future__ import annotations

from typing import Any, Self

import numpy
import tensorflow as tf

from tfmixed import scaling
from tfmixed.compat import experimental
from tfmixed.compat.v1.graphs import Scalings
from tfmixed.scaling import ConstantScale, DynamicScale, ScalingRule

_THEIRS = tf.compat.v1.mixed_precision


class LossScale:
    """A loss scale that scripts hand to an optimizer and read by calling it.

    Args:
        rule: How it moves: whatever `scaling.get` takes.

    Optimizers that are given the same object share one scale.

    Example:
    >>> float(LossScale("dynamic")())
    32768.0
    """

    def __init__(self, rule: Any) -> None:
        self.scalings = Scalings(scaling.get(rule))

    @property
    def rule(self) -> ScalingRule:
        """How it moves."""
        return self.scalings.rule

    def __call__(self) -> Any:
        """Returns the scale of the present step, a float32 scalar tensor."""
        return self.scalings.scale()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule})"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the loss scale of a configuration."""
        return cls(**config)


class FixedLossScale(LossScale):
    """A loss scale that never moves; steps that are not finite are skipped all the same.

    Args:
        loss_scale_value: A number above 0.

    Raises:
        ValueError: It is none.

    Example:
    >>> float(FixedLossScale(128)())
    128.0
    """

    def __init__(self, loss_scale_value: float) -> None:
        super().__init__(ConstantScale(loss_scale_value))

    def get_config(self) -> dict[str, Any]:
        """Returns the argument of the constructor."""
        return {"loss_scale_value": self.rule.bounds[0]}


class DynamicLossScale(LossScale):
    """TensorFlow's: times `multiplier` after `increment_period` finite steps, divided by it at each other step.

    Unlike there it stops at 1 and at the last finite value.

    Args:
        initial_loss_scale: The first scale.
        increment_period: Finite steps in a row that let it grow.
        multiplier: The factor both ways.

    Raises:
        ValueError: An argument is out of range.

    Example:
    >>> scaling.simulate(DynamicLossScale(8.0, increment_period=2).rule, "TTF")
    [8.0, 16.0, 8.0]
    """

    def __init__(
        self, initial_loss_scale: float = 2.0**15, increment_period: int = 2000, multiplier: float = 2.0
    ) -> None:
        self.initial_loss_scale = float(initial_loss_scale)
        self.increment_period, self.multiplier = int(increment_period), float(multiplier)
        super().__init__(experimental.rule_of(self))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {name: getattr(self, name) for name in ("initial_loss_scale", "increment_period", "multiplier")}


class LossScaleManager(LossScale):
    """Base of the managers of `tf.contrib.mixed_precision`."""

    def get_loss_scale(self) -> Any:
        """Returns the scale of the present step, a float32 scalar tensor."""
        return self()


class FixedLossScaleManager(LossScaleManager):
    """`tf.contrib.mixed_precision.FixedLossScaleManager`: a loss scale that never moves.

    Args:
        loss_scale: A number above 0.

    Raises:
        ValueError: It is none.

    Example:
    >>> float(FixedLossScaleManager(5000).get_loss_scale())
    5000.0
    """

    def __init__(self, loss_scale: float) -> None:
        super().__init__(ConstantScale(loss_scale))


class ExponentialUpdateLossScaleManager(LossScaleManager):
    """`tf.contrib.mixed_precision.ExponentialUpdateLossScaleManager`: grows and backs off after a count of steps.

    Args:
        init_loss_scale: The first scale.
        incr_every_n_steps: Finite steps in a row that let it grow.
        decr_every_n_nan_or_inf: Overflows since the last change that let it back off.
        incr_ratio: Factor of a growth.
        decr_ratio: Factor of a backoff; the scale stops at 1.

    Raises:
        ValueError: An argument is out of range.

    Example:
    >>> scaling.simulate(ExponentialUpdateLossScaleManager(8, 100, 2, 2, 0.5).rule, "FTFFF")
    [8.0, 8.0, 4.0, 4.0, 2.0]
    """

    def __init__(
        self,
        init_loss_scale: float,
        incr_every_n_steps: int,
        decr_every_n_nan_or_inf: int = 2,
        incr_ratio: float = 2,
        decr_ratio: float = 0.8,
    ) -> None:
        rule = DynamicScale(
            initial_scale=init_loss_scale,
            growth_factor=_single(incr_ratio),
            backoff_factor=_single(decr_ratio),
            growth_interval=incr_every_n_steps,
            hysteresis=decr_every_n_nan_or_inf,
            refill="change",
            min_scale=1.0,
            max_scale=None,
        )
        super().__init__(rule)


def scalings_of(loss_scale: Any) -> Scalings:
    """Returns the states that an optimizer with this loss scale works on.

    Args:
        loss_scale: `"dynamic"`, a number, a rule of `tfmixed.scaling`, one of the classes above, or a fixed or dynamic
            loss scale of `tf.compat.v1`, which then follows.

    Raises:
        ValueError: It is none of these.
    """
    if loss_scale is None:
        raise ValueError('loss_scale must be "dynamic", a number, a rule or a LossScale, received None')
    if _updates_itself(loss_scale):
        raise ValueError(
            f"loss_scale must be a rule where its update is your own, received a {type(loss_scale).__name__}: "
            "derive it from tfmixed.scaling.ScalingRule"
        )
    if isinstance(loss_scale, LossScale):
        return loss_scale.scalings
    if isinstance(loss_scale, type):
        raise ValueError(f"loss_scale must be an object, received the class {loss_scale.__name__}: call it")
    try:
        rule = experimental.rule_of(loss_scale)
    except ValueError as error:
        raise ValueError(f"loss_scale is not one that can be used: {error}") from None
    return Scalings(rule, loss_scale._current_loss_scale if isinstance(loss_scale, _THEIRS.DynamicLossScale) else None)


def _updates_itself(loss_scale: Any) -> bool:
    """Returns whether a script wrote a loss scale or a manager with an update of its own, in graph operations."""
    if isinstance(loss_scale, LossScale):
        return hasattr(loss_scale, "update") or hasattr(loss_scale, "update_loss_scale")
    known = (_THEIRS.FixedLossScale, _THEIRS.DynamicLossScale)
    return isinstance(loss_scale, _THEIRS.LossScale) and type(loss_scale) not in known


def _single(factor: float) -> float:
    # The managers multiply by a float32 tensor.
    return float(numpy.float32(factor))
