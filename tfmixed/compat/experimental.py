"""What `tf.keras.mixed_precision.experimental` held in TensorFlow 2.1 to 2.3: there a policy had a loss scale."""

from __future__ import annotations

from typing import Any

import keras

from tfmixed import policy as policies
from tfmixed import scaling
from tfmixed._core import loss_scale_optimizer as current
from tfmixed._utils import user_warnings

__all__ = ["DynamicLossScale", "FixedLossScale", "LossScaleOptimizer", "Policy", "global_policy", "set_policy"]

global_policy = keras.config.dtype_policy


# Saved by the name of the plain class, which reads the file where this module was not imported.
@keras.saving.register_keras_serializable("tfmixed", "LossScaleOptimizer")
class LossScaleOptimizer(current.LossScaleOptimizer):
    """`tfmixed.LossScaleOptimizer` with the arguments of that time. A saved one is loaded as a plain one.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, or the name of one.
        loss_scale: `"dynamic"`, a number, a rule of `tfmixed.scaling`, None, or a loss scale of
            `tf.compat.v1.mixed_precision`.

    Raises:
        ValueError: `loss_scale` is none of these.
        TypeError: `optimizer` is no optimizer.

    Example:
    >>> LossScaleOptimizer(keras.optimizers.SGD(), 128).dynamic
    False
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, loss_scale: Any = "dynamic") -> None:
        super().__init__(optimizer, rule_of(loss_scale))

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> current.LossScaleOptimizer:
        """Returns the plain optimizer of a configuration."""
        return current.LossScaleOptimizer.from_config(config, custom_objects)


# And the name goes on meaning the plain class.
keras.saving.register_keras_serializable("tfmixed")(current.LossScaleOptimizer)


def FixedLossScale(loss_scale_value: float) -> scaling.ScalingRule:  # noqa: N802  # it was a class
    """Returns the rule of a loss scale that never moves.

    Raises:
        ValueError: It is no scale.

    Example:
    >>> FixedLossScale(128).value
    128.0
    """
    return scaling.ConstantScale(loss_scale_value)


def DynamicLossScale(  # noqa: N802  # it was a class
    initial_loss_scale: float = 2.0**15, increment_period: int = 2000, multiplier: float = 2.0
) -> scaling.ScalingRule:
    """Returns the rule of TensorFlow's dynamic loss scale.

    Args:
        initial_loss_scale: The first scale.
        increment_period: Finite steps in a row that let it grow.
        multiplier: Factor of a growth; an overflow divides by it.

    Raises:
        ValueError: An argument is out of range.

    Example:
    >>> DynamicLossScale(increment_period=100).growth_interval
    100
    """
    return scaling.like("tf1", initial_scale=initial_loss_scale, factor=multiplier, growth_interval=increment_period)


def Policy(name: str, loss_scale: Any = "auto") -> keras.DTypePolicy:  # noqa: N802  # it was a class
    """Returns a Keras policy that remembers a loss scale.

    `compile` of Keras 3 knows of none: it scales by Keras's own dynamic rule under `"mixed_float16"`, and not at all
    elsewhere. A loss scale that differs from that is said to need an optimizer of its own.

    Args:
        name: As for `keras.DTypePolicy`.
        loss_scale: As for `LossScaleOptimizer`; `"auto"` is dynamic for `"mixed_float16"` and None elsewhere.

    Raises:
        ValueError: Keras knows no such policy, or `loss_scale` is no loss scale.

    Example:
    >>> Policy("mixed_float16").loss_scale
    'dynamic'
    """
    policy = keras.DTypePolicy(name)
    compiled = "dynamic" if name == "mixed_float16" else None
    policy.loss_scale = compiled if loss_scale == "auto" else loss_scale
    if rule_of(policy.loss_scale) != rule_of(compiled):
        user_warnings.warn(
            f"Policy({name!r}, loss_scale={loss_scale!r}): compile() does not take the loss scale from a policy any "
            "more. Pass it an optimizer that has it: experimental.LossScaleOptimizer(optimizer, policy.loss_scale)."
        )
    return policy


def set_policy(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    """Sets the global policy as `tfmixed.set_policy` does; one by name has the loss scale that `Policy` gives it.

    Raises:
        ValueError: Keras knows no such policy.

    Example:
    >>> set_policy("float32").loss_scale is None
    True
    """
    return policies.set_policy(Policy(policy) if isinstance(policy, str) else policy)


def rule_of(loss_scale: Any) -> scaling.ScalingRule:
    """Returns the rule of a loss scale; those of TensorFlow are known by their configurations."""
    config: dict[str, Any] = getattr(loss_scale, "get_config", dict)()
    if "loss_scale_value" in config:
        return scaling.get(config["loss_scale_value"])
    if "increment_period" in config:
        return DynamicLossScale(config["initial_loss_scale"], config["increment_period"], config["multiplier"])
    return scaling.get(loss_scale)
