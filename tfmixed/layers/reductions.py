"""Sum, mean and log-sum-exp over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import keras
from keras import ops

from tfmixed.layers.float32 import PACKAGE, InFloat32


class _Reduction(InFloat32):
    reduce: ClassVar[Callable[..., Any]]

    def __init__(self, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = tuple(axis) if isinstance(axis, (list, tuple)) else axis
        self.keepdims = keepdims

    def call(self, inputs: Any) -> Any:
        # Keras casts floating inputs only.
        return self.reduce(ops.cast(inputs, "float32"), self.axis, keepdims=self.keepdims)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis, "keepdims": self.keepdims}


@keras.saving.register_keras_serializable(PACKAGE)
class Sum(_Reduction):
    """Sum over axes, in float32.

    In float16, a sum overflows at 65504, and stops growing when terms are smaller than half its spacing.

    Args:
        axis: The axis or axes to sum over, or None for all, including the batch. Defaults to -1.
        keepdims: Whether to keep the reduced axes with length 1. Defaults to False.
        output_dtype: The dtype of the output, see `tfmixed.layers`. Defaults to None.
        **kwargs: Base layer keyword arguments.

    Example:
    >>> float(Sum()(ops.ones((1, 70_000), "float16"))[0])
    70000.0
    """

    reduce = staticmethod(ops.sum)


@keras.saving.register_keras_serializable(PACKAGE)
class Mean(_Reduction):
    """Mean over axes, in float32.

    `keras.ops.mean` computes the mean of float16 values in float32, but rounds the result to float16: means below 6e-8
    become 0. The arguments are those of `Sum`.

    Example:
    >>> float(Mean()(ops.ones((1, 70_000), "float16"))[0])
    1.0
    """

    reduce = staticmethod(ops.mean)


@keras.saving.register_keras_serializable(PACKAGE)
class LogSumExp(_Reduction):
    """Logarithm of the sum of exponentials over axes, in float32.

    `keras.ops.logsumexp` subtracts the largest term first, so no exponential overflows. Their float16 sum does: 70,000
    zeros give inf instead of 11.156. The arguments are those of `Sum`.

    Example:
    >>> float(LogSumExp()(ops.zeros((1, 70_000), "float16"))[0])  # doctest: +ELLIPSIS
    11.156...
    """

    reduce = staticmethod(ops.logsumexp)
