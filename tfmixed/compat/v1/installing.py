"""`install`: the legacy spellings under `import tensorflow as tf` and `tensorflow.compat.v1`, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.training.experimental import mixed_precision as theirs

import tfmixed
from tfmixed.compat import experimental
from tfmixed.compat.v1 import automatic, enabling, rewrite, spellings
from tfmixed.compat.v1.optimizer import LossScaleOptimizer

V1 = tf.compat.v1


class _Installed:
    """What is to be undone."""

    names: list[tuple[Any, str, Any]] = []  # noqa: RUF012  # replaced, never changed
    modules: dict[str, Any] = {}  # noqa: RUF012  # the same
    wrappers: dict[Any, Any] | None = None
    after_enabling = False


def install() -> None:
    """Adds the spellings of mixed precision that TensorFlow has no more; what exists is left alone.

    - `tf.train` gets the names of `tf.compat.v1.train` that it lacks, `tf.train.experimental` the graph rewrite.
    - `tf.contrib.mixed_precision`, `tf.mixed_precision` and `tf.keras.mixed_precision.experimental` are back.
    - TensorFlow's own `enable_mixed_precision_graph_rewrite` of `tf.compat.v1` hands out this package's optimizer: it
      is entered where TensorFlow looks up what to wrap with. Sessions whose `ConfigProto` asks for
      `auto_mixed_precision` get the pass that converts on this machine.
    - The environment variables of NVIDIA's containers, `TF_ENABLE_AUTO_MIXED_PRECISION`, `..._GRAPH_REWRITE` and
      `..._LOSS_SCALING`, do what they do there, also where a script sets them later. Sessions when they are made, and
      optimizers of `tf.compat.v1.train` in `compute_gradients` and `apply_gradients`, ask for them; unless they are
      set nothing else is different.

    A second call does nothing. `uninstall` takes all of it back.

    Example:
    >>> install()
    >>> tf.contrib.mixed_precision.FixedLossScaleManager(128).rule.value
    128.0
    >>> uninstall()
    >>> hasattr(tf, "contrib")
    False
    """
    if _Installed.wrappers is not None:
        return
    _Installed.names = [(where, name, value) for where, name, value in _spellings() if not hasattr(where, name)]
    for where, name, value in _Installed.names:
        setattr(where, name, value)
    contrib = spellings.overlaid("contrib")
    modules = {"tensorflow.contrib": contrib, "tensorflow.contrib.mixed_precision": contrib.mixed_precision}
    _Installed.modules = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(_Installed.modules)
    registry = theirs._REGISTERED_WRAPPER_OPTIMIZER_CLS
    _Installed.wrappers = dict(registry)
    registry[V1.train.Optimizer] = (enabling.enable_mixed_precision_graph_rewrite, LossScaleOptimizer)
    registry[keras.optimizers.Optimizer] = (enabling.enable_mixed_precision_graph_rewrite, tfmixed.LossScaleOptimizer)
    _Installed.after_enabling = rewrite.is_enabled()
    automatic.start()


def uninstall() -> None:
    """Takes back what `install` did, and switches the rewrite off if it was switched on since.

    Optimizers and sessions that were made go on as they are.
    """
    if _Installed.wrappers is None:
        return
    for where, name, value in _Installed.names:
        if getattr(where, name, None) is value:
            delattr(where, name)
    for name, module in _Installed.modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    registry = theirs._REGISTERED_WRAPPER_OPTIMIZER_CLS
    registry.clear()
    registry.update(_Installed.wrappers)
    _Installed.wrappers = None
    automatic.stop()
    if rewrite.is_enabled() and not _Installed.after_enabling:
        rewrite.disable()


def _spellings() -> Iterator[tuple[Any, str, Any]]:
    for name in dir(V1.train):
        if not name.startswith("_") and name != "experimental":
            yield tf.train, name, getattr(V1.train, name)
    for name, value in {**spellings.REWRITE, **spellings.LOSS_SCALES}.items():
        yield tf.train.experimental, name, value
    yield (
        tf,
        "mixed_precision",
        spellings.Overlay(
            "tensorflow.mixed_precision",
            {"experimental": spellings.Overlay("tensorflow.mixed_precision.experimental", spellings.LOSS_SCALES)},
        ),
    )
    for module in (tf, V1):
        yield module, "contrib", spellings.overlaid("contrib")
        if not spellings.is_legacy_keras():
            yield module.keras.mixed_precision, "experimental", experimental
