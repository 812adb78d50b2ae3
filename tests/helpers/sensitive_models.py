"""Models that go wrong in half precision, with an input and the expected report of `force_float32`."""

from __future__ import annotations

import functools

import keras
import numpy as np
from keras import layers, ops

LOGITS = np.array([[0.0, -4.0, -18.0, -30.0], [2.0, 2.0, 2.0, -20.0]], "float32")
UNEVEN = np.random.default_rng(0).uniform(0.5, 1.5, (2, 500)).astype("float32")
STEPS = np.stack([LOGITS, LOGITS + 1.0, LOGITS - 1.0], axis=1)
dense = functools.partial(layers.Dense, kernel_initializer="identity")
registered = keras.saving.register_keras_serializable("sensitive_models")


def strict(a, b):
    """Adds as TensorFlow does: without mixing dtypes."""
    assert a.dtype == b.dtype, f"{a.dtype} and {b.dtype}"
    return a + b


@registered
class Block(keras.layers.Layer):
    """A user's code around sublayers in a list and in a dict, and attention."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(4, name="first"), layers.Dense(4, name="second")]
        self.gates = {"gate": layers.Dense(4, "softmax", name="gate")}
        self.mha = layers.MultiHeadAttention(1, 4, name="mha")

    def build(self, shape):
        for part in [*self.parts, *self.gates.values()]:
            part.build(shape)
        self.mha.build(shape, shape)

    def call(self, x):
        mixed = strict(self.parts[0](x), self.parts[1](x))
        attended, _ = self.mha(x, x, return_attention_scores=True)
        return strict(mixed * self.gates["gate"](x), attended)


@registered
class Powers(keras.layers.Layer):
    """A hazard in a user's code, around a sublayer that is made in `build`."""

    def build(self, shape):
        self.scale = dense(shape[-1], name="scale")
        self.scale.build(shape)
        self.offset = self.add_weight(shape=(), initializer="ones", name="offset")

    def call(self, x):
        y = strict(self.scale(x), ops.convert_to_tensor(self.offset) * ops.ones_like(self.scale(x)))
        return y / ops.sqrt(ops.sum(ops.square(y), axis=-1, keepdims=True))


@registered
class Cell(keras.layers.Layer):
    """A recurrent cell with a hazard of its own."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = self.output_size = units

    def call(self, x, states):
        y = ops.sqrt(ops.sqrt(ops.exp(ops.minimum(x, 0.0) - 30.0)))
        return y, [strict(states[0], y)]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@registered
class Classifier(keras.Model):
    """A subclassed model; its own graph inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(name="block")
        graph = [keras.Input((4,)), layers.Dense(4, "tanh"), layers.Softmax(name="inner")]
        self.graph = keras.Sequential(graph, name="graph")
        self.predictions = dense(4, activation="softmax", name="predictions")

    def call(self, x):
        hidden = strict(ops.mean(self.block(x), axis=1), self.graph(x[:, 0]))
        return self.predictions(strict(ops.cast(x[:, 0], hidden.dtype), hidden * 0.0))


@registered
class Embedded(keras.Model):
    """A functional model with a constructor of its own."""

    def __init__(self, width=4, **kwargs):
        inputs = keras.Input((width,))
        super().__init__(inputs, dense(width, activation="softmax", name="predictions")(inputs), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}


def through(layer, x, **kwargs):
    inputs = keras.Input(x.shape[1:], **kwargs)
    return keras.Model(inputs, layer(inputs)), x


def nested():
    return through(nest(), LOGITS)


def nest():
    inner = keras.Sequential([keras.Input((4,)), dense(4, activation="softmax", name="p")], name="inner")
    middle_in = keras.Input((4,))
    return keras.Model(middle_in, inner(middle_in), name="middle")


def shared():
    inputs, softmax = keras.Input((4,)), layers.Softmax(name="softmax")
    return keras.Model(inputs, [softmax(inputs), softmax(inputs - 1.0)]), LOGITS


def masked():
    inputs = keras.Input((1000, 1))
    x = layers.GlobalAveragePooling1D(name="pool")(layers.Masking(name="masking")(inputs))
    return keras.Model(inputs, [x, layers.Activation("linear", dtype="float32")(inputs)]), np.full((1, 1000, 1), 99.0)


def normalized():
    layer = layers.Normalization(mean=[1e5] * 4, variance=[1e4] * 4, name="normalization")
    return through(layer, LOGITS + 1e5)


