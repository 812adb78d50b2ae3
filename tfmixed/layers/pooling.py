"""Average pooling, over windows and global."""

from __future__ import annotations

import keras

from tfmixed.layers.float32 import PACKAGE, InFloat32


@keras.saving.register_keras_serializable(PACKAGE)
class AveragePooling1D(InFloat32, keras.layers.AveragePooling1D):
    """Average pooling of sequences, in float32.

    The Keras layer sums each window in float16: 1,024 values of 100 give inf, and 90,000 values of 3 give 4.

    Example:
    >>> float(AveragePooling1D(1024)(keras.ops.full((1, 1024, 1), 100, "float16"))[0, 0, 0])
    100.0
    """


@keras.saving.register_keras_serializable(PACKAGE)
class AveragePooling2D(InFloat32, keras.layers.AveragePooling2D):
    """Average pooling of images, in float32.

    The Keras layer sums each window in float16: 32x32 values of 100 give inf, 300x300 values of 3 give 4, and an
    average of 16x16 values around 100 is off by 1.4.

    Example:
    >>> float(AveragePooling2D(32)(keras.ops.full((1, 32, 32, 1), 100, "float16"))[0, 0, 0, 0])
    100.0
    """


@keras.saving.register_keras_serializable(PACKAGE)
class AveragePooling3D(InFloat32, keras.layers.AveragePooling3D):
    """Average pooling of volumes, in float32.

    The Keras layer raises an error in float16 on CPUs, for which TensorFlow has no kernel.

    Example:
    >>> float(AveragePooling3D(8)(keras.ops.full((1, 8, 8, 8, 1), 200, "float16"))[0, 0, 0, 0, 0])
    200.0
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GlobalAveragePooling1D(InFloat32, keras.layers.GlobalAveragePooling1D):
    """Average over the steps of a sequence, in float32. Masked steps do not count.

    With a mask, the Keras layer divides one float16 sum by another: 70,000 steps of 1 give nan, inf divided by inf.
    Without a mask it averages in float32, and rounds the result to float16.

    Example:
    >>> x, mask = keras.ops.ones((1, 70_000, 1), "float16"), keras.ops.ones((1, 70_000), "bool")
    >>> float(GlobalAveragePooling1D()(x, mask=mask)[0, 0])
    1.0
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GlobalAveragePooling2D(InFloat32, keras.layers.GlobalAveragePooling2D):
    """Average over an image, in float32.

    The Keras layer averages float16 values in float32, but rounds the result to float16, one part in 2,000; averages
    below 6e-8 become 0.
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GlobalAveragePooling3D(InFloat32, keras.layers.GlobalAveragePooling3D):
    """Average over a volume, in float32.

    The Keras layer rounds the result to float16, like `GlobalAveragePooling2D`.
    """
