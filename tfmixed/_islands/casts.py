"""Casts between float32 and half precision, and activations and regularizers computed in float32."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

from tfmixed.formats import HALF

FLOATS = ("float32", *HALF)


def cast(x: Any, dtype: str | None) -> Any:
    """Casts a float32 or half-precision tensor, and keeps its mask. `None` and other dtypes are left unchanged.

    A cast to half precision remembers the float32 tensor, and a later cast to float32 returns it without loss. Custom
    code receives a half-precision softmax, since TensorFlow refuses to mix dtypes; if the model returns that same
    tensor, it returns the float32 values.
    """
    if dtype is None or not ops.is_tensor(x):
        return x
    before = keras.backend.standardize_dtype(x.dtype)
    if before == dtype or before not in FLOATS:
        return x
    wide = get_tensor_attr(x, "_tfmixed_wide") if dtype == "float32" else None
    y = ops.cast(x, dtype) if wide is None else wide
    if (mask := get_tensor_attr(x, "_keras_mask")) is not None:
        set_tensor_attr(y, "_keras_mask", mask)
    if before == "float32":
        set_tensor_attr(y, "_tfmixed_wide", x)
    return y


def widen(x: Any) -> Any:
    return cast(x, "float32")


@keras.saving.register_keras_serializable("tfmixed")
class Float32Activation:
    """Activation computed in float32; its output is cast back to the input dtype.

    Args:
        activation: An activation function, or its Keras identifier.

    Example:
    >>> activation = Float32Activation("softmax")
    >>> activation(ops.cast([[0.0, -20.0]], "float16")).dtype.name
    'float16'
    """

    def __init__(self, activation: Any) -> None:
        self.activation = keras.activations.get(activation)
        self.__name__ = getattr(self.activation, "__name__", type(self.activation).__name__)

    def __call__(self, x: Any) -> Any:
        return cast(self.activation(widen(x)), keras.backend.standardize_dtype(x.dtype))

    def get_config(self) -> dict[str, Any]:
        return {"activation": keras.activations.serialize(self.activation)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Float32Activation:
        return cls(**config)


@keras.saving.register_keras_serializable("tfmixed")
class Float32Regularizer(keras.regularizers.Regularizer):
    """Regularizer whose loss is computed in float32, whatever the dtype of its input.

    Args:
        regularizer: A regularizer, or its Keras identifier.

    Example:
    >>> regularizer = Float32Regularizer(keras.regularizers.L2(1.0))
    >>> float(regularizer(ops.cast([300.0], "float16")))
    90000.0
    """

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = keras.regularizers.get(regularizer)

    def __call__(self, x: Any) -> Any:
        return widen(self.regularizer(widen(ops.convert_to_tensor(x))))

    def get_config(self) -> dict[str, Any]:
        return {"regularizer": keras.regularizers.serialize(self.regularizer)}
