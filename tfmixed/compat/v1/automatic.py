"""What the environment variables of NVIDIA's containers stand for: mixed precision without a word in the script."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context

from tfmixed._utils import user_warnings
from tfmixed.compat.v1 import optimizer as scaling
from tfmixed.compat.v1 import rewrite
from tfmixed.compat.v1.optimizer import LossScaleOptimizer

Optimizer, SyncReplicas = tf.compat.v1.train.Optimizer, tf.compat.v1.train.SyncReplicasOptimizer
_BOTH = "TF_ENABLE_AUTO_MIXED_PRECISION"
_REWRITE, _SCALING = f"{_BOTH}_GRAPH_REWRITE", f"{_BOTH}_LOSS_SCALING"
_METHODS = ("compute_gradients", "apply_gradients")
_ATTRIBUTE = "_tfmixed_scaler"


class _Watch:
    """What is to be undone, and what was done already."""

    plain: dict[tuple[Any, str], Callable[..., Any]] = {}  # noqa: RUF012  # replaced, never changed
    has_enabled = False
    create_context: Callable[[], None] = context._create_context
    odd: frozenset[tuple[str, str]] = frozenset()


def start() -> None:
    """Looks at the variables now, and where a session is made or a step is built: scripts set them in their `main`.

    Now, or when TensorFlow makes its context: one that is made before the script calls `disable_eager_execution` takes
    what `tf.init_scope` makes within a conditional for eager code (TensorFlow 2.21).
    """
    if not _Watch.plain:
        _Watch.plain = {(kind, name): getattr(kind, name) for kind in (Optimizer, SyncReplicas) for name in _METHODS}
        for (kind, name), method in _Watch.plain.items():
            setattr(kind, name, _scaled(name, method) if kind is Optimizer else _unscaled(method))
        rewrite.hold("environment", _obey)
        if context.context_safe() is None:
            context._create_context = _create_and_obey
        else:
            _obey()


def stop() -> None:
    """Undoes `start`."""
    for (kind, name), method in _Watch.plain.items():
        setattr(kind, name, method)
    _Watch.plain, _Watch.has_enabled = {}, False
    rewrite.release("environment")
    context._create_context = _Watch.create_context


def _create_and_obey() -> None:
    context._create_context = _Watch.create_context
    _Watch.create_context()
    _obey()


def _obey() -> None:
    """Switches the rewrite on, once, if a variable asks for it and the script did not."""
    if _asks(_REWRITE) and not _Watch.has_enabled:
        _Watch.has_enabled = True
        if not rewrite.is_enabled():
            rewrite.enable("auto")


def _asks(variable: str) -> bool:
    return any([_is_on(variable), _is_on(_BOTH)])


def _is_on(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value.lower() not in ("", "0", "1", "false", "true") and (variable, value) not in _Watch.odd:
        _Watch.odd |= {(variable, value)}
        user_warnings.warn(f"{variable} must be 0, 1, false or true, received {value!r}: it is taken for 0")
    return value.lower() in ("1", "true")


def _scaled(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        _obey()
        if scaling.is_at_work() or not _asks(_SCALING) or not _is_plain(self):
            return plain(self, *arguments, **named)
        if _ATTRIBUTE not in vars(self):
            vars(self)[_ATTRIBUTE] = LossScaleOptimizer(self)
        return getattr(vars(self)[_ATTRIBUTE], name)(*arguments, **named)

    return method


def _unscaled(plain: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        if _asks(_SCALING) and not scaling.is_at_work():
            user_warnings.warn(
                "SyncReplicasOptimizer would wait for ever at the first skipped step, so its loss is not scaled, nor "
                "are its gradients checked"
            )
        with scaling.at_work():
            return plain(self, *arguments, **named)

    return method


def _is_plain(opt: Any) -> bool:
    """Returns whether both halves of a step go through the methods that are wrapped here."""
    scales = (LossScaleOptimizer, tf.compat.v1.mixed_precision.MixedPrecisionLossScaleOptimizer)
    if isinstance(opt, (*scales, SyncReplicas)):
        return False
    own = [name for name in _METHODS if getattr(type(opt), name) is not getattr(Optimizer, name)]
    if own:
        user_warnings.warn(
            f"{type(opt).__name__} has its own {' and '.join(own)}, so its loss is not scaled: wrap it with "
            "enable_mixed_precision_graph_rewrite"
        )
    return not own
