"""`enable_mixed_precision_graph_rewrite` and its counterpart: an optimizer that scales, and the switch."""

from __future__ import annotations

import sys
from typing import Any

import keras
import tensorflow as tf

import tfmixed
from tfmixed.compat.v1 import rewrite
from tfmixed.compat.v1.optimizer import LossScaleOptimizer
from tfmixed.compat.v1.scales import scalings_of
from tfmixed.scaling import ConstantScale, DynamicScale, ScalingRule


def enable_mixed_precision_graph_rewrite(opt: Any, loss_scale: Any = "dynamic", dtype: str = "auto") -> Any:
    """Switches the graph rewrite to half precision on, and returns an optimizer that scales the loss.

    It reaches functions of `tf.function` and sessions that are made from now on, whatever their `ConfigProto`, unless
    that has `auto_mixed_precision` OFF. The model stays as it is.

    Args:
        opt: An optimizer of `tf.compat.v1.train` or of a subclass, one of Keras 3, or a legacy one of tf_keras.
        loss_scale: As for `LossScaleOptimizer` of this package.
        dtype: `"float16"` (the CUDA pass, on GPUs of compute capability 7.0 or more), `"bfloat16"` (oneDNN's pass, on
            CPUs), or `"auto"`: what is fast here; where nothing is it warns, and nothing is converted.

    Returns:
        A `LossScaleOptimizer` of this package for an optimizer of TensorFlow 1, a `tfmixed.LossScaleOptimizer` for one
        of Keras, one of tf_keras for a legacy one.

    Raises:
        ValueError: `opt` is none of these or scales the loss itself, `loss_scale` or `dtype` is none, or Keras has a
            policy for mixed precision.
        NotImplementedError: `opt` is a `SyncReplicasOptimizer`.

    Example:
    >>> optimizer = tf.compat.v1.train.AdamOptimizer()
    >>> optimizer = enable_mixed_precision_graph_rewrite(optimizer, loss_scale=128)
    >>> float(optimizer.loss_scale)
    128.0
    >>> disable_mixed_precision_graph_rewrite()
    """
    optimizer = wrap(opt, loss_scale)
    rewrite.enable(dtype)
    return optimizer


def disable_mixed_precision_graph_rewrite() -> None:
    """Switches the rewrite off for functions, and for sessions that are made from now on. Optimizers go on scaling."""
    rewrite.disable()


def wrap(opt: Any, loss_scale: Any = "dynamic") -> Any:
    """Returns an optimizer around `opt` that scales the loss; nothing else happens.

    Raises:
        ValueError: `opt` or `loss_scale` is none.
        NotImplementedError: `opt` is a `SyncReplicasOptimizer`.
    """
    if isinstance(opt, tf.compat.v1.train.Optimizer):
        return LossScaleOptimizer(opt, loss_scale)
    if isinstance(opt, keras.optimizers.Optimizer):
        return tfmixed.LossScaleOptimizer(opt, scalings_of(loss_scale).rule)
    legacy = sys.modules.get("tf_keras")
    if legacy is not None and isinstance(opt, legacy.optimizers.legacy.Optimizer):
        return _legacy(legacy, opt, scalings_of(loss_scale).rule)
    raise ValueError(
        "opt must be an optimizer of tf.compat.v1.train, of Keras 3, or a legacy one of tf_keras "
        f"(tf_keras.optimizers.legacy), received {opt!r}"
    )


def _legacy(tf_keras: Any, opt: Any, rule: ScalingRule) -> Any:
    """Returns tf_keras's own wrapper, which knows constant scales and doubling ones."""
    wrapper = tf_keras.mixed_precision.LossScaleOptimizer
    if isinstance(opt, wrapper):
        raise ValueError(f"opt must not scale the loss itself, received a {type(opt).__name__}: pass the one it wraps")
    if isinstance(rule, ConstantScale):
        return wrapper(opt, dynamic=False, initial_scale=rule.value)
    fixed = ("growth_factor", "backoff_factor", "hysteresis", "min_scale", "growth_delay", "tolerance")
    if not isinstance(rule, DynamicScale) or [getattr(rule, name) for name in fixed] != [2, 0.5, 1, 1, 0, 0]:
        raise ValueError(
            "loss_scale must double, halve at each overflow and stop at 1 for an optimizer of tf_keras, whose own rule "
            f"that is, received {rule}"
        )
    return wrapper(opt, initial_scale=rule.initial_scale, dynamic_growth_steps=rule.growth_interval)
