"""Sums, means and sums of exponentials over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import keras
from keras import ops

from tfmixed.layers.float32 import PACKAGE, InFloat32


class _Reduction(InFloat32):
    """A reduction over axes. Args as in the subclasses."""

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

    In float16 a sum overflows at 65504, and stops growing where a term is below half the spacing of the sum.

    Args:
        axis: Axis or axes to sum over; None for all, the batch included.
        keepdims: Keep them with length 1.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Keras's arguments of any layer.

    Example:
    >>> float(Sum()(ops.ones((1, 70_000), "float16"))[0])
    70000.0
    """

    reduce = staticmethod(ops.sum)


@keras.saving.register_keras_serializable(PACKAGE)
class Mean(_Reduction):
    """Mean over axes, in float32.

    `keras.ops.mean` computes a float16 mean in float32 by itself but rounds the result to float16: means below 6e-8
    become 0.

    Args:
        axis: Axis or axes to average over; None for all, the batch included.
        keepdims: Keep them with length 1.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Keras's arguments of any layer.

    Example:
    >>> float(Mean()(ops.ones((1, 70_000), "float16"))[0])
    1.0
    """

    reduce = staticmethod(ops.mean)


@keras.saving.register_keras_serializable(PACKAGE)
class LogSumExp(_Reduction):
    """Logarithm of the sum of exponentials over axes, in float32.

    `keras.ops.logsumexp` subtracts the largest term first, so no exponential overflows, but in float16 their sum does:
    70,000 zeros give inf instead of 11.156.

    Args:
        axis: Axis or axes to reduce; None for all, the batch included.
        keepdims: Keep them with length 1.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Keras's arguments of any layer.

    Example:
    >>> float(LogSumExp()(ops.zeros((1, 70_000), "float16"))[0])  # doctest: +ELLIPSIS
    11.156...
    """

    reduce = staticmethod(ops.logsumexp)
