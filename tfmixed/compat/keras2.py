"""Names of `tf.keras.mixed_precision` in TensorFlow 2.4 to 2.15. `experimental` has the names of 2.1 to 2.3.

Example:
>>> from tfmixed.compat import keras2 as mixed_precision
>>> mixed_precision.Policy("mixed_float16").variable_dtype
'float32'
>>> optimizer = mixed_precision.LossScaleOptimizer(keras.optimizers.SGD(), dynamic=False, initial_scale=128)
>>> float(optimizer.get_scaled_loss(2.0))
256.0
"""

from __future__ import annotations

import keras

from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed.compat import experimental
from tfmixed.policy import set_policy

__all__ = [
    "LossScaleOptimizer",
    "Policy",
    "experimental",
    "global_policy",
    "set_global_policy",
    "set_policy",
]

Policy = keras.DTypePolicy
global_policy = keras.config.dtype_policy
set_global_policy = set_policy
