"""A network for each hazard: it trains wrong in float16, `audit` names the layer, `force_float32` repairs it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfmixed import LossScaleOptimizer, audit, force_float32

# NumPy's, when TensorFlow makes a constant of -1e9.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")
RANDOM = np.random.default_rng(0)


@keras.saving.register_keras_serializable("test_hazards_fixed")
class Energy(layers.Layer):
    """The norm of each row, by a plain function of TensorFlow."""

    def call(self, x):
        return x / _length(x)


def _length(x):
    return tf.sqrt(tf.reduce_sum(tf.square(x), axis=-1, keepdims=True))


@keras.saving.register_keras_serializable("test_hazards_fixed")
class Attention(layers.Layer):
    """Attention to the first positions, with custom masks and scores around a sublayer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.values = layers.Dense(8, name="values")

    def build(self, shape):
        self.values.build(shape)

    def call(self, x):
        scores = tf.matmul(x, x, transpose_b=True)
        mask = tf.cast(tf.range(tf.shape(x)[1]) < 4, x.dtype)
        scores += (1 - mask) * -1e9
        weights = tf.exp(scores)
        weights /= tf.reduce_sum(weights, axis=-1, keepdims=True) + 1e-9
        return tf.matmul(weights, self.values(x))


@keras.saving.register_keras_serializable("test_hazards_fixed")
class Counter(keras.Model):
    """A model whose own code computes a sum."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, "relu", name="hidden")
        self.head = layers.Dense(1, name="head")

    def call(self, x):
        h = self.hidden(x)
        return self.head(h / ops.sum(ops.exp(12.0 * h), axis=-1, keepdims=True))


def functional(shape, build, head=lambda: layers.Dense(1, name="head")):
    inputs = keras.Input(shape)
    return keras.Model(inputs, head()(build(layers.Activation("linear")(inputs))))


def counter():
    model = Counter(name="counter")
    model(np.ones((1, 8), "float32"))
    return model


def images(size, level):
    return (RANDOM.uniform(0.5, 1.5, size=(4, size, size, 2)) * level).astype("float32")


def rows(width, level):
    return (RANDOM.normal(size=(4, width)) * level).astype("float32")


# name: (function that creates the model, inputs, layer that the audit must name, operation that it must find)
CASES = {
    "a norm in a custom layer": (
        lambda: functional((100,), Energy(name="planted")),
        rows(100, 100.0),
        "planted",
        "norm",
    ),
    "a unit normalization": (
        lambda: functional((100,), layers.UnitNormalization(name="planted")),
        rows(100, 300.0),
        "planted",
        "norm",
    ),
    "a mask, an epsilon and an exponential": (
        lambda: functional((8, 8), lambda x: layers.Flatten()(Attention(name="planted")(x))),
        RANDOM.normal(size=(4, 8, 8)).astype("float32"),
        "planted",
        "constant",
    ),
    "a large pool": (
        lambda: functional((72, 72, 2), lambda x: layers.Flatten()(layers.AveragePooling2D(72, name="planted")(x))),
        images(72, 1.0),
        "planted",
        "average pooling",
    ),
    "a sum in a functional graph": (
        lambda: functional((8192,), lambda x: ops.log(ops.sum(ops.relu(x), axis=1, keepdims=True))),
        rows(8192, 100.0),
        None,
        "sum",
    ),
    "a model's own code": (counter, rows(8, 1.0), "counter", "exp"),
    "a softmax of many": (
        lambda: functional((4,), layers.Dense(70_000, "softmax", name="planted"), lambda: layers.Activation("linear")),
        rows(4, 0.01),
        "planted",
        "softmax",
    ),
}


def trained(make, x, policy, forced=False):
    """Returns what a model predicts after some steps, what was forced, and the model."""
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    model = make()
    changed = force_float32(model) if forced else []
    y = np.ones(model(x).shape, "float32") / model(x).shape[-1]
    model.compile(LossScaleOptimizer(keras.optimizers.SGD(0.01), 128), loss="mae", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(x, y)
    return ops.convert_to_numpy(model(x)).astype("float64"), changed, model


FAST = ["a norm in a custom layer"]
PARAMETERS = [
    pytest.param(*case, marks=() if name in FAST else pytest.mark.slow, id=name) for name, case in CASES.items()
]


@pytest.mark.parametrize(("make", "x", "layer", "op"), PARAMETERS)
def test_hazards_are_found_and_repaired(make, x, layer, op, tmp_path):
    """Wrong in float16, found, right after `force_float32` and after loading, and without a severe finding then."""
    right, _, _ = trained(make, x, "float32")
    wrong, _, model = trained(make, x, "mixed_float16")
    assert not np.allclose(wrong, right, rtol=0.1, atol=1e-6)
    severe = [(finding.layer, finding.op) for finding in audit(model).of("severe")]
    assert op in [found for path, found in severe if layer in (None, path)]
    repaired, changed, model = trained(make, x, "mixed_float16", forced=True)
    assert changed
    np.testing.assert_allclose(repaired, right, rtol=0.02, atol=1e-6)
    assert audit(model, x).of("severe") == []
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(ops.convert_to_numpy(again(x)).astype("float64"), repaired, rtol=1e-3, atol=1e-7)
    assert audit(again).of("severe") == []