def adapted():
    layer = layers.Normalization(name="normalization")
    layer.adapt(LOGITS * 7.3)
    return through(layer, LOGITS * 7.3)


def operation(function, x, expected):
    def make():
        half = layers.Activation("linear", name="half")
        return through(lambda inputs: function(half(inputs)), x)

    return make, expected


def called(model, x):
    model(x)
    return model, x


# name: (makes a model and its input, expected report)
SENSITIVE = {
    "softmax": (lambda: through(layers.Softmax(name="softmax"), LOGITS), ["softmax"]),
    "activation": (lambda: through(layers.Activation("softmax", name="softmax"), LOGITS), ["softmax"]),
    "dense": (lambda: through(dense(4, activation="softmax", name="p"), LOGITS), ["p: activation"]),
    "dense of a layer": (
        lambda: through(dense(4, activation=layers.Softmax(name="softmax"), name="p"), LOGITS),
        ["p: output", "p/softmax"],
    ),
    "exponential": (lambda: through(dense(4, activation="exponential", name="e"), -LOGITS), ["e: activation"]),
    "final sigmoid": (lambda: through(dense(4, activation="sigmoid", name="p"), LOGITS), ["p: activation"]),
    "final linear": (
        lambda: through(layers.EinsumDense("ab,bc->ac", 4, kernel_initializer="identity", name="p"), LOGITS),
        ["p: output"],
    ),
    "final reshape": (
        lambda: (
            keras.Sequential(
                [keras.Input((4,)), dense(4, activation="softmax", name="p"), layers.Reshape((2, 2), name="r")]
            ),
            LOGITS,
        ),
        ["p: activation", "r"],
    ),
    "unit": (lambda: through(layers.UnitNormalization(name="unit"), np.full((1, 100), 300.0)), ["unit"]),
    "pooling": (lambda: through(layers.AveragePooling1D(500, name="pool"), UNEVEN[..., None] * 100), ["pool"]),
    "cosine": (
        lambda: (
            keras.Model(i := keras.Input((4,)), layers.Dot(1, normalize=True, name="dot")([i, i + 1.0])),
            LOGITS * 1000,
        ),
        ["dot"],
    ),
    "masked": (masked, ["pool"]),
    "normalization": (normalized, ["normalization"]),
    "adapted": (adapted, ["normalization"]),
    "attention": (
        lambda: (keras.Model(i := keras.Input((3, 4)), layers.Attention(name="attention")([i, i])), STEPS / 2),
        ["attention"],
    ),
    "additive attention": (
        lambda: (keras.Model(i := keras.Input((3, 4)), layers.AdditiveAttention(name="attention")([i, i])), STEPS / 2),
        ["attention"],
    ),
    "time distributed": (
        lambda: through(layers.TimeDistributed(dense(4, activation="softmax", name="p"), name="td"), STEPS),
        ["td/p: activation"],
    ),
    "time distributed model": (
        lambda: through(layers.TimeDistributed(nest(), name="td"), STEPS),
        ["td/middle/inner/p: activation"],
    ),
    "nested": (nested, ["middle/inner/p: activation"]),
    "shared": (shared, ["softmax"]),
    "functional subclass": (lambda: (Embedded(), LOGITS), ["predictions: activation"]),
    "ops.sum": operation(lambda x: ops.sum(x, axis=1), np.ones((2, 70_000)), ["sum"]),
    "ops.sum of squares": operation(
        lambda x: ops.sum(ops.square(x), axis=-1), np.full((2, 4), 300.0), ["square", "sum"]
    ),
    "ops.softmax": operation(ops.softmax, LOGITS, ["softmax"]),
    "ops.logsumexp": operation(lambda x: ops.logsumexp(x, axis=1), UNEVEN, ["logsumexp"]),
    "ops.norm": operation(ops.norm, np.full((2, 4), 300.0), ["norm"]),
    "ops.cumsum": operation(lambda x: ops.cumsum(x, axis=1), UNEVEN, ["cumsum"]),
    "ops.prod": operation(lambda x: ops.prod(x, axis=1), np.full((2, 4), 30.0), ["prod"]),
    "ops.exp": operation(ops.exp, -LOGITS, ["exp"]),
    "classifier": (
        lambda: called(Classifier(name="classifier"), STEPS),
        [
            "block/gate: activation",
            "block/mha/softmax",
            "graph/inner",
            "predictions: activation",
            "classifier: output",
        ],
    ),
}
