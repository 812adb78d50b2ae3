"""Attention with float32 scores: values, gradients, dtypes, masks, and saved models."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest
from backend import BACKEND, gradient
from keras import ops
from thorough import covering

from tfmixed import layers

numpy = ops.convert_to_numpy
# Nothing is rounded: 1/sqrt(HEAD) is a power of two, and all projections are parts of the identity.
HEAD, WIDTH = 16, 64


def dtype(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def inputs(batch=2, steps=5):
    """Small integers and a 256 in each head: products pass 65504 before they are scaled, and differ by single units."""
    x = np.random.default_rng(0).integers(-3, 4, (batch, steps, WIDTH)).astype("float32")
    x[..., ::HEAD] = 256.0
    return x


class Identity(keras.initializers.Initializer):
    """The identity, or its first columns, in the shape of a projection."""

    def __call__(self, shape, dtype=None):
        flat = (WIDTH, int(np.prod(shape)) // WIDTH)
        return ops.cast(ops.reshape(ops.eye(*flat), shape), dtype)

    def get_config(self):
        return {}


def multi_head(kind, **arguments):
    return kind.MultiHeadAttention(4, HEAD, use_bias=False, kernel_initializer=Identity(), **arguments)


def grouped(kind, **arguments):
    return kind.GroupQueryAttention(HEAD, 4, 2, use_bias=False, kernel_initializer=Identity(), **arguments)


CAUSAL = np.tril(np.ones((5, 5), bool))
MASK = np.array([[True, True, False, True, True], [True, True, True, False, False]])[:, None] & np.ones((5, 1), bool)
NEAR = np.abs(np.arange(5)[:, None] - np.arange(5)) < 2
# Arguments of the layer and of its call, and the resulting mask.
PATHS = {
    "fused": ({}, {}, True),
    "fused, causal": ({}, {"use_causal_mask": True}, CAUSAL),
    "fused, masked": ({}, {"attention_mask": MASK}, MASK),
    "fused, masked, causal": ({}, {"attention_mask": MASK, "use_causal_mask": True}, MASK & CAUSAL),
    "fused, windowed": ({"sliding_window": 2}, {}, NEAR),
    "scores": ({}, {"return_attention_scores": True}, True),
    "scores, causal": ({}, {"return_attention_scores": True, "use_causal_mask": True}, CAUSAL),
    "scores, masked": ({}, {"return_attention_scores": True, "attention_mask": MASK}, MASK),
    "dropout": ({"dropout": 0.5}, {}, True),
    "dropout, masked": ({"dropout": 0.5}, {"attention_mask": MASK}, MASK),
    "dropout, scores": ({"dropout": 0.5}, {"return_attention_scores": True}, True),
}
LAYERS = {"multi_head": multi_head, "grouped": grouped}
POLICIES = ["mixed_float16", "mixed_bfloat16", "float16"]
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
paths_and_layers = pytest.mark.parametrize(("path", "make"), covering(1, PATHS, LAYERS))


def reference(make, x, mask):
    """Returns outputs and scores in float64."""
    query = x.astype("float64").reshape(*x.shape[:2], 4, HEAD)
    key = query if make is multi_head else np.repeat(query[:, :, :2], 2, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(HEAD)
    mask = np.broadcast_to(mask, (len(x), 5, 5))[:, None]
    powers = np.where(mask, np.exp(logits - np.where(mask, logits, -np.inf).max(axis=-1, keepdims=True)), 0)
    scores = powers / powers.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", scores, key).reshape(x.shape), scores


def both(outputs):
    """Returns outputs and scores, None where there are none."""
    return outputs if isinstance(outputs, list | tuple) else (outputs, None)


@pytest.mark.slow
@paths_and_layers
def test_keras_layers_fail_in_float16(make, path):
    """On every path but the fused functions of JAX and PyTorch on CPUs."""
    arguments, called, mask = path
    layer, x = make(keras.layers, dtype="mixed_float16", **arguments), inputs()
    error = np.abs(numpy(both(layer(x, x, **called))[0]).astype("float64") - reference(make, x, mask)[0]).max()
    right = BACKEND != "tensorflow" and not arguments.get("dropout") and "return_attention_scores" not in called
    assert right == (error < 0.1)


@pytest.mark.parametrize(("path", "make", "policy"), covering(1, PATHS, LAYERS, POLICIES))
def test_scores_are_those_of_float32(make, path, policy):
    """Compared with float64; outputs are rounded to the dtype of the policy, and scores are float32."""
    arguments, called, mask = path
    keras.config.set_dtype_policy(policy)
    layer, x = make(layers, **arguments), inputs()
    outputs, scores = both(layer(x, x, **called))
    expected, expected_scores = reference(make, x, mask)
    epsilon = float(ml_dtypes.finfo(layer.compute_dtype).eps)
    assert dtype(outputs) == layer.compute_dtype
    np.testing.assert_allclose(numpy(ops.cast(outputs, "float32")), expected, rtol=epsilon, atol=4 * epsilon)
    if scores is not None:
        assert dtype(scores) == "float32"
        np.testing.assert_allclose(numpy(scores), expected_scores, rtol=1e-5, atol=1e-7)


@paths_and_layers
def test_symbolic_outputs_have_the_dtypes_of_eager_ones(make, path):
    """And their shapes."""
    arguments, called, _ = path
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = make(layers, **arguments), keras.Input((5, WIDTH))
    called = {name: value for name, value in called.items() if name != "attention_mask"}
    real, symbolic = both(layer(inputs(), inputs(), **called)), both(layer(x, x, **called))
    for ours, promised in zip(real, symbolic, strict=True):
        assert ours is promised is None or (dtype(ours) == dtype(promised) and ours.shape[1:] == promised.shape[1:])


@paths_and_layers
def test_gradients_are_those_of_float32(make, path):
    """Up to the rounding of the half-precision projections."""
    arguments, called, _ = path
    x = ops.convert_to_tensor(inputs())
    weights = ops.cast(np.random.default_rng(1).normal(size=x.shape), "float32")

    def slope(layer):
        layer.build(x.shape, x.shape)
        return numpy(gradient(lambda x: ops.sum(ops.cast(both(layer(x, x, **called))[0], "float32") * weights), x))

    expected = slope(make(keras.layers, dtype="float32", **arguments))
    found = slope(make(layers, dtype="mixed_float16", **arguments))
    # PyTorch 2.13 reaches 5.0e-3 on CPUs without float16 products.
    np.testing.assert_allclose(found, expected, atol=6e-3 * np.abs(expected).max())


def test_two_attention_axes_and_gates_are_float32_too():
    """Images use the path with scores; a gate multiplies before the last projection."""
    x = inputs(1, 4).reshape(1, 2, 2, WIDTH)
    for arguments in ({"attention_axes": (1, 2)}, {"attention_axes": (1, 2), "use_gate": True}):
        expected = multi_head(keras.layers, dtype="float32", **arguments)(x, x)
        found = multi_head(layers, dtype="mixed_float16", **arguments)(x, x)
        np.testing.assert_allclose(numpy(ops.cast(found, "float32")), numpy(expected), rtol=1e-3, atol=4e-3)


def test_many_keys():
    """Over 70,000 equal keys, float16 scores of Keras are 0 or rounded, and averages of ones 0, 0.25 or 1.001."""
    arguments = {"use_bias": False, "kernel_initializer": "ones", "dtype": "mixed_float16"}
    query, keys = np.zeros((1, 1, 1), "float32"), np.ones((1, 70_000, 1), "float32")
    _, theirs = keras.layers.MultiHeadAttention(1, 1, **arguments)(query, keys, return_attention_scores=True)
    assert np.abs(numpy(theirs).astype("float64") * 70_000 - 1).min() > 1e-3
    ours = layers.MultiHeadAttention(1, 1, **arguments)
    output, scores = ours(query, keys, return_attention_scores=True)
    np.testing.assert_allclose(numpy(scores), np.full((1, 1, 1, 70_000), 1 / 70_000), rtol=1e-5)
    for average in (output, ours(query, keys)):  # the order of the sum depends on the machine
        np.testing.assert_allclose(numpy(average), 1.0, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask")  # by GroupQueryAttention of Keras 3.15
@each_layer
def test_masks_of_inputs_hide_keys(make):
    """Padding does not change the outputs."""
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.Input((None, WIDTH))
    masked = keras.layers.Masking()(x)
    model = keras.Model(x, make(layers)(masked, masked))
    bare = inputs()
    padded = np.concatenate([bare, np.zeros_like(bare)], axis=1)
    np.testing.assert_array_equal(numpy(model(padded))[:, :5], numpy(model(bare)))
    np.testing.assert_allclose(numpy(model(bare)), reference(make, bare, True)[0], rtol=1e-3, atol=4e-3)


@each_layer
def test_models_save_and_load(make, tmp_path):
    """Functional and subclassed, with the same outputs and dtypes under another policy."""
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.Input((5, WIDTH))
    functional = keras.Model(x, make(layers)(x, x, return_attention_scores=True))
    subclassed = SelfAttention(make(layers))
    subclassed(inputs())
    for number, model in enumerate((functional, subclassed)):
        model.save(tmp_path / f"{number}.keras")
    keras.config.set_dtype_policy("float32")
    for number, model in enumerate((functional, subclassed)):
        again = keras.models.load_model(tmp_path / f"{number}.keras", custom_objects={"Identity": Identity})
        outputs = zip(model(inputs()), again(inputs()), strict=True)
        for (before, after), name in zip(outputs, ("float16", "float32"), strict=True):
            assert dtype(before) == dtype(after) == name
            np.testing.assert_array_equal(numpy(before), numpy(after))


@keras.saving.register_keras_serializable("tests")
class SelfAttention(keras.Model):
    """A model that takes its layer as an argument."""

    def __init__(self, attention, **arguments):
        super().__init__(**arguments)
        self.attention = attention

    def call(self, x):
        return self.attention(x, x, return_attention_scores=True)

    def get_config(self):
        return {**super().get_config(), "attention": keras.saving.serialize_keras_object(self.attention)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "attention": keras.saving.deserialize_keras_object(config["attention"])})


@each_layer
def test_dropout_drops_in_training_only(make):
    """With `training` from the call and from an outer model."""
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = make(layers, dropout=0.5), inputs()
    steady = numpy(layer(x, x))
    np.testing.assert_array_equal(numpy(layer(x, x, training=False)), steady)
    model = keras.Sequential([keras.layers.Identity(), SelfAttention(layer)])
    for dropped in (layer(x, x, training=True), model(x, training=True)[0]):
        assert dtype(dropped) == "float16"
        assert (numpy(dropped) != steady).any()


@each_layer
def test_projections_stay_in_half_precision(make):
    """Their kernels are cast, and an input of 2,049 becomes 2,048."""
    keras.config.set_dtype_policy("mixed_float16")
    layer = make(layers)
    x = np.full((1, 1, WIDTH), 2049.0, "float32")
    assert isinstance(layer, keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention)
    np.testing.assert_array_equal(numpy(layer(x, x)), np.full((1, 1, WIDTH), 2048.0))


def test_flash_kernels_get_half_precision():
    """They accept nothing else, and compute the softmax in float32."""
    keras.config.set_dtype_policy("mixed_float16")
    x = inputs()
    for flash, expected in ((True, "float16"), (None, "float32")):
        layer = multi_head(layers, flash_attention=flash)
        layer.build(x.shape, x.shape)
        assert {dtype(part(x)) for part in (layer.query_dense, layer.key_dense, layer.value_dense)} == {expected}
