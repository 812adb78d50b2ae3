"""Cross-entropies of logits in float32: functions for custom training loops, classes for `compile`.

They accept logits only. A probability that a half-precision softmax has rounded to 0 is lost, and Keras clips it to
1e-7.

Keras loss classes, and `compile(loss="...")`, cast their inputs to `keras.config.floatx()`, so under the default of
float32 they return the same as the classes here, which also compute in float32 under a floatx of float16. Keras loss
functions do not cast; custom training loops call them on the outputs of half-precision models.

The errors that each loss avoids were measured with Keras 3.15 and TensorFlow 2.21 on a CPU.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

_PACKAGE = "tfmixed"


@keras.saving.register_keras_serializable(_PACKAGE)
def categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = True, label_smoothing: float = 0.0, axis: int = -1
) -> Any:
    """Returns the float32 cross-entropy of one-hot labels and logits, one value per example.

    In float16, the Keras function gives inf above 65504. For 70,000 equal logits it gives nan on JAX and PyTorch; on
    TensorFlow it gives the correct 11.16, but `label_smoothing=0.1` reduces it by 10 %, since the number of classes is
    inf.

    Args:
        y_true: Probabilities of the classes, in the shape of `y_pred`.
        y_pred: Logits of any floating dtype.
        from_logits: Must be True. Present so that calls of the Keras function work unchanged.
        label_smoothing: The part of each label that is spread over all classes. Defaults to 0.0.
        axis: The axis of the classes. Defaults to -1.

    Raises:
        ValueError: If `from_logits` is False.

    Example:
    >>> float(categorical_crossentropy([[1, 0]], ops.cast([[-6e4, 6e4]], "float16"))[0])
    120000.0
    """
    logits = _logits(y_pred, from_logits)
    return keras.losses.categorical_crossentropy(y_true, logits, True, label_smoothing, axis)


@keras.saving.register_keras_serializable(_PACKAGE)
def sparse_categorical_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = True, ignore_class: int | None = None, axis: int = -1
) -> Any:
    """Returns the float32 cross-entropy of integer labels and logits, one value per example.

    In float16, the Keras function gives inf above 65504. For 70,000 equal logits it gives nan on JAX and inf on
    PyTorch. It compares labels with `ignore_class` in float16, which has no odd numbers above 2048: ignoring class 2049
    ignores class 2048, too.

    Args:
        y_true: Integer labels, in the shape of `y_pred` without the axis of the classes.
        y_pred: Logits of any floating dtype.
        from_logits: Must be True. Present so that calls of the Keras function work unchanged.
        ignore_class: A label whose loss is 0. Defaults to None.
        axis: The axis of the classes. Defaults to -1.

    Raises:
        ValueError: If `from_logits` is False.

    Example:
    >>> float(sparse_categorical_crossentropy([0], ops.cast([[-6e4, 6e4]], "float16"))[0])
    120000.0
    """
    logits = _logits(y_pred, from_logits)
    return keras.losses.sparse_categorical_crossentropy(ops.convert_to_tensor(y_true), logits, True, ignore_class, axis)


@keras.saving.register_keras_serializable(_PACKAGE)
def binary_crossentropy(
    y_true: Any, y_pred: Any, from_logits: bool = True, label_smoothing: float = 0.0, axis: int = -1
) -> Any:
    """Returns the float32 cross-entropy of binary labels and logits, averaged over an axis.

    In float16, the Keras function gives 0 below 3e-8: for a label of 1 and a logit of 18 or more.

    Args:
        y_true: Labels between 0 and 1, in the shape of `y_pred`.
        y_pred: Logits of any floating dtype.
        from_logits: Must be True. Present so that calls of the Keras function work unchanged.
        label_smoothing: The part of each label that is replaced by 0.5. Defaults to 0.0.
        axis: The axis to average over. Defaults to -1.

    Raises:
        ValueError: If `from_logits` is False.

    Example:
    >>> f"{float(binary_crossentropy([[1]], ops.cast([[20]], 'float16'))[0]):.2e}"
    '2.06e-09'
    """
    return keras.losses.binary_crossentropy(y_true, _logits(y_pred, from_logits), True, label_smoothing, axis)


class _Float32Loss(keras.losses.Loss):
    """Mixin that makes a Keras loss accept only logits, and compute in float32. Listed before the Keras class."""

    def __init__(self, from_logits: bool = True, *args: Any, **kwargs: Any) -> None:
        _check_logits(from_logits)
        super().__init__(True, *args, dtype="float32", **kwargs)


@keras.saving.register_keras_serializable(_PACKAGE)
class CategoricalCrossentropy(_Float32Loss, keras.losses.CategoricalCrossentropy):
    """`categorical_crossentropy` as a class for `compile`.

    Under a floatx of float16, the Keras class fails like its function, and its mean over 8,192 losses of 11 is inf.
    Takes the arguments of the Keras class except `dtype`.

    Raises:
        ValueError: If `from_logits` is False.

    Example:
    >>> float(CategoricalCrossentropy()(ops.array([[1, 0]]), ops.cast([[-6e4, 6e4]], "float16")))
    120000.0
    """


@keras.saving.register_keras_serializable(_PACKAGE)
class SparseCategoricalCrossentropy(_Float32Loss, keras.losses.SparseCategoricalCrossentropy):
    """`sparse_categorical_crossentropy` as a class for `compile`.

    Under a floatx of float16, the Keras class casts labels to float16, too: label 2049 becomes 2048. Its mean
    over 8,192 losses of 11 is inf. Takes the arguments of the Keras class except `dtype`.

    Raises:
        ValueError: If `from_logits` is False.

    Example:
    >>> float(SparseCategoricalCrossentropy()(ops.array([0]), ops.cast([[-6e4, 6e4]], "float16")))
    120000.0
    """


@keras.saving.register_keras_serializable(_PACKAGE)
class BinaryCrossentropy(_Float32Loss, keras.losses.BinaryCrossentropy):
    """`binary_crossentropy` as a class for `compile`.

    Under a floatx of float16, the Keras class fails like its function, and its mean over 8,192 losses of 11 is inf.
    Takes the arguments of the Keras class except `dtype`.

    Raises:
        ValueError: If `from_logits` is False.

    Example:
    >>> f"{float(BinaryCrossentropy()(ops.array([[1]]), ops.cast([[20]], 'float16'))):.2e}"
    '2.06e-09'
    """


def _logits(y_pred: Any, from_logits: bool) -> Any:
    _check_logits(from_logits)
    return ops.cast(y_pred, "float32")


def _check_logits(from_logits: bool) -> None:
    if not from_logits:
        raise ValueError(
            "`from_logits` must be True, since half-precision probabilities have lost accuracy. Remove the softmax or "
            f"sigmoid from the model. Received: from_logits={from_logits}"
        )
