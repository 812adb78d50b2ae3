"""Where the names of mixed precision stood in TensorFlow 1 and 2.0 to 2.3, and what stands there now."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import tensorflow as tf

from tfmixed.compat import experimental, v1
from tfmixed.compat.v1 import enabling, scales
from tfmixed.compat.v1.optimizer import LossScaleOptimizer


class ManagedOptimizer(LossScaleOptimizer):
    """`tf.contrib.mixed_precision.LossScaleOptimizer`: its second argument has another name, and no default.

    Args:
        opt: As for `tfmixed.compat.v1.LossScaleOptimizer`.
        loss_scale_manager: The same, where it is `loss_scale`.
    """

    def __init__(self, opt: Any, loss_scale_manager: Any) -> None:
        super().__init__(opt, loss_scale_manager)


LOSS_SCALES = {
    "LossScale": scales.LossScale,
    "FixedLossScale": scales.FixedLossScale,
    "DynamicLossScale": scales.DynamicLossScale,
}
REWRITE = {
    "enable_mixed_precision_graph_rewrite": enabling.enable_mixed_precision_graph_rewrite,
    "disable_mixed_precision_graph_rewrite": enabling.disable_mixed_precision_graph_rewrite,
    "MixedPrecisionLossScaleOptimizer": LossScaleOptimizer,
}
MANAGERS = {
    "LossScaleManager": scales.LossScaleManager,
    "FixedLossScaleManager": scales.FixedLossScaleManager,
    "ExponentialUpdateLossScaleManager": scales.ExponentialUpdateLossScaleManager,
    "LossScaleOptimizer": ManagedOptimizer,
}


class Overlay(ModuleType):
    """A module with names of its own in front of those of another.

    Args:
        name: As which it goes.
        own: Its own names.
        base: The other module, or None.
    """

    def __init__(self, name: str, own: dict[str, Any], base: Any = None) -> None:
        super().__init__(name)
        self.__dict__.update(own)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        # Keras's tools and pickle look for `__wrapped__` and the like everywhere.
        if self._base is None or (name.startswith("__") and name != "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._base, name)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *(dir(self._base) if self._base else ())})


@functools.cache
def overlaid(name: str) -> Any:
    """Returns what `tfmixed.compat.v1` has under the name of a module of `tf.compat.v1`."""
    made = {
        "compat": _compat,
        "contrib": _contrib,
        "keras": _keras,
        "mixed_precision": _mixed_precision,
        "train": _train,
    }
    return made[name]()


def _compat() -> Overlay:
    # Scripts of TensorFlow 1.14 and 1.15 write `tf.compat.v1.` before names that stand under `tf` too.
    return Overlay("tfmixed.compat.v1.compat", {"v1": v1}, tf.compat.v1.compat)


def _contrib() -> Overlay:
    managers = Overlay("tensorflow.contrib.mixed_precision", MANAGERS)
    return Overlay("tensorflow.contrib", {"mixed_precision": managers})


def _train() -> Overlay:
    base = tf.compat.v1.train
    own = Overlay("tfmixed.compat.v1.train.experimental", {**REWRITE, **LOSS_SCALES}, base.experimental)
    return Overlay("tfmixed.compat.v1.train", {"experimental": own}, base)


def _mixed_precision() -> Overlay:
    base = tf.compat.v1.mixed_precision
    own = Overlay("tfmixed.compat.v1.mixed_precision.experimental", LOSS_SCALES, base.experimental)
    return Overlay("tfmixed.compat.v1.mixed_precision", {**REWRITE, **LOSS_SCALES, "experimental": own}, base)


def _keras() -> Any:
    base = tf.compat.v1.keras
    if is_legacy_keras():
        return base
    name = "tfmixed.compat.v1.keras"
    own = Overlay(f"{name}.mixed_precision", {"experimental": experimental}, getattr(base, "mixed_precision", None))
    return Overlay(name, {"mixed_precision": own}, base)


def is_legacy_keras() -> bool:
    """Returns whether `tf.keras` is the package tf_keras: of policies of Keras 3 its layers know nothing."""
    return bool(tf.keras.__name__.startswith("tf_keras"))
