"""Normalizations with float32 inputs, variables and outputs.

All Keras layers but `UnitNormalization` compute in float32 themselves. They round the output to the compute dtype.
"""

from __future__ import annotations

import keras

from tfmixed.layers.float32 import PACKAGE, InFloat32


@keras.saving.register_keras_serializable(PACKAGE)
class UnitNormalization(InFloat32, keras.layers.UnitNormalization):
    """Division by the Euclidean norm, in float32.

    In float16, the sum of squares overflows at 65504, and squares of numbers below 1.7e-4 vanish: the Keras layer turns
    100 values of 300 into zeros, and 100 values of 1e-4 into inf.

    Example:
    >>> round(float(UnitNormalization()(keras.ops.full((1, 100), 300, "float16"))[0, 0]), 6)
    0.1
    """


@keras.saving.register_keras_serializable(PACKAGE)
class LayerNormalization(InFloat32, keras.layers.LayerNormalization):
    """Layer normalization, in float32 from the inputs to the output.

    The Keras layer computes in float32 under any policy. It rounds the output to float16, one part in 2,000, and for
    float16 inputs even with `dtype="float32"`. Under the policy "float16" its variables are float16, too: updates below
    half their spacing, 0.0005 for a gamma of 1, are lost.
    """


@keras.saving.register_keras_serializable(PACKAGE)
class RMSNormalization(InFloat32, keras.layers.RMSNormalization):
    """Root mean square normalization, in float32 from the inputs to the output.

    The Keras layer squares in float32 under any policy, but rounds wider inputs and the output to float16, one part in
    2,000. Under the policy "float16" its variable is float16, too.
    """


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(InFloat32, keras.layers.BatchNormalization):
    """Batch normalization, in float32 from the inputs to the output.

    The Keras layer computes in float32 under any policy, but rounds wider inputs and the output to float16, one part in
    2,000. Under the policy "float16" the moving statistics are float16, too: for inputs of 300 and -300 the variance is
    inf after 130 steps, and for inputs of 1 the mean stops at 0.976.

    Example:
    >>> layer = BatchNormalization(dtype="float16")
    >>> layer(keras.ops.ones((2, 4), "float16")).dtype.name, layer.moving_variance.dtype
    ('float32', 'float32')
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GroupNormalization(InFloat32, keras.layers.GroupNormalization):
    """Group normalization, in float32 from the inputs to the output.

    The Keras layer computes in float32 and rounds the output like `LayerNormalization`.
    """
