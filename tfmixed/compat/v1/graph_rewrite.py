"""Grappler's automatic mixed precision rewrite, enabled and disabled for the whole process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.protobuf import rewriter_config_pb2
from tensorflow.python.client.session import BaseSession
from tensorflow.python.framework.test_util import IsMklEnabled
from tensorflow.python.training.experimental import mixed_precision_global_state as flags

import tfmixed
from tfmixed import hardware
from tfmixed._utils import user_warnings
from tfmixed.compat.v1 import patches
from tfmixed.compat.v1.loss_scale import states_of
from tfmixed.compat.v1.optimizer import LossScaleOptimizer, mixed_policy
from tfmixed.policy import BESIDE_REWRITE, REWRITE
from tfmixed.scaling import ConstantScale, DynamicScale, ScalingRule

# Owner of the changes in `patches`.
OWNER = "graph rewrite"
_OPTIONS: dict[str | None, dict[str, bool]] = {
    None: {},
    "float16": {"auto_mixed_precision": True},
    # TensorFlow sets `auto_mixed_precision` for each session while its flag is set. Off here, because on some CPUs both
    # passes would run.
    "bfloat16": {"auto_mixed_precision": False, "auto_mixed_precision_onednn_bfloat16": True},
}
_ON, _OFF = rewriter_config_pb2.RewriterConfig.ON, rewriter_config_pb2.RewriterConfig.OFF
# What the rewrite converts to while it is enabled.
_active_dtype: str | None = None


def enable_mixed_precision_graph_rewrite(opt: Any, loss_scale: Any = "dynamic", dtype: str = "auto") -> Any:
    """Enables the graph rewrite to half precision, and returns an optimizer that scales the loss.

    The rewrite applies to all functions made by `tf.function`, and to sessions created after this call, unless their
    `ConfigProto` has `auto_mixed_precision` OFF. The model itself is not changed.

    Args:
        opt: An optimizer of `tf.compat.v1.train` or a subclass, a Keras 3 optimizer, or a legacy tf_keras optimizer.
        loss_scale: The loss scale, as in `LossScaleOptimizer`. Defaults to `"dynamic"`.
        dtype: The dtype to convert to. `"float16"` uses the CUDA pass, on GPUs of compute capability 7.0 or higher.
            `"bfloat16"` uses the oneDNN pass, on CPUs. `"auto"` selects the dtype that is fast on this machine; if
            there is none, it warns and converts nothing. Defaults to `"auto"`.

    Returns:
        A `tfmixed.compat.v1.LossScaleOptimizer` for a TensorFlow 1 optimizer, a `tfmixed.LossScaleOptimizer` for a
        Keras optimizer, or tf_keras's own loss scale optimizer for a legacy optimizer.

    Raises:
        ValueError: If `opt` is not such an optimizer or already scales the loss, if `loss_scale` or `dtype` is invalid,
            or if a mixed precision Keras policy is set.
        NotImplementedError: If `opt` is a `SyncReplicasOptimizer`.

    Example:
    >>> optimizer = tf.compat.v1.train.AdamOptimizer()
    >>> optimizer = enable_mixed_precision_graph_rewrite(optimizer, loss_scale=128)
    >>> float(optimizer.loss_scale)
    128.0
    >>> disable_mixed_precision_graph_rewrite()
    """
    optimizer = _scaled(opt, loss_scale)
    enable(dtype)
    return optimizer


def disable_mixed_precision_graph_rewrite() -> None:
    """Disables the rewrite for functions, and for sessions created after this call. Optimizers continue to scale."""
    if patches.is_active(OWNER):
        patches.undo(OWNER)
    elif flags.is_mixed_precision_graph_rewrite_enabled():  # by TensorFlow's own function, without `install`
        tf.compat.v1.mixed_precision.disable_mixed_precision_graph_rewrite()
    else:
        user_warnings.warn("The graph rewrite is already disabled.")


def enable(dtype: str = "auto") -> None:
    """Enables the rewrite; see `enable_mixed_precision_graph_rewrite`."""
    if policy := mixed_policy():
        raise ValueError(BESIDE_REWRITE.format(f"the Keras policy {policy!r} was set", REWRITE))
    chosen = _select(dtype)
    if chosen is not None and flags.non_mixed_precision_session_created():
        print("tfmixed: sessions created before the graph rewrite was enabled are not converted", file=sys.stderr)
    patches.undo(OWNER)  # it may have been enabled with another dtype
    options = tf.config.optimizer.get_experimental_options()
    before = {name: options.get(name, False) for name in _OPTIONS["bfloat16"]}
    patches.on_undo(OWNER, _set_state, None, before, False)
    patches.wrap(OWNER, BaseSession, "__init__", create_session)
    _set_state(chosen, _OPTIONS[chosen], True)


def _set_state(dtype: str | None, options: dict[str, bool], enabled: bool) -> None:
    global _active_dtype
    _active_dtype = dtype
    tf.config.optimizer.set_experimental_options(options)
    flags.set_mixed_precision_graph_rewrite_enabled(enabled)


def is_enabled() -> bool:
    """Returns whether the rewrite is enabled, even if it converts nothing on this machine."""
    return patches.is_active(OWNER)


def active() -> str | None:
    """Returns the dtype that the rewrite converts to, or None."""
    return _active_dtype


def create_session(
    plain: Callable[..., None], self: Any, target: str = "", graph: Any = None, config: Any = None
) -> None:
    """Creates a session whose configuration has the options of the rewrite: a wrapper of `BaseSession.__init__`."""
    if is_enabled() and not flags.is_mixed_precision_graph_rewrite_enabled():
        patches.undo(OWNER)  # TensorFlow's own `disable_mixed_precision_graph_rewrite` was called
    # TensorFlow applies its global options only to sessions without a configuration.
    unconverted = flags.non_mixed_precision_session_created()
    config = _configured(config)
    plain(self, target, graph, config=config)
    if config is not None and config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 == _ON:
        flags.set_non_mixed_precision_session_created(unconverted)


def _configured(config: Any) -> Any:
    """Returns a copy of `config` with the options of the rewrite, or `config` itself if that opts out."""
    if not isinstance(config, tf.compat.v1.ConfigProto):
        return config
    asked = config.graph_options.rewrite_options.auto_mixed_precision
    if asked == _OFF or (asked != _ON and _active_dtype is None):
        return config
    dtype = _active_dtype if is_enabled() else _select("auto")
    changed = tf.compat.v1.ConfigProto()
    changed.CopyFrom(config)
    if dtype is not None:
        changed.graph_options.place_pruned_graph = False  # set by InteractiveSession, and disables grappler
    for name, on in _OPTIONS[dtype].items():
        setattr(changed.graph_options.rewrite_options, name, _ON if on else _OFF)
    return changed


def _select(dtype: Any) -> str | None:
    """Returns the dtype to convert to, and reports the reason."""
    dtype = getattr(dtype, "name", dtype)
    if dtype not in ("auto", "float16", "bfloat16"):
        raise ValueError(f'`dtype` must be "auto", "float16" or "bfloat16". Received: dtype={dtype!r}.')
    native, fast, reason = _native_dtype()
    if dtype == "auto" and not fast:
        user_warnings.warn(
            f"The graph rewrite converts nothing on this machine: {reason}. Training continues in float32, with a loss "
            "scale."
        )
        return None
    if dtype not in ("auto", native):
        where = "GPUs of compute capability 7.0 or higher" if dtype == "float16" else "CPUs, with oneDNN"
        user_warnings.warn(
            f"The graph rewrite to {dtype} only converts on {where}, and this machine uses none: {reason}. "
            'Use dtype="auto".'
        )
    elif not fast:
        user_warnings.warn(f"The graph rewrite to {dtype} is not fast on this machine: {reason}.")
    else:
        print(f"tfmixed: graph rewrite to {native}: {reason}", file=sys.stderr)
    return native if dtype == "auto" else str(dtype)


def _native_dtype() -> tuple[str, bool, str]:
    """Returns the dtype of the pass for this machine, whether that is fast, and the reason."""
    device = hardware.describe().main
    if device.kind == "gpu" and "float16" in device.fast:
        return "float16", True, f"compute capability {device.compute_capability} has float16 tensor cores"
    if device.kind == "gpu":
        return "float16", False, device.reason
    if "bfloat16" in device.fast and not IsMklEnabled():
        return "bfloat16", False, "oneDNN, which converts to bfloat16, is disabled (TF_ENABLE_ONEDNN_OPTS)"
    return "bfloat16", "bfloat16" in device.fast, device.reason


def _scaled(opt: Any, loss_scale: Any) -> Any:
    """Returns an optimizer around `opt` that scales the loss."""
    if isinstance(opt, tf.compat.v1.train.Optimizer):
        return LossScaleOptimizer(opt, loss_scale)
    if isinstance(opt, keras.optimizers.Optimizer):
        return tfmixed.LossScaleOptimizer(opt, states_of(loss_scale).rule)
    legacy = sys.modules.get("tf_keras")
    if legacy is not None and isinstance(opt, legacy.optimizers.legacy.Optimizer):
        return _scaled_legacy(legacy.mixed_precision.LossScaleOptimizer, opt, states_of(loss_scale).rule)
    raise ValueError(
        "`opt` must be an optimizer of tf.compat.v1.train, a Keras 3 optimizer, or a legacy tf_keras optimizer "
        f"(tf_keras.optimizers.legacy). Received: opt={opt!r}."
    )


def _scaled_legacy(wrapper: Any, opt: Any, rule: ScalingRule) -> Any:
    """Returns tf_keras's own wrapper, which supports constant scales and scales that double and halve."""
    if isinstance(opt, wrapper):
        raise ValueError(f"`opt` must not scale the loss itself. Pass the optimizer it wraps. Received: opt={opt!r}.")
    if isinstance(rule, ConstantScale):
        return wrapper(opt, dynamic=False, initial_scale=rule.value)
    fixed = ("growth_factor", "backoff_factor", "hysteresis", "min_scale", "growth_delay", "tolerance")
    if not isinstance(rule, DynamicScale) or [getattr(rule, name) for name in fixed] != [2, 0.5, 1, 1, 0, 0]:
        raise ValueError(
            "`loss_scale` must double, halve at each overflow and stop at 1 for a tf_keras optimizer, like the rule of "
            f"tf_keras itself. Received: {rule}."
        )
    return wrapper(opt, initial_scale=rule.initial_scale, dynamic_growth_steps=rule.growth_interval)
