"""Softmax and its logarithm."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfmixed.layers.float32 import PACKAGE, InFloat32


@keras.saving.register_keras_serializable(PACKAGE)
class Softmax(InFloat32, keras.layers.Softmax):
    """Softmax in float32.

    In float16, probabilities below 6e-8 become 0 and their logarithm -inf: with 10,000 classes, one in a thousand. All
    of them become 0 if the sum of the exponentials exceeds 65504, as for 70,000 equal logits, or if a mask meets logits
    below -30,000, the value that Keras assigns to masked ones.

    Example:
    >>> Softmax()(ops.cast([[0.0, -20.0]], "float16")).dtype.name
    'float32'
    """


@keras.saving.register_keras_serializable(PACKAGE)
class LogSoftmax(InFloat32):
    """Logarithm of the softmax, in float32.

    In float16, the sum of the exponentials overflows at 65504: 70,000 equal logits give -inf instead of -11.156. Below
    that, results around -11 are rounded to multiples of 0.0078.

    Args:
        axis: The axis whose exponentials sum to 1. Defaults to -1.
        output_dtype: The dtype of the output, see `tfmixed.layers`. Defaults to None.
        **kwargs: Base layer keyword arguments.

    Example:
    >>> float(LogSoftmax()(ops.zeros((1, 70_000), "float16"))[0, 0])  # doctest: +ELLIPSIS
    -11.156...
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        return ops.log_softmax(inputs, self.axis)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}
