"""Compares the gradients of four small models in bfloat16 with float32, with and without float32 sums.

    python examples/fidelity.py [--policy mixed_bfloat16]

Each model runs one training step on random data. The largest error of a bias gradient is printed, beside the error that
rounding alone explains. The models are created under the same policy: in one run the backend sums gradients as it does
without tfmixed, in the other in float32, as `set_policy` makes it.
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.table import Table

import tfmixed


def mlp() -> tuple[keras.Input, keras.KerasTensor, int]:
    x = h = keras.Input((64,))
    for _ in range(3):
        h = layers.Dense(128, activation="relu")(h)
    return x, h, 2048


def conv1d() -> tuple[keras.Input, keras.KerasTensor, int]:
    x = keras.Input((256, 8))
    h = layers.Conv1D(32, 3, activation="gelu")(layers.Conv1D(32, 3, activation="relu")(x))
    return x, layers.GlobalAveragePooling1D()(h), 64


def depthwise() -> tuple[keras.Input, keras.KerasTensor, int]:
    x = keras.Input((32, 32, 16))
    h = layers.DepthwiseConv2D(3, activation="relu")(layers.Conv2D(32, 1, activation="relu")(x))
    return x, layers.GlobalAveragePooling2D()(h), 32


def transformer() -> tuple[keras.Input, keras.KerasTensor, int]:
    x = keras.Input((64,), dtype="int32")
    h = layers.Embedding(100, 32)(x)
    for _ in range(2):
        h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 16)(h, h))
        h = layers.LayerNormalization()(h + layers.Dense(32)(layers.Dense(64, activation="gelu")(h)))
    return x, layers.GlobalAveragePooling1D()(h), 64


def bias_error(build, policy: str, float32_sums: bool) -> tuple[float, float]:
    """Returns the largest error of a bias gradient, and the largest that rounding explains."""
    tfmixed.set_policy(policy, float32_sums=float32_sums)
    keras.utils.set_random_seed(0)
    inputs, features, batch = build()
    model = keras.Model(inputs, layers.Dense(10, dtype="float32")(features))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)
    shape = (batch, *inputs.shape[1:])
    x = random.normal(size=shape).astype("float32") if inputs.dtype == "float32" else random.integers(0, 100, shape)
    fidelity = tfmixed.gradient_fidelity(model, (x, random.integers(0, 10, batch)), batch_size=batch)
    biases = [row for row in fidelity if row.name.endswith("bias") and row.rounding < 0.5]  # attention keys are noise
    return max(row.error for row in biases), max(row.rounding for row in biases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="mixed_bfloat16", help="a half-precision policy")
    policy = parser.parse_args().policy
    table = Table("largest error of a bias gradient", "backend's sums", "float32 sums", "rounding alone")
    for build in (mlp, conv1d, depthwise, transformer):
        plain, _ = bias_error(build, policy, float32_sums=False)
        wide, rounding = bias_error(build, policy, float32_sums=True)
        table.add_row(build.__name__, *(f"{error:.1%}" for error in (plain, wide, rounding)))
    Console().print(table)


if __name__ == "__main__":
    main()
