"""Trains a character-level Transformer on the texts of Python's `help()`, in any precision.

    python examples/transformer.py [--policy mixed_float16] [--scale dynamic] [--seed 0] [--steps 400]

Prints a sample and the bits per character on the last tenth of the text, which is not used for training, next to those
of models that count characters and pairs of characters. Scores, normalizations and loss are float32.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
from keras import ops

import tfmixed
from tfmixed import layers

LETTERS, TEXT = np.unique(list("".join(topics.values())), return_inverse=True)
TRAINING, HELD_OUT = np.split(TEXT, [len(TEXT) * 9 // 10])
CONTEXT, WIDTH, HEADS, BLOCKS, BATCH = 32, 64, 4, 2, 16


def build() -> keras.Model:
    text = keras.Input((CONTEXT,), dtype="int32")
    place = ops.cumsum(ops.ones_like(text), axis=1) - 1
    x = keras.layers.Embedding(len(LETTERS), WIDTH)(text) + keras.layers.Embedding(CONTEXT, WIDTH)(place)
    for _ in range(BLOCKS):
        normalized = layers.LayerNormalization()(x)
        x += layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(normalized, normalized, use_causal_mask=True)
        hidden = keras.layers.Dense(4 * WIDTH, "relu")(layers.LayerNormalization()(x))
        x += keras.layers.Dense(WIDTH)(hidden)
    return keras.Model(text, keras.layers.Dense(len(LETTERS))(layers.LayerNormalization()(x)))


def train(policy: str, scale: Any, steps: int, seed: int = 0) -> tuple[keras.Model, float]:
    """Returns the model and its bits per character on the held-out text."""
    keras.utils.set_random_seed(seed)
    tfmixed.set_policy(policy)
    model = build()
    optimizer = tfmixed.LossScaleOptimizer(keras.optimizers.Adam(5e-3), scale)
    model.compile(optimizer, tfmixed.losses.SparseCategoricalCrossentropy())
    starts = np.random.default_rng(seed).integers(len(TRAINING) - CONTEXT, size=(steps * BATCH, 1))
    pieces = TRAINING[starts + np.arange(CONTEXT + 1)]
    model.fit(pieces[:, :-1], pieces[:, 1:], batch_size=BATCH, shuffle=False, verbose=0)
    count = (len(HELD_OUT) - 1) // CONTEXT * CONTEXT
    text, targets = (HELD_OUT[place : place + count].reshape(-1, CONTEXT) for place in (0, 1))
    return model, model.evaluate(text, targets, batch_size=256, verbose=0) / np.log(2)


def counted() -> tuple[float, float]:
    """Returns the bits per character of models that count characters and pairs of characters in the training text."""
    pairs = np.ones((len(LETTERS), len(LETTERS)))  # no pair has probability 0
    np.add.at(pairs, (TRAINING[:-1], TRAINING[1:]), 1)
    alone, after = pairs.sum(axis=0) / pairs.sum(), pairs / pairs.sum(axis=1, keepdims=True)
    return -np.log2(alone[HELD_OUT[1:]]).mean(), -np.log2(after[HELD_OUT[:-1], HELD_OUT[1:]]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="mixed_float16", help="(default: %(default)s)")
    number = "a number, or dynamic (default)"
    parser.add_argument("--scale", default="dynamic", type=lambda x: x if x == "dynamic" else float(x), help=number)
    parser.add_argument("--steps", default=400, type=int, help="(default: %(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="(default: %(default)s)")
    arguments = parser.parse_args()
    model, bits = train(**vars(arguments))
    text, noise = list(HELD_OUT[:CONTEXT]), np.random.default_rng(arguments.seed).gumbel(size=(80, len(LETTERS)))
    for row in noise:  # Gumbel-max sampling from the softmax
        text.append((model.predict_on_batch(np.array([text[-CONTEXT:]]))[0, -1] + row).argmax())
    print("".join(LETTERS[text]))
    print("bits per character: characters {:.3f}, pairs {:.3f}, Transformer {:.3f}".format(*counted(), bits))


if __name__ == "__main__":
    main()
