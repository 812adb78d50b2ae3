"""Names of `tf.keras.mixed_precision.experimental` in TensorFlow 2.1 to 2.3, where a policy has a loss scale."""

from __future__ import annotations

from typing import Any

import keras

from tfmixed import policy as policies
from tfmixed import scaling
from tfmixed._core import loss_scale_optimizer as current
from tfmixed._utils import user_warnings

__all__ = ["DynamicLossScale", "FixedLossScale", "LossScaleOptimizer", "Policy", "global_policy", "set_policy"]

global_policy = keras.config.dtype_policy


# Saved under the name of the plain class, so that the file loads without this module.
@keras.saving.register_keras_serializable("tfmixed", "LossScaleOptimizer")
class LossScaleOptimizer(current.LossScaleOptimizer):
    """`tfmixed.LossScaleOptimizer` with the arguments of TensorFlow 2.1 to 2.3. It is saved as the plain class.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, or the name of one.
        loss_scale: `"dynamic"`, a number, a rule of `tfmixed.scaling`, None, or a loss scale of
            `tf.compat.v1.mixed_precision`. Defaults to `"dynamic"`.

    Raises:
        ValueError: If `loss_scale` is not one of these.
        TypeError: If `optimizer` is not an optimizer.

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
        """Returns the plain `tfmixed.LossScaleOptimizer` of a configuration."""
        return current.LossScaleOptimizer.from_config(config, custom_objects)


# The registration above replaced this one.
keras.saving.register_keras_serializable("tfmixed")(current.LossScaleOptimizer)


def FixedLossScale(loss_scale_value: float) -> scaling.ScalingRule:  # noqa: N802  # it was a class
    """Returns the rule of a constant loss scale.

    Raises:
        ValueError: If `loss_scale_value` is not a valid scale.

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
        initial_loss_scale: The initial scale. Defaults to 2**15.
        increment_period: The number of consecutive finite steps before the scale grows. Defaults to 2000.
        multiplier: The growth factor. An overflow divides by it. Defaults to 2.

    Raises:
        ValueError: If an argument is out of range.

    Example:
    >>> DynamicLossScale(increment_period=100).growth_interval
    100
    """
    return scaling.like("tf1", initial_scale=initial_loss_scale, factor=multiplier, growth_interval=increment_period)


def Policy(name: str, loss_scale: Any = "auto") -> keras.DTypePolicy:  # noqa: N802  # it was a class
    """Returns a Keras policy with an attribute `loss_scale`.

    `compile` of Keras 3 ignores it: it uses Keras's own dynamic rule under `"mixed_float16"`, and no scaling otherwise.
    A loss scale that differs from that is reported with a warning.

    Args:
        name: The name of the policy, as for `keras.DTypePolicy`.
        loss_scale: The loss scale, as for `LossScaleOptimizer`. `"auto"` is dynamic for `"mixed_float16"` and None
            otherwise. Defaults to `"auto"`.

    Raises:
        ValueError: If Keras has no such policy, or `loss_scale` is invalid.

    Example:
    >>> Policy("mixed_float16").loss_scale
    'dynamic'
    """
    policy = keras.DTypePolicy(name)
    compiled = "dynamic" if name == "mixed_float16" else None
    policy.loss_scale = compiled if loss_scale == "auto" else loss_scale
    if rule_of(policy.loss_scale) != rule_of(compiled):
        user_warnings.warn(
            "compile() does not use the loss scale of a policy. Pass an optimizer that has it: "
            f"experimental.LossScaleOptimizer(optimizer, policy.loss_scale). Received: loss_scale={loss_scale!r}."
        )
    return policy


def set_policy(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    """Sets the global policy, as `tfmixed.set_policy` does. A policy given by name gets a loss scale, as in `Policy`.

    Raises:
        ValueError: If Keras has no such policy.

    Example:
    >>> set_policy("float32").loss_scale is None
    True
    """
    return policies.set_policy(Policy(policy) if isinstance(policy, str) else policy)


def rule_of(loss_scale: Any) -> scaling.ScalingRule:
    """Returns the rule of a loss scale, which may be an object of TensorFlow with a `get_config`."""
    config: dict[str, Any] = getattr(loss_scale, "get_config", dict)()
    if "loss_scale_value" in config:
        return scaling.get(config["loss_scale_value"])
    if "increment_period" in config:
        return DynamicLossScale(config["initial_loss_scale"], config["increment_period"], config["multiplier"])
    return scaling.get(loss_scale)
