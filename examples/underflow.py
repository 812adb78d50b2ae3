"""Shows why float16 needs loss scaling, with a model whose gradients underflow.

    python examples/underflow.py [--steps 160]

An autoencoder of digits with sigmoid units, and a loss averaged over all pixels of the training set. Each of the 92,000
pixels contributes about 1e-6 to the gradient, and each sigmoid divides it by four or more in the backward pass. The
smallest positive float16 is 6e-8. Only the loss scale multiplies the loss.
"""

from __future__ import annotations

import argparse
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import tfmixed

RUNS = {
    "float32": ("float32", None),
    "float16, unscaled": ("mixed_float16", None),  # a constant scale of 1: no scaling, but checked
    "float16, 2^15": ("mixed_float16", 2.0**15),
    "float16, dynamic": ("mixed_float16", "dynamic"),
}


def load_data() -> np.ndarray:
    """Returns 1,437 images of 64 pixels in [0, 1]."""
    return load_digits().data[:1437].astype("float32") / 16


def build(policy: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    with tfmixed.policy_scope(policy):
        hidden = [keras.layers.Dense(width, activation="sigmoid") for width in (24, 16, 16, 24)]
        return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(64, "sigmoid", dtype="float32")])


def train(policy: str, scale: Any, steps: int) -> np.ndarray:
    """Returns the loss and the share of gradient entries that are 0, for each step."""
    pixels, model, objective = load_data(), build(policy), keras.losses.MeanSquaredError()
    optimizer = tfmixed.LossScaleOptimizer(keras.optimizers.Adam(0.02), scale)
    entries = model.count_params()

    @tf.function
    def step() -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = objective(pixels, model(pixels, training=True))
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        zeros = tf.add_n([tf.math.count_nonzero(gradient == 0) for gradient in gradients])
        return loss, zeros / entries

    return np.array([[float(number) for number in step()] for _ in range(steps)]).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    steps = parser.parse_args().steps
    table = Table("run", "loss before", "loss after", "zeros, start", "zeros, end")
    for name, (policy, scale) in RUNS.items():
        losses, zeros = train(policy, scale, steps)
        table.add_row(name, *(f"{losses[i]:.4f}" for i in (0, -1)), *(f"{zeros[i]:.1%}" for i in (0, -1)))
    console, mean_image = Console(), load_data().var(axis=0).mean()
    console.print(f"Autoencoder of 1,437 digits, {steps} steps of Adam", table)
    console.print("zeros: share of weight-gradient entries that are exactly 0")
    console.print(f"A model that predicts the mean image has a loss of {mean_image:.4f}.")


if __name__ == "__main__":
    main()
