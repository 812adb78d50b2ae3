"""Finds what float16 breaks in a custom layer, fixes it with `force_float32`, and trains on digits.

python examples/islands.py
tfmixed audit examples.islands:unsafe --policy mixed_float16     # the same table, with an exit code
"""

from __future__ import annotations

import contextlib

import keras
import numpy as np
from keras import layers, ops
from rich.console import Console
from sklearn.datasets import load_digits

import tfmixed


@keras.saving.register_keras_serializable("examples")
class Attend(layers.Layer):
    """Attention over the rows of an image, with empty rows masked."""

    def call(self, rows):
        energy = ops.sum(ops.square(rows), axis=-1)
        scores = ops.where(energy > 0, ops.sqrt(energy), -1e9)
        weights = ops.exp(scores - 10.0)
        weights = weights / (ops.sum(weights, axis=-1, keepdims=True) + 1e-9)
        return ops.sum(rows * ops.expand_dims(weights, -1), axis=1)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Returns images of 8x8 pixels in [0, 16] and their labels."""
    digits = load_digits()
    return digits.images.astype("float32"), digits.target


def unsafe() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Returns a model that trains well in float32, and a batch."""
    inputs = keras.Input((8, 8))
    rows = layers.Dense(32, activation="relu", name="rows")(inputs)
    both = layers.Concatenate()([Attend(name="attend")(rows), layers.Flatten()(rows)])
    model = keras.Model(inputs, layers.Dense(10, activation="softmax", name="digit")(both))
    model.compile(tfmixed.LossScaleOptimizer(keras.optimizers.Adam(3e-3)), "sparse_categorical_crossentropy")
    x, y = data()
    return model, x[:64], y[:64]


def accuracy(policy: str, force: bool = False) -> str:
    """Trains a model and returns its validation accuracy and the number of applied steps, as text."""
    keras.utils.set_random_seed(0)
    with tfmixed.policy_scope(policy, promote=False):  # by default, custom layers receive float32
        model, _, _ = unsafe()
    changed = tfmixed.force_float32(model) if force else []
    x, y = data()
    with contextlib.suppress(tfmixed.errors.LossScaleExhausted):  # all steps were skipped
        model.fit(x[:1500], y[:1500], epochs=15, batch_size=50, verbose=0)
    correct = float(np.mean(model.predict(x[1500:], verbose=0).argmax(-1) == y[1500:]))
    applied = int(model.optimizer.attempted_steps) - int(model.optimizer.skipped_steps)
    islands = f", in float32: {', '.join(changed)}" if changed else ""
    return f"{correct:6.1%} accuracy, {applied} steps applied{islands}"


def main() -> None:
    with tfmixed.policy_scope("mixed_float16", promote=False):
        Console().print(tfmixed.audit(*unsafe()))
    print("float32                ", accuracy("float32"))
    print("float16                ", accuracy("mixed_float16"))
    print("float16, force_float32 ", accuracy("mixed_float16", force=True))


if __name__ == "__main__":
    main()
