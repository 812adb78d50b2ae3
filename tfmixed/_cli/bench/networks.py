"""Networks of `tfmixed bench`, with data that they can learn.

Each function returns a model compiled under the current dtype policy, inputs and targets. `tfmixed bench --model` takes
a user's function with the same results.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy
from keras import layers

# A compiled model, inputs and targets.
Problem = tuple[keras.Model, Any, Any]

# Batch sizes by function, for steps of about 0.1 seconds on two CPU cores, and of about a millisecond for `tabular`.
BATCHES = {"mlp": 512, "cnn": 64, "transformer": 8, "depthwise": 32, "tabular": 32}
_CLASSES = 16


def mlp(samples: int = 2048, width: int = 2048, depth: int = 6) -> Problem:
    """An MLP of `depth` dense layers of `width` units, bound by matrix products."""
    hidden = [layers.Dense(width, activation="relu") for _ in range(depth)]
    model = keras.Sequential([keras.Input((width,)), *hidden, *_classifier()])
    x = _random().normal(size=(samples, width)).astype("float32")
    # The class is the index of the largest random projection, which a linear layer can learn.
    return _compiled(model), x, (x @ _random().normal(size=(width, _CLASSES))).argmax(axis=-1)


def tabular(samples: int = 4096, width: int = 64) -> Problem:
    """Three small dense layers, bound by what a step costs in any model."""
    return mlp(samples, width, depth=2)


def cnn(samples: int = 256, side: int = 32, channels: int = 128, depth: int = 4) -> Problem:
    """A network of 3 x 3 convolutions with batch normalization, bound by arithmetic."""
    blocks: list[Any] = []
    for _ in range(depth):
        blocks += [
            layers.Conv2D(channels, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    return _image_classifier(blocks, samples, side)


def depthwise(samples: int = 128, side: int = 32, channels: int = 128, depth: int = 6) -> Problem:
    """A network of depthwise convolutions with layer normalization, bound by memory."""
    blocks: list[Any] = [layers.Conv2D(channels, 1)]
    for _ in range(depth):
        blocks += [
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.LayerNormalization(),
            layers.ReLU(),
        ]
    return _image_classifier(blocks, samples, side)


def transformer(
    samples: int = 32, tokens: int = 128, width: int = 512, depth: int = 4, heads: int = 8, vocabulary: int = 8000
) -> Problem:
    """A language model with causal attention and a softmax over the vocabulary."""
    inputs = keras.Input((tokens,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(inputs)
    for _ in range(depth):
        attended = layers.LayerNormalization()(x)
        x += layers.MultiHeadAttention(heads, width // heads)(attended, attended, use_causal_mask=True)
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x += layers.Dense(width)(hidden)
    logits = layers.Dense(vocabulary)(layers.LayerNormalization()(x))
    model = keras.Model(inputs, layers.Activation("linear", dtype="float32")(logits))
    # Each token determines the next one.
    follower = _random().permutation(vocabulary)
    text = numpy.empty((samples, tokens + 1), "int32")
    text[:, 0] = _random().integers(vocabulary, size=samples)
    for place in range(tokens):
        text[:, place + 1] = follower[text[:, place]]
    return _compiled(model), text[:, :-1], text[:, 1:]


def _random() -> numpy.random.Generator:
    return numpy.random.default_rng(0)


def _classifier() -> list[Any]:
    return [layers.Dense(_CLASSES), layers.Activation("linear", dtype="float32")]


def _image_classifier(blocks: list[Any], samples: int, side: int) -> Problem:
    """Returns a classifier made of `blocks`, and images that are the pattern of their class plus noise."""
    model = keras.Sequential([keras.Input((side, side, 3)), *blocks, layers.GlobalAveragePooling2D(), *_classifier()])
    random = _random()
    y = random.integers(_CLASSES, size=samples)
    patterns = random.normal(size=(_CLASSES, side, side, 3))
    return _compiled(model), (patterns[y] + random.normal(size=(samples, side, side, 3))).astype("float32"), y


def _compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss=loss)
    return model
