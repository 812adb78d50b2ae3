"""Trains one model with `fit` and in two custom loops, with the same loss in each step.

    python examples/custom_loop.py

Each step uses 512 digits in mixed_float16. The scale starts too high on purpose, so the first steps are skipped.
PyTorch-style loops are in `grad_scaler.py`.
"""

from __future__ import annotations

import keras
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import tfmixed

RULE, STEPS = tfmixed.DynamicScale(initial_scale=2.0**24, growth_interval=5), 12
X, Y = (array[:512] for array in (load_digits().data.astype("float32") / 16, load_digits().target))
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build() -> keras.Model:
    """Returns a model with the same weights at each call."""
    keras.utils.set_random_seed(0)
    with tfmixed.policy_scope("mixed_float16"):
        return keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])


def fit() -> list[float]:
    model = build()
    model.compile(tfmixed.LossScaleOptimizer(keras.optimizers.SGD(0.5), RULE), loss_of)
    return model.fit(X, Y, batch_size=len(X), epochs=STEPS, verbose=0).history["loss"]


def keras3() -> list[float]:
    model, optimizer = build(), tfmixed.LossScaleOptimizer(keras.optimizers.SGD(0.5), RULE)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = loss_of(Y, model(X, training=True))
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # unscales, and skips non-finite gradients
        return loss

    return [float(step()) for _ in range(STEPS)]


def keras2() -> list[float]:
    model, optimizer = build(), tfmixed.LossScaleOptimizer(keras.optimizers.SGD(0.5), RULE)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = loss_of(Y, model(X, training=True))
            scaled = optimizer.get_scaled_loss(loss)
        gradients = optimizer.get_unscaled_gradients(tape.gradient(scaled, model.trainable_variables))
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return [float(step()) for _ in range(STEPS)]


def show(losses: dict[str, list[float]]) -> None:
    table = Table("step", *losses, title="Loss before the step")
    for number, row in enumerate(zip(*losses.values(), strict=True)):
        table.add_row(str(number), *(f"{loss:.4f}" for loss in row))
    Console().print(table)


if __name__ == "__main__":
    show({"fit": fit(), "Keras 3": keras3(), "Keras 2": keras2()})
