"""TensorFlow 1 with its mixed precision: `import tfmixed.compat.v1 as tf` stands for `tensorflow.compat.v1`.

`enable_mixed_precision_graph_rewrite` works, on CPUs too, and `conversion_report` says what it did. All other names are
those of `tf.compat.v1`. For scripts that import TensorFlow itself, `install()` adds what it lacks.

Example:
>>> import tfmixed.compat.v1 as tf
>>> opt = tf.train.AdamOptimizer()
>>> opt = tf.train.experimental.enable_mixed_precision_graph_rewrite(opt)
>>> tf.train.experimental.disable_mixed_precision_graph_rewrite()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# `keras` is a name of TensorFlow 1: bound here, it would hide the one that has the legacy spellings.
from keras import backend as _backend

if _backend.backend() != "tensorflow":
    raise ImportError(
        f"tfmixed.compat.v1 needs Keras's TensorFlow backend, received {_backend.backend()!r}: set "
        "KERAS_BACKEND=tensorflow"
    )

import tensorflow

if TYPE_CHECKING:
    from tfmixed.compat.v1.conversion import conversion_report
    from tfmixed.compat.v1.enabling import (
        disable_mixed_precision_graph_rewrite,
        enable_mixed_precision_graph_rewrite,
    )
    from tfmixed.compat.v1.hooks import LossScaleHook
    from tfmixed.compat.v1.installing import install, uninstall
    from tfmixed.compat.v1.optimizer import LossScaleOptimizer
    from tfmixed.compat.v1.scales import (
        DynamicLossScale,
        ExponentialUpdateLossScaleManager,
        FixedLossScale,
        FixedLossScaleManager,
        LossScale,
        LossScaleManager,
    )

_HOMES = {
    "ConversionReport": "conversion",
    "DynamicLossScale": "scales",
    "ExponentialUpdateLossScaleManager": "scales",
    "FixedLossScale": "scales",
    "FixedLossScaleManager": "scales",
    "LossScale": "scales",
    "LossScaleHook": "hooks",
    "LossScaleManager": "scales",
    "LossScaleOptimizer": "optimizer",
    "conversion_report": "conversion",
    "disable_mixed_precision_graph_rewrite": "enabling",
    "enable_mixed_precision_graph_rewrite": "enabling",
    "install": "installing",
    "uninstall": "installing",
}
_OVERLAID = ("compat", "contrib", "keras", "mixed_precision", "train")

__all__ = [
    "DynamicLossScale",
    "ExponentialUpdateLossScaleManager",
    "FixedLossScale",
    "FixedLossScaleManager",
    "LossScale",
    "LossScaleHook",
    "LossScaleManager",
    "LossScaleOptimizer",
    "conversion_report",
    "disable_mixed_precision_graph_rewrite",
    "enable_mixed_precision_graph_rewrite",
    "install",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _OVERLAID:
        return importlib.import_module(f"{__name__}.spellings").overlaid(name)
    try:
        return getattr(tensorflow.compat.v1, name)
    except AttributeError:
        raise AttributeError(f"neither {__name__!r} nor tensorflow.compat.v1 has an attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*__all__, *_OVERLAID, *dir(tensorflow.compat.v1)})
