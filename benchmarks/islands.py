"""Times float32 layers against those of Keras, and models before and after `force_float32`.

    python benchmarks/islands.py                 # mixed_bfloat16, some minutes
    python benchmarks/islands.py --policy mixed_float16

Both of a pair are interleaved in one process, forward and backward. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import keras
import numpy
import tensorflow as tf
from keras import layers, ops
from rich.console import Console
from rich.table import Table

import tfmixed
from tfmixed._cli.bench import networks
from tfmixed._utils import timing

ours = tfmixed.layers
ROUNDS = 15
PAIRS = {
    "Softmax, 8 x 128 x 8000": (layers.Softmax, ours.Softmax, (8, 128, 8000)),
    "LogSumExp, 8 x 128 x 8000": (
        lambda: layers.Lambda(lambda x: ops.logsumexp(x, -1)),
        ours.LogSumExp,
        (8, 128, 8000),
    ),
    "Sum, 64 x 12544": (lambda: layers.Lambda(lambda x: ops.sum(x, -1)), ours.Sum, (64, 12544)),
    "UnitNormalization, 512 x 2048": (layers.UnitNormalization, ours.UnitNormalization, (512, 2048)),
    "LayerNormalization, 8 x 128 x 512": (layers.LayerNormalization, ours.LayerNormalization, (8, 128, 512)),
    "BatchNormalization, 64 x 32 x 32 x 64": (layers.BatchNormalization, ours.BatchNormalization, (64, 32, 32, 64)),
    "GlobalAveragePooling2D, 64 x 32 x 32 x 64": (
        layers.GlobalAveragePooling2D,
        ours.GlobalAveragePooling2D,
        (64, 32, 32, 64),
    ),
    "MultiHeadAttention, 8 x 128 x 512, dropout": (
        lambda: SelfAttention(layers.MultiHeadAttention(8, 64, dropout=0.1)),
        lambda: SelfAttention(ours.MultiHeadAttention(8, 64, dropout=0.1)),
        (8, 128, 512),
    ),
}


class SelfAttention(layers.Layer):
    """Self-attention."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)


def step(layer: layers.Layer, shape: tuple[int, ...]) -> Callable[[], None]:
    """Returns a compiled forward and backward pass on half-precision inputs."""
    x = ops.cast(numpy.random.default_rng(0).normal(size=shape), keras.config.dtype_policy().compute_dtype)
    layer(x, training=True) if "training" in layer.call.__code__.co_varnames else layer(x)

    @tf.function(autograph=False)
    def run():
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(tf.cast(layer(x), "float32"))
        return tape.gradient(total, [x, *layer.trainable_variables])

    return lambda: [gradient.numpy() for gradient in run()[:1]]


def medians(*runs: Callable[[], None], rounds: int = ROUNDS) -> list[float]:
    """Returns the median milliseconds of interleaved functions."""
    for run in runs:
        run()
    times = timing.interleaved({str(number): run for number, run in enumerate(runs)}, rounds)
    return [1e3 * median for median in timing.medians(times).values()]


def language_model() -> networks.Problem:
    """A Transformer with attention dropout, whose softmax is therefore in half precision."""
    ids = keras.Input((128,), dtype="int32")
    x = layers.Embedding(8000, 512)(ids)
    for _ in range(4):
        x += layers.MultiHeadAttention(8, 64, dropout=0.1)(x, x, use_causal_mask=True)
        x = layers.LayerNormalization()(x)
        x = layers.LayerNormalization()(x + layers.Dense(512)(layers.Dense(2048, activation="gelu")(x)))
    model = keras.Model(ids, layers.Dense(8000)(x))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    text = numpy.random.default_rng(0).integers(8000, size=(8, 129))
    return model, text[:, :-1], text[:, 1:]


def classifier() -> networks.Problem:
    """A convolutional network that ends in average pooling, a unit norm and a softmax."""
    blocks = []
    for _ in range(4):
        blocks += [layers.Conv2D(128, 3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    head = [layers.AveragePooling2D(32), layers.Flatten(), layers.UnitNormalization(), layers.Dense(1000, "softmax")]
    model = keras.Sequential([keras.Input((32, 32, 3)), *blocks, *head])
    model.compile("adam", "sparse_categorical_crossentropy")
    random = numpy.random.default_rng(0)
    return model, random.normal(size=(64, 32, 32, 3)).astype("float32"), random.integers(1000, size=64)


MODELS = {"language model": language_model, "classifier": classifier, "mlp": networks.mlp}


def batch(name: str, forced: bool | str) -> tuple[Callable[[], None], int]:
    """Returns a training step of a model, and the number of its layers forced to float32."""
    model, x, y = MODELS[name]()
    changed = tfmixed.force_float32(model) if forced else []
    if forced == "norms":
        changed += tfmixed.force_float32(model, NORMALIZATIONS)
    return (lambda: model.train_on_batch(x[:512], y[:512])), len(changed)


NORMALIZATIONS = [layers.LayerNormalization, layers.BatchNormalization]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_bfloat16")
    policy = parser.parse_args().policy
    keras.config.set_dtype_policy(policy)
    table = Table("layer, forward and backward", "Keras's, ms", "ours, ms", "ratio", title=policy)
    for name, (theirs, mine, shape) in PAIRS.items():
        first, second = medians(step(theirs(), shape), step(mine(), shape))
        table.add_row(name, f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}")
    Console().print(table)
    table = Table("training step", "as it is", "sensitive parts", "and normalizations", title=f"{policy}, ms")
    for name in MODELS:
        runs, changed = zip(*(batch(name, forced) for forced in (False, True, "norms")), strict=True)
        times = medians(*runs, rounds=7)
        cells = [f"{took:.1f} ({took / times[0]:.2f}), {n} layers" for took, n in zip(times, changed, strict=True)]
        table.add_row(name, f"{times[0]:.1f}", *cells[1:])
    Console().print(table)


if __name__ == "__main__":
    main()
