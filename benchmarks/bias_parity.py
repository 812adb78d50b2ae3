"""Compares trainings with float32 sums in the backward pass, and without, where biases add up many terms.

    python benchmarks/bias_parity.py                      # the last section of benchmarks/results/parity.md
    python benchmarks/bias_parity.py --seeds 2 --output -

All 1,437 training images of `examples/digits.py` are one batch, and no layer normalizes. Number: the cross-entropy of
the validation images.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import keras
import numpy
import parity
import tensorflow as tf
from keras import layers
from parity import Task
from rich.console import Console
from rich.markdown import Markdown

import tfmixed
from tfmixed._utils import atomic_write

Make = Callable[[], keras.Model]
Precision = tuple[str, bool]  # the policy, and whether sums are in float32
STEPS = 200
PRECISIONS = {
    "float32": ("float32", True),
    "mixed_bfloat16": ("mixed_bfloat16", True),
    "mixed_bfloat16, float32_sums=False": ("mixed_bfloat16", False),
}


def classifier() -> keras.Model:
    convolutions = [layers.Conv1D(16, 3, strides=2, activation="relu") for _ in range(3)]
    output = [layers.Flatten(), layers.Dense(10), layers.Softmax(dtype="float32")]
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Reshape((64, 1)), *convolutions, *output])


def autoencoder() -> keras.Model:
    resize = {"kernel_size": 3, "strides": 2, "padding": "same"}
    encoder = [layers.Conv2D(8, **resize, activation="relu") for _ in range(2)]
    decoder = [layers.Conv2DTranspose(8, **resize, activation="relu"), layers.Conv2DTranspose(1, **resize)]
    return keras.Sequential([keras.Input((8, 8, 1)), *encoder, *decoder, layers.Activation("sigmoid", dtype="float32")])


def problem(make: Make, precision: Precision, seed: int) -> tuple[keras.Model, list, keras.losses.Loss]:
    """Returns the model of a seed, training and validation images and their targets, and the loss."""
    keras.utils.set_random_seed(seed)
    policy, float32_sums = precision
    tfmixed.set_policy(policy, float32_sums=float32_sums)
    images, validation, *labels = (numpy.asarray(array, "float32") for array in parity.digits.digits())
    if make is classifier:
        return make(), [images, validation, *labels], keras.losses.SparseCategoricalCrossentropy()
    return make(), [images, validation, images, validation], keras.losses.BinaryCrossentropy()


def train(
    make: Make, optimizer: Callable[[], keras.optimizers.Optimizer], precision: Precision, seed: int
) -> tuple[keras.Model, float]:
    model, (x, validation_x, y, validation_y), loss = problem(make, precision, seed)
    model.compile(optimizer(), loss)
    for _ in range(STEPS):
        model.train_on_batch(x, y)
    return model, model.evaluate(validation_x, validation_y, verbose=0)


sgd = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
adam = functools.partial(keras.optimizers.Adam, 3e-3)
TASKS = {
    "classifier": Task("Conv1D classifier, SGD", ".4f", functools.partial(train, classifier, sgd)),
    "autoencoder": Task("autoencoder, SGD", ".4f", functools.partial(train, autoencoder, sgd)),
    "autoencoder, Adam": Task("autoencoder, Adam", ".4f", functools.partial(train, autoencoder, adam)),
}


def gradients(make: Make, precision: Precision) -> dict[str, numpy.ndarray]:
    """Returns the gradients of the first step of seed 0, in a compiled function."""
    model, (x, _, y, _), loss = problem(make, precision, 0)

    @tf.function
    def gradient(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return tape.gradient(value, [variable.value for variable in model.trainable_variables])

    names = [f"{layer.name}, {weight.name}" for layer in model.layers for weight in layer.trainable_weights]
    return dict(zip(names, (grad.numpy() for grad in gradient(tf.constant(x), tf.constant(y))), strict=True))


def errors() -> list[list[str]]:
    """Returns the rows of relative errors of gradients against float32."""
    rows = [["model, layer, variable", *list(PRECISIONS)[1:]]]
    for make in (classifier, autoencoder):
        keras.utils.clear_session()
        full, *halves = (gradients(make, precision) for precision in PRECISIONS.values())
        for (name, exact), *others in zip(full.items(), *(half.values() for half in halves), strict=True):
            shares = (numpy.linalg.norm(other - exact) / numpy.linalg.norm(exact) for other in others)
            rows.append([f"{make.__name__}, {name}", *(f"{share:.3f}" for share in shares)])
    return rows


def distances(results: dict[str, dict[str, parity.Outcome]]) -> list[str]:
    """Returns a sentence on the effect of float32 sums, and the distances of each precision from float32."""
    full, on, off = PRECISIONS
    effects = {name: parity.difference(outcomes[off], outcomes[on]) for name, outcomes in results.items()}
    beyond = sum(abs(mean) > half for mean, half in effects.values())
    text = f"{beyond or 'None'} of the {len(effects)} means changes by more than the noise of seeds with "
    text += "`float32_sums=False`.\nMean distance from the float32 run of the same seed:\n"
    rows = [["precision", *(TASKS[name].title for name in results)]]
    for precision in (on, off):
        pairs = ((outcomes[precision].numbers, outcomes[full].numbers) for outcomes in results.values())
        rows.append([precision, *(f"{abs(numpy.subtract(*pair)).mean():.4f}" for pair in pairs)])
    spreads = (f"{mean:+.4f} ± {half:.4f}" for mean, half in effects.values())
    rows.append(["mean change with float32_sums=False", *spreads])
    return [text, *parity.lines(rows)]


def section(seeds: int) -> str:
    results = {name: parity.measured(task, seeds, PRECISIONS) for name, task in TASKS.items()}
    about = f"""\
`python benchmarks/bias_parity.py` with {seeds} seeds,
{parity.machine()}.

{STEPS} steps on one batch, the 1,437 training images of the digits, without normalization. Numbers are cross-entropies
of the validation images in nats; less is better. `mixed_bfloat16` adds up gradients in float32, `float32_sums=False` as
TensorFlow does. Of five models tried with one or two seeds, these are the two that showed an effect most.
"""
    parts = [
        parity.SUMS,
        about,
        *parity.summary(results, TASKS),
        parity.conclusion(results, TASKS),
        *distances(results),
    ]
    parts += ["Relative error of the gradients of the first step, seed 0, against float32:\n", *parity.lines(errors())]
    for name, outcomes in results.items():
        parts += ["#" + line if line.startswith("## ") else line for line in parity.details(TASKS[name], outcomes)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2 (default: %(default)s)")
    parser.add_argument("--output", default=str(parity.RESULTS), help="file to write, or - (default: %(default)s)")
    arguments = parser.parse_args()
    text = section(arguments.seeds)
    Console().print(Markdown(text))
    if arguments.output != "-":
        path = Path(arguments.output)
        before = path.read_text(encoding="utf-8").partition(parity.SUMS)[0] if path.exists() else ""
        atomic_write.write_text(path, before.rstrip("\n") + "\n\n" + text)


if __name__ == "__main__":
    main()
