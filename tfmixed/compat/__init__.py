"""The names of older versions, so that old code runs with another import.

`from tfmixed.compat import keras2 as mixed_precision` stands for `tf.keras.mixed_precision`, and
`import tfmixed.compat.v1 as tf` for TensorFlow 1.
"""

from __future__ import annotations

import importlib
from typing import Any

from tfmixed.compat import keras2

__all__ = ["keras2", "v1"]


def __getattr__(name: str) -> Any:
    if name == "v1":  # TensorFlow's alone, so not before it is asked for
        return importlib.import_module("tfmixed.compat.v1")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
