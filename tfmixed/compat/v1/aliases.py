"""Names of mixed precision in TensorFlow 1 and 2.0 to 2.3, and `install`, which adds them to TensorFlow itself."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.training.experimental import mixed_precision

import tfmixed
from tfmixed.compat import experimental, v1
from tfmixed.compat.v1 import environment, graph_rewrite, loss_scale, patches
from tfmixed.compat.v1.optimizer import LossScaleOptimizer

V1 = tf.compat.v1
# Owner of the changes in `patches`.
OWNER = "install"
OVERLAYS = ("compat", "contrib", "keras", "mixed_precision", "train")


class ManagedOptimizer(LossScaleOptimizer):
    """`tf.contrib.mixed_precision.LossScaleOptimizer`, whose second argument has another name and no default.

    Args:
        opt: The optimizer to wrap, as in `tfmixed.compat.v1.LossScaleOptimizer`.
        loss_scale_manager: Its `loss_scale`.
    """

    def __init__(self, opt: Any, loss_scale_manager: Any) -> None:
        super().__init__(opt, loss_scale_manager)


LOSS_SCALES = {name: getattr(loss_scale, name) for name in ("LossScale", "FixedLossScale", "DynamicLossScale")}
REWRITE = {
    "enable_mixed_precision_graph_rewrite": graph_rewrite.enable_mixed_precision_graph_rewrite,
    "disable_mixed_precision_graph_rewrite": graph_rewrite.disable_mixed_precision_graph_rewrite,
    "MixedPrecisionLossScaleOptimizer": LossScaleOptimizer,
}
MANAGERS = {
    "LossScaleManager": loss_scale.LossScaleManager,
    "FixedLossScaleManager": loss_scale.FixedLossScaleManager,
    "ExponentialUpdateLossScaleManager": loss_scale.ExponentialUpdateLossScaleManager,
    "LossScaleOptimizer": ManagedOptimizer,
}


class Overlay(ModuleType):
    """A module whose own names take precedence over those of a base module.

    Args:
        name: The name of the module.
        own: Its own names.
        base: The base module. Defaults to None.
    """

    def __init__(self, name: str, own: dict[str, Any], base: Any = None) -> None:
        super().__init__(name)
        self.__dict__.update(own)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        # Keras's tools and pickle look for `__wrapped__` and similar names in every module.
        if self._base is None or (name.startswith("__") and name != "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._base, name)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *(dir(self._base) if self._base else ())})


@functools.cache
def overlay(name: str) -> Any:
    """Returns the module that `tfmixed.compat.v1` has in place of the one of that name in `tf.compat.v1`."""
    base: Any = getattr(V1, name, None)
    path = f"tfmixed.compat.v1.{name}"
    if name == "compat":  # scripts of TensorFlow 1.14 and 1.15 write `tf.compat.v1.` before names of `tf` too
        return Overlay(path, {"v1": v1}, base)
    if name == "contrib":
        return Overlay(
            "tensorflow.contrib", {"mixed_precision": Overlay("tensorflow.contrib.mixed_precision", MANAGERS)}
        )
    if name == "train":
        own = Overlay(f"{path}.experimental", {**REWRITE, **LOSS_SCALES}, base.experimental)
        return Overlay(path, {"experimental": own}, base)
    if name == "mixed_precision":
        own = Overlay(f"{path}.experimental", LOSS_SCALES, base.experimental)
        return Overlay(path, {**REWRITE, **LOSS_SCALES, "experimental": own}, base)
    if _is_legacy_keras():
        return base
    own = Overlay(f"{path}.mixed_precision", {"experimental": experimental}, getattr(base, "mixed_precision", None))
    return Overlay(path, {"mixed_precision": own}, base)


def _is_legacy_keras() -> bool:
    """Returns whether `tf.keras` is the package tf_keras, whose layers ignore the policies of Keras 3."""
    return bool(tf.keras.__name__.startswith("tf_keras"))


def install() -> None:
    """Adds the names of mixed precision that TensorFlow no longer has. Existing names are not changed.

    - `tf.train` gets the names of `tf.compat.v1.train` that it lacks, and `tf.train.experimental` the graph rewrite.
    - `tf.contrib.mixed_precision`, `tf.mixed_precision` and `tf.keras.mixed_precision.experimental` are added.
    - TensorFlow's own `enable_mixed_precision_graph_rewrite` in `tf.compat.v1` returns the optimizer of this package,
      which is registered as TensorFlow's wrapper. Sessions whose `ConfigProto` has `auto_mixed_precision` ON use the
      pass that converts on this machine.
    - The environment variables of NVIDIA's containers, `TF_ENABLE_AUTO_MIXED_PRECISION`, `..._GRAPH_REWRITE` and
      `..._LOSS_SCALING`, have the same effect as there. They are read when a session is created, and in
      `compute_gradients` and `apply_gradients` of the optimizers of `tf.compat.v1.train`. Without them, nothing else
      changes.

    A second call does nothing. `uninstall` reverts all changes.

    Example:
    >>> install()
    >>> tf.contrib.mixed_precision.FixedLossScaleManager(128).rule.value
    128.0
    >>> uninstall()
    >>> hasattr(tf, "contrib")
    False
    """
    if patches.is_active(OWNER):
        return
    if not graph_rewrite.is_enabled():
        patches.on_undo(OWNER, patches.undo, graph_rewrite.OWNER)
    _add_names()
    _add_modules()
    wrappers = mixed_precision._REGISTERED_WRAPPER_OPTIMIZER_CLS
    enable = graph_rewrite.enable_mixed_precision_graph_rewrite
    patches.set_item(OWNER, wrappers, V1.train.Optimizer, (enable, LossScaleOptimizer))
    patches.set_item(OWNER, wrappers, keras.optimizers.Optimizer, (enable, tfmixed.LossScaleOptimizer))
    environment.watch(OWNER)


def uninstall() -> None:
    """Reverts `install`, and disables the rewrite if it was enabled since.

    Existing optimizers and sessions are not affected.
    """
    patches.undo(OWNER)


def _add_names() -> None:
    add = functools.partial(patches.add_attribute, OWNER)
    for name in dir(V1.train):
        if not name.startswith("_") and name != "experimental":
            add(tf.train, name, getattr(V1.train, name))
    for name, value in {**REWRITE, **LOSS_SCALES}.items():
        add(tf.train.experimental, name, value)
    scales = Overlay("tensorflow.mixed_precision.experimental", LOSS_SCALES)
    add(tf, "mixed_precision", Overlay("tensorflow.mixed_precision", {"experimental": scales}))
    for module in (tf, V1):
        add(module, "contrib", overlay("contrib"))
        if not _is_legacy_keras():
            add(module.keras.mixed_precision, "experimental", experimental)


def _add_modules() -> None:
    contrib = overlay("contrib")
    modules = {"tensorflow.contrib": contrib, "tensorflow.contrib.mixed_precision": contrib.mixed_precision}
    for name, module in modules.items():
        if name not in sys.modules:
            patches.set_item(OWNER, sys.modules, name, module)
