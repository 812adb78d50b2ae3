"""Names of earlier Keras and TensorFlow versions, so that old code runs with one changed import.

`from tfmixed.compat import keras2 as mixed_precision` replaces `tf.keras.mixed_precision`, and
`import tfmixed.compat.v1 as tf` replaces TensorFlow 1.
"""

from __future__ import annotations

import importlib
from typing import Any

from tfmixed.compat import keras2

__all__ = ["keras2", "v1"]


def __getattr__(name: str) -> Any:
    if name == "v1":  # needs TensorFlow
        return importlib.import_module("tfmixed.compat.v1")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
