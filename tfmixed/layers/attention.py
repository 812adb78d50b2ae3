"""Attention whose scores, softmax and weighted sum are float32, between projections in the policy's dtype."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfmixed.layers.float32 import PACKAGE, cast_spec


class _AttendsInFloat32(keras.layers.Layer):
    """Widens what Keras's attention layers compute between their projections. To be listed before such a class."""

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        super().build(query_shape, value_shape, key_shape)
        for part in self._flatten_layers(include_self=False, recursive=False):
            if isinstance(part, keras.layers.Softmax | keras.layers.Dropout):
                part.dtype_policy = "float32"
            # Flash kernels take nothing but half precision, and add up and exponentiate in float32 by themselves.
            elif part.name in {"query", "key", "value"} and not self._flash_attention:
                # Every path of Keras's `call` goes on in the dtype of these three; the last projection casts back.
                part.activation = _widen

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        spec = super().compute_output_spec(*args, **kwargs)
        return (spec[0], cast_spec(spec[1], "float32")) if isinstance(spec, tuple) else spec


def _widen(projected: Any) -> Any:
    return ops.cast(projected, "float32")


@keras.saving.register_keras_serializable(PACKAGE)
class MultiHeadAttention(_AttendsInFloat32, keras.layers.MultiHeadAttention):
    """Multi-head attention whose scores, softmax and weighted sum are float32 by every path.

    The projections, with most of the multiplications and all of the variables, stay in the policy's dtype, and so does
    the output; returned attention scores are float32. With `flash_attention=True` the kernel is left to itself.

    Keras's layer takes one of two paths. The fused one multiplies queries by keys in float16 before it scales them:
    vectors of 64 numbers of 32 or more give nan on TensorFlow. On a CPU it adds up in float16 as well: the average of
    70,000 ones is 0.25. The other path, which dropout, `return_attention_scores` and more than one attention axis take,
    has a float16 softmax: over 70,000 equal keys all scores are 0, and with a mask scores below -30,000 are.

    Args:
        *args: Those of `keras.layers.MultiHeadAttention`.
        **kwargs: Those of `keras.layers.MultiHeadAttention`.

    Example:
    >>> x = keras.ops.full((1, 3, 64), 100, "float16")
    >>> attend = MultiHeadAttention(2, 64, dtype="mixed_float16")
    >>> output, scores = attend(x, x, return_attention_scores=True)
    >>> output.dtype.name, scores.dtype.name
    ('float16', 'float32')
    """


@keras.saving.register_keras_serializable(PACKAGE)
class GroupQueryAttention(_AttendsInFloat32, keras.layers.GroupQueryAttention):
    """Grouped-query attention whose scores, softmax and weighted sum are float32 by every path.

    As `MultiHeadAttention`, which says what goes wrong without it.

    Args:
        *args: Those of `keras.layers.GroupQueryAttention`.
        **kwargs: Those of `keras.layers.GroupQueryAttention`.

    Example:
    >>> x = keras.ops.full((1, 3, 64), 100, "float16")
    >>> attend = GroupQueryAttention(64, 4, 2, dtype="mixed_float16")
    >>> output, scores = attend(x, x, return_attention_scores=True)
    >>> output.dtype.name, scores.dtype.name
    ('float16', 'float32')
    """
