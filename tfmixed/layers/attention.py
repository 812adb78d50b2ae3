"""Attention with float32 scores, softmax and weighted sum between projections in the dtype of the policy."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfmixed.layers.float32 import PACKAGE, cast_spec


class _Float32Scores(keras.layers.Layer):
    """Mixin that widens the computations between the projections. Listed before the Keras class."""

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        super().build(query_shape, value_shape, key_shape)
        for sublayer in self._flatten_layers(include_self=False, recursive=False):
            if isinstance(sublayer, keras.layers.Softmax | keras.layers.Dropout):
                sublayer.dtype_policy = "float32"
            # Flash kernels accept only half precision, and sum and exponentiate in float32 themselves.
            elif sublayer.name in {"query", "key", "value"} and not self._flash_attention:
                # All paths of the Keras `call` use the dtype of these three; the last projection casts back.
                sublayer.activation = _widen

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        spec = super().compute_output_spec(*args, **kwargs)
        return (spec[0], cast_spec(spec[1], "float32")) if isinstance(spec, tuple) else spec


def _widen(projected: Any) -> Any:
    return ops.cast(projected, "float32")


@keras.saving.register_keras_serializable(PACKAGE)
class MultiHeadAttention(_Float32Scores, keras.layers.MultiHeadAttention):
    """Multi-head attention whose scores, softmax and weighted sum are always float32.

    The projections, with most of the multiplications and all variables, stay in the dtype of the policy, and so does
    the output; returned attention scores are float32. With `flash_attention=True` the kernel is left unchanged.

    The Keras layer takes one of two paths. The fused path multiplies queries and keys in float16 before it scales them:
    vectors of 64 values of 32 or more give nan on TensorFlow. On CPUs it also sums in float16: the average of 70,000
    ones is 0.25. The other path, for dropout, `return_attention_scores` and several attention axes, has a float16
    softmax: over 70,000 equal keys all scores are 0, and with a mask those below -30,000 are.

    Example:
    >>> x = keras.ops.full((1, 3, 64), 100, "float16")
    >>> attend = MultiHeadAttention(2, 64, dtype="mixed_float16")
    >>> output, scores = attend(x, x, return_attention_scores=True)
    >>> output.dtype.name, scores.dtype.name
    ('float16', 'float32')
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GroupQueryAttention(_Float32Scores, keras.layers.GroupQueryAttention):
    """Grouped-query attention whose scores, softmax and weighted sum are always float32.

    Like `MultiHeadAttention`, which describes the errors that this avoids.

    Example:
    >>> x = keras.ops.full((1, 3, 64), 100, "float16")
    >>> attend = GroupQueryAttention(64, 4, 2, dtype="mixed_float16")
    >>> output, scores = attend(x, x, return_attention_scores=True)
    >>> output.dtype.name, scores.dtype.name
    ('float16', 'float32')
    """
