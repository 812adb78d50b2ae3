"""Layers that compute in float32 under any policy: float32 islands in a half-precision model.

They cast floating inputs to float32, whatever their dtype and the policy, and have float32 variables. They take the
arguments of the Keras layer of the same name, and `output_dtype`, the dtype of their output. None keeps float32,
`"compute"` selects the compute dtype of the `dtype` argument or of the global policy; other values are floating dtypes.

`MultiHeadAttention` and `GroupQueryAttention` are partial islands. Their projections and their output stay in the dtype
of the policy.

The errors that each layer avoids were measured with Keras 3.15 and TensorFlow 2.21 on a CPU.
"""

from __future__ import annotations

from tfmixed.layers.attention import GroupQueryAttention, MultiHeadAttention
from tfmixed.layers.float32 import Float32
from tfmixed.layers.normalization import (
    BatchNormalization,
    GroupNormalization,
    LayerNormalization,
    RMSNormalization,
    UnitNormalization,
)
from tfmixed.layers.pooling import (
    AveragePooling1D,
    AveragePooling2D,
    AveragePooling3D,
    GlobalAveragePooling1D,
    GlobalAveragePooling2D,
    GlobalAveragePooling3D,
)
from tfmixed.layers.reductions import LogSumExp, Mean, Sum
from tfmixed.layers.softmax import LogSoftmax, Softmax

__all__ = [
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "BatchNormalization",
    "Float32",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
    "GroupNormalization",
    "GroupQueryAttention",
    "LayerNormalization",
    "LogSoftmax",
    "LogSumExp",
    "Mean",
    "MultiHeadAttention",
    "RMSNormalization",
    "Softmax",
    "Sum",
    "UnitNormalization",
]
