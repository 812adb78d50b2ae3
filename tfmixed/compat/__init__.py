"""The names of older versions, so that old code runs with another import.

`from tfmixed.compat import keras2 as mixed_precision` stands for `tf.keras.mixed_precision`.
"""

from tfmixed.compat import keras2

__all__ = ["keras2"]
