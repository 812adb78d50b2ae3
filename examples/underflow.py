"""Shows why float16 needs loss scaling, on a model whose gradients underflow by themselves.

    python examples/underflow.py [--steps 160]

An autoencoder of the digits, with sigmoid units and a loss per pixel averaged over the whole training set: each of the
92,000 pixels contributes about 1e-6 to the gradient, and each sigmoid on the way back divides it by four or more. Below
6e-8 float16 has only 0. Nothing here multiplies the loss but the loss scale.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich import box
from rich.console import Console
from rich.table import Column, Table
from sklearn.datasets import load_digits

import tfmixed

CASES: dict[str, tuple[str, Any]] = {
    "float32": ("float32", None),
    "float16, unscaled": ("mixed_float16", None),
    "float16, 2^15": ("mixed_float16", 2.0**15),
    "float16, dynamic": ("mixed_float16", "dynamic"),
}


@dataclass(frozen=True)
class Outcome:
    """Loss before and after training, and the share of weight-gradient entries that are 0, of the whole model."""

    before: float
    after: float
    zeros_first: float
    zeros_last: float


def load_data() -> np.ndarray:
    """Returns 1,437 images of 64 pixels in [0, 1]."""
    return load_digits().data[:1437].astype("float32") / 16


def build(widths: tuple[int, ...]) -> keras.Model:
    hidden = [keras.layers.Dense(width, activation="sigmoid") for width in widths]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(64, "sigmoid", dtype="float32")])


def train(
    policy: str, scale: Any, steps: int, images: int = 1437, widths: tuple[int, ...] = (24, 16, 16, 24)
) -> Outcome:
    pixels = load_data()[:images]
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "policy .* is slow here")  # known: this run is about numerics
        with tfmixed.policy_scope(policy):
            model = build(widths)
    # A constant 1 scales nothing, and still measures and checks.
    optimizer = tfmixed.LossScaleOptimizer(keras.optimizers.Adam(0.02), scale)
    objective = keras.losses.MeanSquaredError()

    @tf.function
    def step() -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = objective(pixels, model(pixels, training=True))
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        zeros = tf.add_n([tf.math.count_nonzero(gradient == 0) for gradient in gradients])
        return loss, zeros / sum(gradient.shape.num_elements() for gradient in gradients)

    losses, zeros = np.array([[float(number) for number in step()] for _ in range(steps)]).T
    return Outcome(losses[0], losses[-1], zeros[0], zeros[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    steps = parser.parse_args().steps
    table = Table(
        Column("run", no_wrap=True), "loss before", "loss after", "zeros, start", "zeros, end", box=box.SIMPLE_HEAD
    )
    console = Console()
    for name, case in CASES.items():
        with console.status(f"training: {name}"):
            outcome = train(*case, steps)
        losses = (f"{number:.4f}" for number in (outcome.before, outcome.after))
        shares = (f"{share:.1%}" for share in (outcome.zeros_first, outcome.zeros_last))
        table.add_row(name, *losses, *shares)
    console.print(f"Autoencoder of 1,437 digits, {steps} steps of Adam")
    console.print(table)
    console.print("zeros: share of all entries of the weight gradients that are exactly 0")
    mean_image = load_data().var(axis=0).mean()
    console.print(f"A model that has learned nothing but the mean image has a loss of {mean_image:.4f}.")


if __name__ == "__main__":
    main()
