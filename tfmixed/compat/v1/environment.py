"""Environment variables of NVIDIA's containers, which enable mixed precision without any change to a script."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.client.session import BaseSession
from tensorflow.python.eager import context

from tfmixed._utils import user_warnings
from tfmixed.compat.v1 import graph_rewrite, patches
from tfmixed.compat.v1.optimizer import LossScaleOptimizer

Optimizer, SyncReplicas = tf.compat.v1.train.Optimizer, tf.compat.v1.train.SyncReplicasOptimizer
_BOTH = "TF_ENABLE_AUTO_MIXED_PRECISION"
_REWRITE, _SCALING = f"{_BOTH}_GRAPH_REWRITE", f"{_BOTH}_LOSS_SCALING"
_METHODS = ("compute_gradients", "apply_gradients")
_ATTRIBUTE = "_tfmixed_scaler"
# The rewrite is enabled once. A script that then disables it keeps it disabled.
_was_enabled = False


def watch(owner: str) -> None:
    """Reads the variables now, and whenever a session is created or a step is built.

    Scripts set them in their `main`. If TensorFlow has no context yet, the first reading waits for it: in a context
    that is created before the script calls `disable_eager_execution`, `tf.init_scope` leaves a conditional for eager
    code (TensorFlow 2.21).
    """
    global _was_enabled
    _was_enabled = False
    for name in _METHODS:
        patches.wrap(owner, Optimizer, name, functools.partial(_scale, name))
        patches.wrap(owner, SyncReplicas, name, _do_not_scale)
    patches.wrap(owner, BaseSession, "__init__", _create_session)
    if context.context_safe() is None:
        patches.wrap(owner, context, "_create_context", _read_with_context)
    else:
        enable_rewrite()


def enable_rewrite() -> None:
    """Enables the rewrite once, if a variable requests it and the script has not enabled it."""
    global _was_enabled
    if not _was_enabled and _is_on(_REWRITE, _BOTH):
        _was_enabled = True
        if not graph_rewrite.is_enabled():
            graph_rewrite.enable("auto")


def _read_with_context(plain: Callable[[], None]) -> None:
    plain()
    enable_rewrite()


def _create_session(plain: Callable[..., None], /, *args: Any, **kwargs: Any) -> None:
    enable_rewrite()
    graph_rewrite.create_session(plain, *args, **kwargs)


def _scale(name: str, plain: Callable[..., Any], optimizer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Calls the method `name` of a `LossScaleOptimizer` around `optimizer`, if the variables request it."""
    enable_rewrite()
    if patches.is_wrapped_call() or not _is_on(_SCALING, _BOTH) or not _can_scale(optimizer):
        return plain(optimizer, *args, **kwargs)
    if _ATTRIBUTE not in vars(optimizer):
        vars(optimizer)[_ATTRIBUTE] = LossScaleOptimizer(optimizer)
    return getattr(vars(optimizer)[_ATTRIBUTE], name)(*args, **kwargs)


def _do_not_scale(plain: Callable[..., Any], optimizer: Any, /, *args: Any, **kwargs: Any) -> Any:
    if _is_on(_SCALING, _BOTH) and not patches.is_wrapped_call():
        user_warnings.warn(
            "SyncReplicasOptimizer would wait forever at the first skipped step. Its loss is not scaled, and its "
            "gradients are not checked."
        )
    with patches.wrapped_call():
        return plain(optimizer, *args, **kwargs)


def _can_scale(optimizer: Any) -> bool:
    """Returns whether both halves of a step call the methods that are wrapped here."""
    scales = (LossScaleOptimizer, tf.compat.v1.mixed_precision.MixedPrecisionLossScaleOptimizer)
    if isinstance(optimizer, (*scales, SyncReplicas)):
        return False
    own = [name for name in _METHODS if getattr(type(optimizer), name) is not getattr(Optimizer, name)]
    if own:
        user_warnings.warn(
            f"{type(optimizer).__name__} overrides {' and '.join(own)}, so its loss is not scaled. Wrap it with "
            "enable_mixed_precision_graph_rewrite()."
        )
    return not own


def _is_on(*variables: str) -> bool:
    values = [_parse(variable, os.environ.get(variable, "")) for variable in variables]  # all, to warn of each
    return any(values)


@functools.cache  # warns once
def _parse(variable: str, value: str) -> bool:
    if value.lower() not in ("", "0", "1", "false", "true"):
        user_warnings.warn(f"{variable} must be 0, 1, false or true, and is taken for 0. Received: {value!r}.")
    return value.lower() in ("1", "true")
