from __future__ import annotations

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow, tf
from keras import ops

from tfmixed import layers

POLICIES = ["mixed_float16", "mixed_bfloat16", "float32", "float16"]


@pytest.fixture(params=POLICIES)
def policy(request):
    keras.config.set_dtype_policy(request.param)
    return keras.config.dtype_policy()


def dtype(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def softmax64(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


numpy = ops.convert_to_numpy
WIDE = "float16" if BACKEND == "jax" else "float64"  # JAX has no float64 unless told so
LOGITS = np.array([[0.0, -4.0, -18.0, -30.0], [2.0, 2.0, 2.0, -20.0]])


def test_keras_breaks_in_float16():
    """What the layers here are for: small probabilities become 0, and a sum of 70,000 ones is inf."""
    keras.config.set_dtype_policy("mixed_float16")
    assert (ops.convert_to_numpy(keras.layers.Softmax()(LOGITS)) == 0).any()
    assert np.isinf(ops.convert_to_numpy(ops.sum(ops.ones(70_000, "float16"))))


def test_values_are_those_of_float32_under_any_policy(policy):
    """Against float64 references, on inputs that break float16."""
    x = ops.cast(LOGITS, policy.compute_dtype)
    np.testing.assert_allclose(layers.Softmax()(x), softmax64(LOGITS), rtol=1e-5)
    ones = ops.ones((2, 70_000), policy.compute_dtype)
    np.testing.assert_array_equal(layers.Sum()(ones), [70_000.0, 70_000.0])
    tiny = ops.cast(np.array([[2.0**-24] + [0.0] * 99]), policy.compute_dtype)
    np.testing.assert_allclose(layers.Mean()(tiny), [2.0**-24 / 100], rtol=1e-6)
    wrapped = layers.Float32(keras.layers.UnitNormalization())(ops.full((1, 100), 300.0, policy.compute_dtype))
    np.testing.assert_allclose(wrapped, np.full((1, 100), 0.1), rtol=1e-5)


MAKE = {
    "Softmax": layers.Softmax,
    "Sum": layers.Sum,
    "Mean": layers.Mean,
    "Float32": lambda **arguments: layers.Float32(keras.layers.Dense(3), **arguments),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("output_dtype", [None, "compute", WIDE])
def test_output_dtype(make, output_dtype, policy):
    """None keeps float32, "compute" casts back, a name casts to it; in eager and in symbolic calls."""
    layer = make(output_dtype=output_dtype)
    expected = {None: "float32", "compute": policy.compute_dtype}.get(output_dtype, output_dtype)
    assert dtype(layer(np.ones((2, 4), "float32"))) == expected
    assert dtype(layer(keras.Input((4,)))) == expected


class SumOfSquares(keras.layers.Layer):
    """A user's layer that does not say what it returns: Keras traces it."""

    def call(self, x):
        return ops.sum(x * x, axis=-1)


@pytest.mark.parametrize(
    "inner",
    [SumOfSquares, lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])],
    ids=["custom", "model"],
)
def test_symbolic_calls_tell_the_dtype_of_real_ones(inner, policy):
    """Around layers that Keras has to trace, too: half-precision inputs, float32 outputs."""
    layer = layers.Float32(inner())
    x = keras.Input((4,), dtype=policy.compute_dtype)
    assert dtype(layer(x)) == dtype(layer(np.ones((1, 4), policy.compute_dtype))) == "float32"


class BuildsLater(keras.layers.Layer):
    """A user's layer that makes its sublayer in `build`."""

    def build(self, input_shape):
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("symbolic", [True, False])
def test_sublayers_made_late_are_float32_too(symbolic):
    """A sum of 70,000 ones, which float16 cannot hold."""
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = layers.Float32(BuildsLater()), np.ones((1, 70_000), "float32")
    inputs = keras.Input((70_000,))
    total = (keras.Model(inputs, layer(inputs)) if symbolic else layer)(x)
    assert (dtype(total), numpy(total)[0, 0]) == ("float32", 70_000.0)
    assert layer.layer.dense.compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "mixed_float16"


def test_time_distributed_takes_it():
    """It asks for the output shape alone."""
    layer = keras.layers.TimeDistributed(layers.Float32(keras.layers.Dense(3)))
    assert layer(keras.Input((5, 4))).shape == (None, 5, 3)


def test_attention_can_be_wrapped():
    """`build` of a layer with several inputs takes several shapes."""
    keras.config.set_dtype_policy("mixed_float16")
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float16")
    layer = layers.Float32(keras.layers.MultiHeadAttention(2, 4))
    assert dtype(layer(x, x)) == "float32"


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_output_dtype_is_known_by_its_class_too(make):
    """What Keras accepts as a dtype is kept under its name, which can be saved."""
    layer = make(output_dtype=np.dtype(WIDE))
    assert layer.get_config()["output_dtype"] == WIDE
    assert dtype(layer(np.ones((2, 4), "float32"))) == WIDE


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("output_dtype", ["int32", "half", 3])
def test_a_bad_output_dtype_is_named(make, output_dtype):
    """The message says what is possible."""
    with pytest.raises(ValueError, match=f'output_dtype must be None, "compute" or .* received {output_dtype!r}'):
        make(output_dtype=output_dtype)


@pytest.mark.parametrize("output_dtype", [None, "compute"])
def test_functional_models_save_and_load(tmp_path, output_dtype):
    """Same outputs, same dtypes, under another global policy too."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4)(inputs)
    outputs = [make(output_dtype=output_dtype)(hidden) for make in MAKE.values()]
    outputs.append(layers.Sum(axis=(1,), keepdims=True)(hidden))
    model = keras.Model(inputs, outputs)
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(3, 5))
    for ours, theirs in zip(again(x), model(x), strict=True):
        assert dtype(ours) == dtype(theirs)
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))


@needs_tensorflow
def test_sequential_models_train_with_finite_gradients():
    """Gradients flow back into the half-precision part."""
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), layers.Softmax(), layers.Sum(keepdims=True)])
    with tf.GradientTape() as tape:
        loss = ops.mean(model(np.full((2, 4), 100.0)))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(np.isfinite(gradient.numpy()).all() for gradient in gradients)


def test_masks_pass_through():
    """Softmax takes its mask argument; Float32 hands on the mask of its input to the layer and to its output."""
    keras.config.set_dtype_policy("mixed_float16")
    masked = layers.Softmax()(np.zeros((1, 4)), mask=np.array([[True, True, False, False]]))
    np.testing.assert_allclose(masked, [[0.5, 0.5, 0.0, 0.0]])
    ids = np.array([[1, 2, 0, 0]])
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(ids)
    pooled = layers.Float32(keras.layers.GlobalAveragePooling1D())(embedded)
    mean = numpy(embedded)[:, :2].mean(axis=1, dtype="float64")
    np.testing.assert_allclose(numpy(pooled), mean, rtol=1e-4)
    kept = layers.Float32(keras.layers.Activation("linear"))(embedded)
    np.testing.assert_array_equal(numpy(keras.src.backend.get_keras_mask(kept)), ids != 0)


def test_masks_reach_a_wrapped_lstm_in_a_saved_model(tmp_path):
    """Padding changes nothing, before and after a round trip through a file."""
    keras.config.set_dtype_policy("mixed_float16")
    ids = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(5, 4, mask_zero=True)(ids)
    model = keras.Model(ids, layers.Float32(keras.layers.LSTM(3))(embedded))
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        padded, bare = np.array([[1, 2, 3, 0, 0]]), np.array([[1, 2, 3]])
        np.testing.assert_allclose(numpy(each(padded)), numpy(model(bare)), rtol=1e-6)


def test_training_passes_through():
    """Dropout inside works in training and not in inference."""
    layer = layers.Float32(keras.layers.Dropout(0.5))
    x = np.ones((4, 100), "float32")
    assert (ops.convert_to_numpy(layer(x, training=True)) == 0).any()
    np.testing.assert_array_equal(layer(x, training=False), x)


def test_a_built_layer_keeps_its_weights():
    """Wrapping changes the dtype of the computation, nothing else."""
    keras.config.set_dtype_policy("mixed_float16")
    inner = keras.layers.Dense(3)
    half = inner(np.ones((1, 4)))
    kernel = inner.kernel.numpy()
    outer = layers.Float32(inner)
    assert dtype(half) == "float16"
    assert dtype(outer(np.ones((1, 4), "float32"))) == "float32"
    np.testing.assert_array_equal(outer.layer.kernel.numpy(), kernel)
    assert len(outer.trainable_weights) == 2


def test_sums_of_integers_are_float32():
    """Not in the integers' own type, which wraps."""
    total = layers.Sum()(np.full((1, 3), 100, "int8"))
    assert (dtype(total), float(total[0])) == ("float32", 300.0)
