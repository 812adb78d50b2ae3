"""Cross-entropies of logits, in float32 whatever the dtype of the logits: functions for loops, classes for `compile`.

They take logits only: a probability that a half-precision softmax rounded to 0 is beyond help, and Keras clips it to
1e-7.

Keras's loss classes, and `compile(loss="...")`, cast what they get to `keras.config.floatx()`, so that under the usual
float32 they agree with the classes here. Ours are float32 under a floatx of float16 as well. Keras's functions cast
nothing, and are what a loop of one's own calls on the outputs of a half-precision model.

What goes wrong without each of them was measured with Keras 3.15 and TensorFlow 2.21 on a CPU.
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
    """Returns the cross-entropy of one-hot labels and logits, float32, one value per example.

    In float16 Keras's function gives inf above 65504. Of 70,000 equal logits it gives nan on JAX and PyTorch; on
    TensorFlow it gives the right 11.16, but `label_smoothing=0.1` takes 10 % off, since the number of classes is inf.

    Args:
        y_true: Probabilities of the classes, of the shape of `y_pred`.
        y_pred: Logits of any floating dtype.
        from_logits: True, so that calls of Keras's function can stay as they are.
        label_smoothing: The share of each label that is spread over all classes.
        axis: The axis of the classes.

    Raises:
        ValueError: `from_logits` is False.

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
    """Returns the cross-entropy of integer labels and logits, float32, one value per example.

    In float16 Keras's function gives inf above 65504. Of 70,000 equal logits it gives nan on JAX and inf on PyTorch. It
    compares labels with `ignore_class` in float16, which has no odd numbers above 2048: to ignore class 2049 is to
    ignore 2048 as well.

    Args:
        y_true: Integer labels, of the shape of `y_pred` without the axis of the classes.
        y_pred: Logits of any floating dtype.
        from_logits: True, so that calls of Keras's function can stay as they are.
        ignore_class: A label that costs nothing.
        axis: The axis of the classes.

    Raises:
        ValueError: `from_logits` is False.

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
    """Returns the cross-entropy of labels of 0 or 1 and logits, float32, averaged over an axis.

    In float16 Keras's function gives 0 below 3e-8: for a 1 with a logit of 18 or more.

    Args:
        y_true: Labels between 0 and 1, of the shape of `y_pred`.
        y_pred: Logits of any floating dtype.
        from_logits: True, so that calls of Keras's function can stay as they are.
        label_smoothing: How far the labels are pulled towards 0.5; 1 is all the way.
        axis: The axis to average over.

    Raises:
        ValueError: `from_logits` is False.

    Example:
    >>> f"{float(binary_crossentropy([[1]], ops.cast([[20]], 'float16'))[0]):.2e}"
    '2.06e-09'
    """
    return keras.losses.binary_crossentropy(y_true, _logits(y_pred, from_logits), True, label_smoothing, axis)


class _OfLogits(keras.losses.Loss):
    """Makes a Keras loss take logits only, in float32. To be listed before the Keras class."""

    def __init__(self, from_logits: bool = True, *args: Any, **kwargs: Any) -> None:
        _refuse_probabilities(from_logits)
        super().__init__(True, *args, dtype="float32", **kwargs)


@keras.saving.register_keras_serializable(_PACKAGE)
class CategoricalCrossentropy(_OfLogits, keras.losses.CategoricalCrossentropy):
    """Cross-entropy of one-hot labels and logits, computed and returned in float32.

    Under a floatx of float16 Keras's class has the faults of its function, and its mean over 8,192 examples that cost
    11 each is inf.

    Args:
        from_logits: True, so that calls of Keras's class can stay as they are.
        *args: Those of `keras.losses.CategoricalCrossentropy`.
        **kwargs: Those of `keras.losses.CategoricalCrossentropy`, but no `dtype`.

    Raises:
        ValueError: `from_logits` is False.

    Example:
    >>> float(CategoricalCrossentropy()(ops.array([[1, 0]]), ops.cast([[-6e4, 6e4]], "float16")))
    120000.0
    """


@keras.saving.register_keras_serializable(_PACKAGE)
class SparseCategoricalCrossentropy(_OfLogits, keras.losses.SparseCategoricalCrossentropy):
    """Cross-entropy of integer labels and logits, computed and returned in float32.

    Under a floatx of float16 Keras's class casts the labels to float16 too, which has no odd numbers above 2048: label
    2049 becomes 2048. Its mean over 8,192 examples that cost 11 each is inf.

    Args:
        from_logits: True, so that calls of Keras's class can stay as they are.
        *args: Those of `keras.losses.SparseCategoricalCrossentropy`.
        **kwargs: Those of `keras.losses.SparseCategoricalCrossentropy`, but no `dtype`.

    Raises:
        ValueError: `from_logits` is False.

    Example:
    >>> float(SparseCategoricalCrossentropy()(ops.array([0]), ops.cast([[-6e4, 6e4]], "float16")))
    120000.0
    """


@keras.saving.register_keras_serializable(_PACKAGE)
class BinaryCrossentropy(_OfLogits, keras.losses.BinaryCrossentropy):
    """Cross-entropy of labels of 0 or 1 and logits, computed and returned in float32.

    Under a floatx of float16 Keras's class has the faults of its function, and its mean over 8,192 examples that cost
    11 each is inf.

    Args:
        from_logits: True, so that calls of Keras's class can stay as they are.
        *args: Those of `keras.losses.BinaryCrossentropy`.
        **kwargs: Those of `keras.losses.BinaryCrossentropy`, but no `dtype`.

    Raises:
        ValueError: `from_logits` is False.

    Example:
    >>> f"{float(BinaryCrossentropy()(ops.array([[1]]), ops.cast([[20]], 'float16'))):.2e}"
    '2.06e-09'
    """


def _logits(y_pred: Any, from_logits: bool) -> Any:
    _refuse_probabilities(from_logits)
    return ops.cast(y_pred, "float32")


def _refuse_probabilities(from_logits: bool) -> None:
    if not from_logits:
        raise ValueError(
            "from_logits must be True: probabilities have lost in half precision what float32 could keep. Leave the "
            f"softmax or sigmoid out of the model. Received: from_logits={from_logits}"
        )
