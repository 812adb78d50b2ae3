"""Loss scaling without a word in the script: what the environment variables of NVIDIA's containers stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfmixed.compat.v1 import optimizer as scaling
from tfmixed.compat.v1 import rewrite
from tfmixed.compat.v1.optimizer import LossScaleOptimizer

Optimizer = tf.compat.v1.train.Optimizer
_METHODS = ("compute_gradients", "apply_gradients")
_ATTRIBUTE = "_tfmixed_scaler"
_plain: dict[str, Callable[..., Any]] = {}


def start() -> None:
    """Lets every optimizer of `tf.compat.v1.train` scale its loss dynamically, as if it were wrapped."""
    if not _plain:
        for name in _METHODS:
            _plain[name] = getattr(Optimizer, name)
            setattr(Optimizer, name, _scaled(name))


def stop() -> None:
    """Undoes `start`."""
    for name, method in _plain.items():
        setattr(Optimizer, name, method)
    _plain.clear()


def _scaled(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        if scaling.is_at_work() or not _is_plain(self):
            return plain(self, *arguments, **named)
        if _ATTRIBUTE not in vars(self):
            vars(self)[_ATTRIBUTE] = LossScaleOptimizer(self)
        return getattr(vars(self)[_ATTRIBUTE], name)(*arguments, **named)

    plain = _plain[name]
    return method


def _is_plain(opt: Any) -> bool:
    """Returns whether both halves of a step go through the methods that are wrapped here."""
    scales = (LossScaleOptimizer, tf.compat.v1.mixed_precision.MixedPrecisionLossScaleOptimizer)
    if isinstance(opt, (*scales, tf.compat.v1.train.SyncReplicasOptimizer)):
        return False
    own = [name for name in _METHODS if getattr(type(opt), name) is not getattr(Optimizer, name)]
    if own:
        rewrite.warn(
            f"{type(opt).__name__} has its own {' and '.join(own)}, so its loss is not scaled: wrap it with "
            "enable_mixed_precision_graph_rewrite"
        )
    return not own
