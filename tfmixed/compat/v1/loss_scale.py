"""Loss scales of TensorFlow 1 and 2.0 to 2.3, and managers of `tf.contrib`. Each stands for a scaling rule."""

from __future__ import annotations

from typing import Any, Self

import numpy
import tensorflow as tf

from tfmixed import scaling
from tfmixed.compat import experimental
from tfmixed.compat.v1.graph_state import GraphStates
from tfmixed.scaling import ConstantScale, DynamicScale, ScalingRule

_THEIRS = tf.compat.v1.mixed_precision


class LossScale:
    """A loss scale that scripts pass to an optimizer, and call to read the scale.

    Optimizers that are given the same object share one scale.

    Args:
        rule: The scaling rule, or any value that `scaling.get` takes.

    Example:
    >>> float(LossScale("dynamic")())
    32768.0
    """

    def __init__(self, rule: Any) -> None:
        self.states = GraphStates(scaling.get(rule))

    @property
    def rule(self) -> ScalingRule:
        """The scaling rule."""
        return self.states.rule

    def __call__(self) -> Any:
        """Returns the scale of the current step, a float32 scalar tensor."""
        return self.states.scale()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule})"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the loss scale of a configuration."""
        return cls(**config)


class FixedLossScale(LossScale):
    """A constant loss scale. Steps with non-finite gradients are still skipped.

    Args:
        loss_scale_value: The scale, a positive number.

    Raises:
        ValueError: If `loss_scale_value` is not positive.

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
    """A loss scale that grows after `increment_period` finite steps, and shrinks at each overflow.

    Unlike TensorFlow's, it stays between 1 and the largest finite value.

    Args:
        initial_loss_scale: The initial scale. Defaults to 2**15.
        increment_period: The number of consecutive finite steps before the scale grows. Defaults to 2000.
        multiplier: The factor of both changes. Defaults to 2.

    Raises:
        ValueError: If an argument is out of range.

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
    """Base class of the managers of `tf.contrib.mixed_precision`."""

    def get_loss_scale(self) -> Any:
        """Returns the scale of the current step, a float32 scalar tensor."""
        return self()


class FixedLossScaleManager(LossScaleManager):
    """`tf.contrib.mixed_precision.FixedLossScaleManager`: a constant loss scale.

    Args:
        loss_scale: The scale, a positive number.

    Raises:
        ValueError: If `loss_scale` is not positive.

    Example:
    >>> float(FixedLossScaleManager(5000).get_loss_scale())
    5000.0
    """

    def __init__(self, loss_scale: float) -> None:
        super().__init__(ConstantScale(loss_scale))


class ExponentialUpdateLossScaleManager(LossScaleManager):
    """`tf.contrib.mixed_precision.ExponentialUpdateLossScaleManager`: grows and backs off after a number of steps.

    Args:
        init_loss_scale: The initial scale.
        incr_every_n_steps: The number of consecutive finite steps before the scale grows.
        decr_every_n_nan_or_inf: The number of overflows since the last change before the scale backs off. Defaults
            to 2.
        incr_ratio: The growth factor. Defaults to 2.
        decr_ratio: The backoff factor. The scale does not fall below 1. Defaults to 0.8.

    Raises:
        ValueError: If an argument is out of range.

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
            # The original managers multiply by float32 tensors.
            growth_factor=float(numpy.float32(incr_ratio)),
            backoff_factor=float(numpy.float32(decr_ratio)),
            growth_interval=incr_every_n_steps,
            hysteresis=decr_every_n_nan_or_inf,
            refill="change",
            min_scale=1.0,
            max_scale=None,
        )
        super().__init__(rule)


def states_of(loss_scale: Any) -> GraphStates:
    """Returns the states of an optimizer that is given `loss_scale`.

    Args:
        loss_scale: `"dynamic"`, a number, a rule of `tfmixed.scaling`, a loss scale of this module, or one of
            `tf.compat.v1`, whose variable is then kept equal to the scale.

    Raises:
        ValueError: If `loss_scale` is not one of these.
    """
    if isinstance(loss_scale, LossScale):
        if hasattr(loss_scale, "update") or hasattr(loss_scale, "update_loss_scale"):
            raise _custom_update(loss_scale)
        return loss_scale.states
    known = (_THEIRS.FixedLossScale, _THEIRS.DynamicLossScale)
    if isinstance(loss_scale, _THEIRS.LossScale) and type(loss_scale) not in known:
        raise _custom_update(loss_scale)
    try:
        rule = None if loss_scale is None or isinstance(loss_scale, type) else experimental.rule_of(loss_scale)
    except ValueError as error:
        raise ValueError(f"`loss_scale` is not valid: {error}") from None
    if rule is None:
        raise ValueError(
            '`loss_scale` must be "dynamic", a number, a rule or a LossScale object. '
            f"Received: loss_scale={loss_scale!r}."
        )
    return GraphStates(
        rule, loss_scale._current_loss_scale if isinstance(loss_scale, _THEIRS.DynamicLossScale) else None
    )


def _custom_update(loss_scale: Any) -> ValueError:
    return ValueError(
        "`loss_scale` must not update itself in graph operations. Derive a rule from tfmixed.scaling.ScalingRule. "
        f"Received: {type(loss_scale).__name__}."
    )
