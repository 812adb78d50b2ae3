"""Normalizations: float32 in, float32 variables, float32 out.

All but `UnitNormalization` compute in float32 by themselves in Keras. What they do not do is to return it.
"""

from __future__ import annotations

import keras

from tfmixed.layers.float32 import PACKAGE, InFloat32


@keras.saving.register_keras_serializable(PACKAGE)
class UnitNormalization(InFloat32, keras.layers.UnitNormalization):
    """Divides by the Euclidean norm, in float32.

    In float16 the sum of squares overflows at 65504 and squares of numbers below 1.7e-4 vanish: Keras's layer turns 100
    values of 300 into zeros, and 100 values of 1e-4 into inf.

    Args:
        axis: The axis, or axes, over which the squares sum to 1.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Keras's arguments of any layer.

    Example:
    >>> round(float(UnitNormalization()(keras.ops.full((1, 100), 300, "float16"))[0, 0]), 6)
    0.1
    """


@keras.saving.register_keras_serializable(PACKAGE)
class LayerNormalization(InFloat32, keras.layers.LayerNormalization):
    """Layer normalization, in float32 from the inputs to the output.

    Keras's layer computes in float32 by itself, under any policy. It rounds the output to float16, one part in 2,000,
    and given float16 inputs it does so even with `dtype="float32"`. Under the policy "float16" its variables are
    float16 too: updates below half their spacing, 0.0005 for a gamma of 1, are lost.

    Args:
        *args: Those of `keras.layers.LayerNormalization`.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Those of `keras.layers.LayerNormalization`.

    Example:
    >>> LayerNormalization(dtype="float16")(keras.ops.ones((2, 4), "float16")).dtype.name
    'float32'
    """


@keras.saving.register_keras_serializable(PACKAGE)
class RMSNormalization(InFloat32, keras.layers.RMSNormalization):
    """Normalization by the root mean square, in float32 from the inputs to the output.

    Keras's layer squares in float32 by itself, under any policy, but rounds what is wider on the way in and the output
    to float16, one part in 2,000. Under the policy "float16" its variable is float16 too.

    Args:
        *args: Those of `keras.layers.RMSNormalization`.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Those of `keras.layers.RMSNormalization`.

    Example:
    >>> RMSNormalization(dtype="float16")(keras.ops.ones((2, 4), "float16")).dtype.name
    'float32'
    """


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(InFloat32, keras.layers.BatchNormalization):
    """Batch normalization, in float32 from the inputs to the output.

    Keras's layer computes in float32 by itself, under any policy, but rounds what is wider on the way in and the output
    to float16, one part in 2,000. Under the policy "float16" the moving statistics are float16 too: with inputs of 300
    and -300 the variance is inf after 130 steps, with inputs of 1 the mean stops at 0.976.

    Args:
        *args: Those of `keras.layers.BatchNormalization`.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Those of `keras.layers.BatchNormalization`.

    Example:
    >>> layer = BatchNormalization(dtype="float16")
    >>> layer(keras.ops.ones((2, 4), "float16")).dtype.name, layer.moving_variance.dtype
    ('float32', 'float32')
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GroupNormalization(InFloat32, keras.layers.GroupNormalization):
    """Group normalization, in float32 from the inputs to the output.

    As `LayerNormalization`: Keras's layer computes in float32 by itself and rounds the output to float16, one part in
    2,000, given float16 inputs even with `dtype="float32"`.

    Args:
        *args: Those of `keras.layers.GroupNormalization`.
        output_dtype: See `tfmixed.layers`.
        **kwargs: Those of `keras.layers.GroupNormalization`.

    Example:
    >>> GroupNormalization(2, dtype="float16")(keras.ops.ones((2, 4), "float16")).dtype.name
    'float32'
    """
