"""TensorFlow 1 with mixed precision: `import tfmixed.compat.v1 as tf` replaces `import tensorflow.compat.v1 as tf`.

`enable_mixed_precision_graph_rewrite` works, including on CPUs, and `conversion_report` shows its effect. All other
names are those of `tf.compat.v1`. For scripts that import TensorFlow itself, `install()` adds the missing names.

Example:
>>> import tfmixed.compat.v1 as tf
>>> opt = tf.train.AdamOptimizer()
>>> opt = tf.train.experimental.enable_mixed_precision_graph_rewrite(opt)
>>> tf.train.experimental.disable_mixed_precision_graph_rewrite()
"""

from __future__ import annotations

from typing import Any

# `keras` is also a name of TensorFlow 1. An import under that name would hide the one with the legacy names.
from keras import backend as _backend

if _backend.backend() != "tensorflow":
    raise ImportError(
        "tfmixed.compat.v1 needs the TensorFlow backend of Keras. Set KERAS_BACKEND=tensorflow. "
        f"Received: {_backend.backend()!r}."
    )

import tensorflow

from tfmixed.compat.v1.aliases import OVERLAYS, install, overlay, uninstall
from tfmixed.compat.v1.conversion import ConversionReport, conversion_report
from tfmixed.compat.v1.graph_rewrite import (
    disable_mixed_precision_graph_rewrite,
    enable_mixed_precision_graph_rewrite,
)
from tfmixed.compat.v1.loss_scale import (
    DynamicLossScale,
    ExponentialUpdateLossScaleManager,
    FixedLossScale,
    FixedLossScaleManager,
    LossScale,
    LossScaleManager,
)
from tfmixed.compat.v1.optimizer import LossScaleOptimizer
from tfmixed.compat.v1.session_hook import LossScaleHook

__all__ = [
    "ConversionReport",
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
    if name in OVERLAYS:
        return overlay(name)
    try:
        return getattr(tensorflow.compat.v1, name)
    except AttributeError:
        raise AttributeError(f"Neither {__name__!r} nor tensorflow.compat.v1 has an attribute {name!r}.") from None


def __dir__() -> list[str]:
    return sorted({*__all__, *OVERLAYS, *dir(tensorflow.compat.v1)})
