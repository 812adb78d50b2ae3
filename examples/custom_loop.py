"""One model trained in four ways with equal losses step by step, and what one writes loops for.

    python examples/custom_loop.py

A step is one pass over 512 digits in mixed_float16; the scale starts too high on purpose.
"""

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from tfmixed import DynamicScale, GradScaler, LossScaleOptimizer, set_policy

RULE, STEPS = DynamicScale(initial_scale=2.0**24, growth_interval=5), 12
X, Y = (each[:512] for each in (load_digits().data.astype("float32") / 16, load_digits().target))
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fit(model, sgd):
    """Keras does it all."""
    model.compile(LossScaleOptimizer(sgd, RULE), loss_of)
    return model.fit(X, Y, batch_size=len(X), epochs=STEPS, verbose=0).history["loss"]


def optimizer_loop(model, sgd, keras2=False):
    """Keras 3 unscales in `apply`; Keras 2 before it, by hand."""
    optimizer, variables = LossScaleOptimizer(sgd, RULE), model.trainable_variables

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = loss_of(Y, model(X, training=True))
            scaled = optimizer.get_scaled_loss(loss) if keras2 else optimizer.scale_loss(loss)
        grads = tape.gradient(scaled, variables)
        grads = optimizer.get_unscaled_gradients(grads) if keras2 else grads
        optimizer.apply_gradients(zip(grads, variables, strict=True))
        return loss

    return [float(step()) for _ in range(STEPS)]


def scaler_loop(model, sgd, clip=None, parts=1, penalty=0.0):
    """As in PyTorch. Clips, adds up the gradients of `parts` of the batch, and punishes steep losses, if asked to."""
    scaler, variables = GradScaler(rule=RULE), model.trainable_variables

    @tf.function
    def step():
        total, grads = 0.0, [0.0] * len(variables)
        for x, y in zip(map(tf.constant, np.split(X, parts)), np.split(Y, parts), strict=True):
            with tf.GradientTape() as tape:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = loss_of(y, model(x, training=True)) / parts
                    scaled = scaler.scale(loss)
                if penalty:  # on the gradient by the inputs, which is scaled too
                    slope = inner.gradient(scaled, x) / scaler.get_scale()
                    loss += penalty * tf.reduce_sum(slope**2)
                    scaled = scaler.scale(loss)
            grads = [a + b for a, b in zip(grads, tape.gradient(scaled, variables), strict=True)]
            total += loss
        if clip:  # what overflowed is remembered: it cannot hide in a clip
            grads, _ = tf.clip_by_global_norm(scaler.unscale(sgd, grads), clip)
        scaler.step(sgd, zip(grads, variables, strict=True))
        scaler.update()
        return total

    return [float(step()) for _ in range(STEPS)]


WAYS = {
    "fit": fit,
    "optimizer": optimizer_loop,
    "Keras 2": lambda *given: optimizer_loop(*given, keras2=True),
    "GradScaler": scaler_loop,
    "clipped": lambda *given: scaler_loop(*given, clip=0.1),
    "in 4 parts": lambda *given: scaler_loop(*given, parts=4),
    "penalized": lambda *given: scaler_loop(*given, penalty=10.0),
}


def main():
    set_policy("mixed_float16")
    losses = {}
    for name, train in WAYS.items():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
        losses[name] = train(model, keras.optimizers.SGD(0.5))
    table = Table("step", *losses, title="loss")
    for number, row in enumerate(zip(*losses.values(), strict=True)):
        table.add_row(str(number), *(f"{loss:.4f}" for loss in row))
    Console().print(table)
    fit, *same, clipped, parts, penalized = map(np.array, losses.values())
    np.testing.assert_allclose(same, [fit] * 3, rtol=1e-6)
    # The gradients of a part are smaller, so the scale is found sooner: the same steps, with other ones skipped.
    moved = [losses[:-1][np.diff(losses) != 0] for losses in (fit, parts)]
    np.testing.assert_allclose(*(each[: min(map(len, moved))] for each in moved), rtol=1e-4)
    assert fit[-1] < clipped[-1] < clipped[0]  # smaller steps
    assert max(fit[0], penalized[-1]) < penalized[0]  # the penalty is a part of the loss


if __name__ == "__main__":
    main()
