"""Layers that compute in float32 under any policy: islands in a half-precision model.

Each casts its floating inputs to float32, whatever their dtype and the policy, and has float32 variables. Its
`output_dtype` says what comes out: None keeps float32; `"compute"` casts back to the compute dtype that the layer would
have had, its `dtype` argument's or the global policy's; a dtype's name casts to that.

`MultiHeadAttention` and `GroupQueryAttention` are half islands: the projections stay in the policy's dtype, and so does
the output.

What goes wrong without each of them was measured with Keras 3.15 and TensorFlow 2.21 on a CPU.
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
