"""Findings of `audit` for half-precision sums in the backward pass."""

from __future__ import annotations

import functools
import re
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from thorough import thorough

import tfmixed
from tfmixed._islands import gradient_sums

pytestmark = pytest.mark.filterwarnings("ignore:policy .* is slow here")
TERMS = 4096
FIRST = np.zeros(TERMS, "int32")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No layer of another test keeps float32 sums."""
    monkeypatch.setattr(gradient_sums, "_covered", weakref.WeakSet())


class Own(layers.Layer):
    """A custom layer that uses one weight."""

    def __init__(self, shape, function, **kwargs):
        super().__init__(**kwargs)
        self.shape, self.function = shape, function

    def build(self, input_shape):
        self.weight = self.add_weight(shape=self.shape, initializer="ones")

    def call(self, x):
        return self.function(x, self.weight)


def model_of(layer, shape=(TERMS, 8)):
    inputs = keras.Input(shape, batch_size=1)
    return keras.Model(inputs, layers.Dense(1, dtype="float32")(layer(inputs)))


def found(model):
    """Returns the findings about sums of gradients, and about scattered sums."""
    return [finding for finding in tfmixed.audit(model) if re.search("gradient|scattered", finding.op)]


# name: (shape of the weight, function, finding with the backend's sums, finding with float32 sums)
CASES = {
    "bias_add": ((8,), lambda x, w: tf.nn.bias_add(x, tf.convert_to_tensor(w)), "bias gradient", None),
    "gather": ((8, 3), lambda x, w: x + tf.transpose(tf.gather(w * 2, FIRST, axis=1)), "same index", None),
    "gather_nd": ((3, 8), lambda x, w: x + tf.gather_nd(w * 2, FIRST[:, None]), "same index", None),
    "cumsum": ((8,), lambda x, w: tf.cumsum(x * w, 1), "running sum", None),
    "resize": (
        (1, 1, 1, 8),
        lambda x, w: x + tf.reshape(tf.image.resize(w * 2, (64, 64), "nearest"), (1, -1, 8)),
        "repeated",
        None,
    ),
    "depthwise": (
        (1, 1, 8, 1),
        lambda x, w: tf.nn.depthwise_conv2d(tf.reshape(x, (1, 64, 64, 8)), tf.convert_to_tensor(w), [1] * 4, "SAME"),
        "kernel",
        None,
    ),
    "scan": (
        (8,),
        lambda x, w: tf.scan(functools.partial(lambda w, _, row: row * w, w * 2), x[0], x[0, 0]),
        "loop",
        "loop",
    ),
    "scan of a variable": ((8,), lambda x, w: tf.scan(lambda _, row: row * w, x[0], x[0, 0]), None, None),
    "windows": (
        (8,),
        lambda x, w: tf.nn.avg_pool(tf.reshape(x * w, (1, 64, 64, 8)), 32, 1, "SAME"),
        "windows over 1,024",
        "windows over 1,024",
    ),
    "segment_sum": (
        (8,),
        lambda x, w: tf.math.segment_sum((x * w)[0], FIRST),
        "same index",
        "same index",
    ),
}
HALF = {"bfloat16": (256, {"depthwise"}), "float16": (2048, {"bias_add", "windows"})}


@pytest.mark.parametrize("float32_sums", [False, True])
@pytest.mark.parametrize("half", ["bfloat16", pytest.param("float16", marks=thorough)])
@pytest.mark.parametrize("name", CASES)
def test_sums_are_found_with_their_terms_and_error(name, half, float32_sums):
    """In the layer that has them. Float32 sums leave those that have to be written differently."""
    shape, function, *expected = CASES[name]
    expected, (most, right) = expected[float32_sums], HALF[half]
    tfmixed.set_policy(f"mixed_{half}", promote=False, float32_sums=float32_sums)
    findings = found(model_of(Own(shape, function, name="own")))
    if expected is None or name in right:
        assert findings == []
        return
    (finding,) = findings
    assert (finding.layer, finding.dtype, finding.severity) == ("own", half, "warning")
    assert re.search(expected, finding.risk)
    assert f"stops growing at {most:,} times a term" in finding.risk
    assert finding.length is None or f"up to {100 * (1 - most / finding.length):.3g}% too small" in finding.risk
    assert ("force_float32" in finding.advice) == (CASES[name][3] is None)


def test_the_error_of_a_bias_gradient_is_that_of_the_step():
    """1 - 256 / 4,096 for equal terms."""
    tfmixed.set_policy("mixed_bfloat16", float32_sums=False)
    model = model_of(layers.Dense(8, use_bias=True, name="dense"))
    (finding,) = found(model)
    assert (finding.layer, finding.op, finding.length) == ("dense", "bias gradient", TERMS)
    assert "up to 93.8% too small" in finding.risk
    inputs = np.ones((1, TERMS, 8), "float32")
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.cast(model.get_layer("dense")(inputs), "float32"))
    bias = tape.gradient(total, model.get_layer("dense").bias.value)
    np.testing.assert_allclose(bias / TERMS, 1 - 0.9375)


@pytest.mark.parametrize(("length", "lengths"), [(1024, [1024]), (257, [257]), (256, [])])
def test_short_bias_gradients_are_not_reported(length, lengths):
    """A sum of 256 equal terms is exact."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert [finding.length for finding in found(model_of(layers.Dense(8), (length, 8)))] == lengths


@pytest.mark.parametrize("repair", ["set_policy", "force_float32"])
def test_the_advice_helps(repair):
    """A model with float32 sums has no bias gradient in half precision."""
    tfmixed.set_policy("mixed_bfloat16", float32_sums=repair == "set_policy")
    model = model_of(layers.Dense(8))
    if repair == "force_float32":
        assert found(model)
        tfmixed.set_policy("mixed_bfloat16")
        tfmixed.force_float32(model)
    assert found(model) == []


def test_convolutions_are_reported_with_their_exception():
    """The trace does not show that Grappler fuses a sum with the gradient of the kernel."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((32, 32, 3)), layers.Conv2D(4, 3), layers.Conv2DTranspose(4, 3)])
    convolution, transpose = sorted(found(model), key=lambda finding: finding.layer)
    assert "where no compiled step fuses it" in convolution.risk
    assert "fuses" not in transpose.risk


@pytest.mark.parametrize("kind", [layers.SimpleRNN, pytest.param(layers.GRU, marks=thorough)])
def test_weights_of_recurrent_layers_are_cast_within_the_loop(kind):
    """Their gradients are added up in float32 over the steps."""
    tfmixed.set_policy("mixed_bfloat16", promote=False)
    assert found(model_of(kind(4, return_sequences=True), (512, 8))) == []
