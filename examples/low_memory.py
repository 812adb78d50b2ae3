"""Trains on digits with half the memory for weights, gradients and optimizer states.

    python examples/low_memory.py [--epochs 20]

Prints the bytes of a parameter and the loss of the training images: with float32 weights, with bfloat16 weights that
Keras updates in bfloat16, and with `LowPrecisionOptimizer`. Adam's `beta_2` of 0.999 is 1 in bfloat16, so that Keras's
own update moves no weight.
"""

from __future__ import annotations

import argparse
import warnings

import keras
from keras import layers, ops
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import tfmixed

FORMS = {
    "mixed_bfloat16, Keras": ("mixed_bfloat16", lambda adam: adam),
    "bfloat16, Keras": ("bfloat16", lambda adam: adam),
    "bfloat16, LowPrecisionOptimizer": ("bfloat16", tfmixed.LowPrecisionOptimizer),
    "bfloat16, 8-bit states": ("bfloat16", lambda adam: tfmixed.LowPrecisionOptimizer(adam, states="int8")),
}


def nbytes(variable) -> int:
    return ops.size(variable) * {"bfloat16": 2, "int16": 2, "uint8": 1}.get(str(variable.dtype), 4)


def train(policy: str, wrap, epochs: int) -> tuple[float, float]:
    """Returns the bytes of a parameter, its gradient and states, and the loss after training."""
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():  # policy bfloat16: the optimizer's constants round away
        warnings.simplefilter("ignore")
        tfmixed.set_policy(policy)
    x, y = load_digits(return_X_y=True)
    x, y = (x[:1437] / 16).astype("float32"), y[:1437]
    hidden = [layers.Dense(256, activation="relu") for _ in range(2)]
    logits = [layers.Dense(10), layers.Activation("linear", dtype="float32")]
    model = keras.Sequential([keras.Input((64,)), *hidden, *logits])
    steps = epochs * -(-len(x) // 64)
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps))
    model.compile(wrap(adam), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    weights = model.trainable_variables
    total = 2 * sum(map(nbytes, weights)) + sum(
        map(nbytes, model.optimizer.variables)
    )  # a gradient has its weight's dtype
    return int(total) / model.count_params(), float(model.evaluate(x, y, batch_size=len(x), verbose=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    table = Table("weights and update", "bytes a parameter", "training loss")
    for name, (policy, wrap) in FORMS.items():
        used, loss = train(policy, wrap, epochs)
        table.add_row(name, f"{used:.1f}", f"{loss:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
