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

# Batch sizes by function, for steps of about 0.1 seconds on two CPU cores.
BATCHES = {"mlp": 512, "cnn": 64, "transformer": 8, "depthwise": 32}
_CLASSES = 16


def mlp() -> Problem:
    """An MLP of six dense layers, bound by matrix products."""
    width = 2048
    hidden = [layers.Dense(width, activation="relu") for _ in range(6)]
    model = keras.Sequential([keras.Input((width,)), *hidden, *_classifier()])
    x = _random().normal(size=(2048, width)).astype("float32")
    # The class is the index of the largest random projection, which a linear layer can learn.
    return _compiled(model), x, (x @ _random().normal(size=(width, _CLASSES))).argmax(axis=-1)


def cnn() -> Problem:
    """A network of 3 x 3 convolutions with batch normalization, bound by arithmetic."""
    blocks: list[Any] = []
    for _ in range(4):
        blocks += [
            layers.Conv2D(128, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    return _image_classifier(blocks, samples=256)


def depthwise() -> Problem:
    """A network of depthwise convolutions with layer normalization, bound by memory."""
    blocks: list[Any] = [layers.Conv2D(128, 1)]
    for _ in range(6):
        blocks += [
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.LayerNormalization(),
            layers.ReLU(),
        ]
    return _image_classifier(blocks, samples=128)


def transformer() -> Problem:
    """A language model with causal attention and a softmax over the vocabulary."""
    samples, tokens, width, heads, vocabulary = 32, 128, 512, 8, 8000
    inputs = keras.Input((tokens,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(inputs)
    for _ in range(4):
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


def _image_classifier(blocks: list[Any], samples: int) -> Problem:
    """Returns a classifier made of `blocks`, and images that are the pattern of their class plus noise."""
    shape, random = (32, 32, 3), _random()
    model = keras.Sequential([keras.Input(shape), *blocks, layers.GlobalAveragePooling2D(), *_classifier()])
    y = random.integers(_CLASSES, size=samples)
    patterns = random.normal(size=(_CLASSES, *shape))
    return _compiled(model), (patterns[y] + random.normal(size=(samples, *shape))).astype("float32"), y


def _compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss=loss)
    return model
