"""PyTorch-style loops: gradient clipping, gradient accumulation, a gradient penalty.

    python examples/grad_scaler.py

Trains the model of `custom_loop.py`. Its first steps overflow and are skipped, also with clipping.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from custom_loop import RULE, STEPS, X, Y, build, fit, loss_of, show

from tfmixed import GradScaler


def plain(model, _sgd, scaler):
    with tf.GradientTape() as tape:
        loss = loss_of(Y, model(X, training=True))
        scaled = scaler.scale(loss)
    return loss, tape.gradient(scaled, model.trainable_variables)


def clipped(model, sgd, scaler):
    loss, gradients = plain(model, sgd, scaler)
    return loss, tf.clip_by_global_norm(scaler.unscale(sgd, gradients), 0.1)[0]


def accumulated(model, _sgd, scaler):
    """Sums the gradients of four quarters of the batch."""
    total, sums = 0.0, [0.0] * len(model.trainable_variables)
    for x, y in zip(np.split(X, 4), np.split(Y, 4), strict=True):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True)) / 4
            scaled = scaler.scale(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        sums = [a + b for a, b in zip(sums, gradients, strict=True)]
        total += loss
    return total, sums


def penalized(model, _sgd, scaler):
    """Adds the squared gradient with respect to the inputs to the loss. That gradient is scaled, too."""
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = loss_of(Y, model(x, training=True))
            scaled = scaler.scale(loss)
        loss += 10 * tf.reduce_sum((inner.gradient(scaled, x) / scaler.get_scale()) ** 2)
        scaled = scaler.scale(loss)
    return loss, tape.gradient(scaled, model.trainable_variables)


def train(gradients: Callable) -> list[float]:
    """Returns the loss before each step, for one of the functions above."""
    model, sgd, scaler = build(), keras.optimizers.SGD(0.5), GradScaler(rule=RULE)

    @tf.function
    def step():
        loss, scaled = gradients(model, sgd, scaler)
        scaler.step(sgd, zip(scaled, model.trainable_variables, strict=True))
        scaler.update()
        return loss

    return [float(step()) for _ in range(STEPS)]


def main() -> None:
    show({"fit": fit()} | {loop.__name__: train(loop) for loop in (plain, clipped, accumulated, penalized)})


if __name__ == "__main__":
    main()
