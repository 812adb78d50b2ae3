"""Float32 layers: values, gradients, dtypes, masks, and saved models."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np
import pytest
from backend import BACKEND, WIDE, breaks_on_cpus, gradient
from keras import ops
from thorough import covering, few

from tfmixed import layers

POLICIES = ["mixed_float16", "mixed_bfloat16", "float32", "float16"]


@pytest.fixture(params=POLICIES)
def policy(request):
    keras.config.set_dtype_policy(request.param)
    return keras.config.dtype_policy()


def dtype(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


numpy = ops.convert_to_numpy


class Op(keras.layers.Layer):
    """A function as a Keras layer, which casts its inputs."""

    def __init__(self, function, **arguments):
        super().__init__(**arguments)
        self.function = function

    def call(self, x):
        return self.function(x, axis=-1)


def coarse(x):
    """Rounds to numbers that are exact in float16 and bfloat16."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype("float64")


def random(low, high, shape, seed=0):
    return coarse(np.random.default_rng(seed).uniform(low, high, shape))


def softmax64(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def logsumexp64(x):
    return x.max(axis=-1) + np.log(np.exp(x - x.max(axis=-1, keepdims=True)).sum(axis=-1))


def standardized64(x, axes, epsilon=1e-3):
    return (x - x.mean(axis=axes, keepdims=True)) / np.sqrt(x.var(axis=axes, keepdims=True) + epsilon)


def grouped64(x):
    return standardized64(x.reshape(2, 5, 2, 4), (1, 3)).reshape(2, 5, 8)


class Case(NamedTuple):
    """A layer, the Keras layer, a float64 reference, and inputs for which float16 is wrong by more than `error`."""

    ours: Callable
    keras: Callable
    reference: Callable
    x: np.ndarray
    error: float = 0.01
    right_on: tuple[str, ...] = ()  # backends on which the Keras layer only rounds


ROUNDED = 2e-5
UNIT = random(200, 300, (2, 100))
CASES = {
    "Softmax": Case(
        layers.Softmax,
        keras.layers.Softmax,
        softmax64,
        np.array([[0.0, -4.0, -18.0, -30.0], [2.0, 2.0, 2.0, -20.0]]),
    ),
    "LogSoftmax": Case(
        layers.LogSoftmax,
        lambda **arguments: Op(ops.log_softmax, **arguments),
        lambda x: x - logsumexp64(x)[:, None],
        random(0, 0.1, (1, 90_000)),
        right_on=("torch",),
    ),
    "LogSumExp": Case(
        layers.LogSumExp,
        lambda **arguments: Op(ops.logsumexp, **arguments),
        logsumexp64,
        random(0, 0.1, (1, 90_000)),
    ),
    "Sum": Case(
        layers.Sum,
        lambda **arguments: Op(ops.sum, **arguments),
        lambda x: x.sum(axis=-1),
        random(0.5, 1.5, (1, 90_000)),
    ),
    "Mean": Case(
        layers.Mean,
        lambda **arguments: Op(ops.mean, **arguments),
        lambda x: x.mean(axis=-1),
        np.array([[2.0**-24] + [0.0] * 99]),
    ),
    "UnitNormalization": Case(
        layers.UnitNormalization,
        keras.layers.UnitNormalization,
        lambda x: x / np.sqrt((x * x).sum(axis=-1, keepdims=True)),
        UNIT,
    ),
    "Float32": Case(
        lambda **arguments: layers.Float32(keras.layers.UnitNormalization(), **arguments),
        keras.layers.UnitNormalization,
        lambda x: x / np.sqrt((x * x).sum(axis=-1, keepdims=True)),
        UNIT,
    ),
    "LayerNormalization": Case(
        layers.LayerNormalization,
        keras.layers.LayerNormalization,
        lambda x: standardized64(x, -1),
        random(-300, 300, (2, 8)),
        ROUNDED,
    ),
    "RMSNormalization": Case(
        layers.RMSNormalization,
        keras.layers.RMSNormalization,
        lambda x: x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6),
        random(-300, 300, (2, 8)),
        ROUNDED,
    ),
    "BatchNormalization": Case(
        layers.BatchNormalization,
        keras.layers.BatchNormalization,
        lambda x: x / np.sqrt(1 + 1e-3),
        random(-300, 300, (2, 8)),
        ROUNDED,
    ),
    "GroupNormalization": Case(
        lambda **arguments: layers.GroupNormalization(2, **arguments),
        lambda **arguments: keras.layers.GroupNormalization(2, **arguments),
        grouped64,
        random(-300, 300, (2, 5, 8)),
        ROUNDED,
    ),
}
for rank, size in enumerate([1024, 32, 8], start=1):
    window, axes = (size,) * rank, tuple(range(1, rank + 1))
    name, shape = f"AveragePooling{rank}D", (1, *window, 2)
    CASES[name] = Case(
        lambda name=name, window=window, **arguments: getattr(layers, name)(window, **arguments),
        lambda name=name, window=window, **arguments: getattr(keras.layers, name)(window, **arguments),
        lambda x, axes=axes: x.mean(axis=axes, keepdims=True),
        random(150, 250, shape),
        right_on=("torch",) if rank < 3 else (),
    )
    CASES[f"Global{name}"] = Case(
        getattr(layers, f"Global{name}"),
        getattr(keras.layers, f"Global{name}"),
        lambda x, axes=axes: x.mean(axis=axes),
        random(150, 250, (1, *(7,) * rank, 2)),
        ROUNDED,
    )

every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_layer_has_a_case():
    """Except attention, which has its own file."""
    assert set(CASES) == set(layers.__all__) - {"MultiHeadAttention", "GroupQueryAttention"}


def error(layer, x, expected):
    """Returns the largest relative error, or inf for nonfinite values and missing kernels."""
    try:
        values = numpy(layer(x)).astype("float64")
    except Exception as missing:
        assert "find device for node" in str(missing) or "not implemented for 'Half'" in str(missing)  # noqa: PT017 - other exceptions are bugs
        return np.inf
    return np.nan_to_num(np.abs(values / expected - 1), nan=np.inf).max()


@pytest.mark.slow
@breaks_on_cpus
@every_layer
def test_keras_breaks_in_float16(case):
    """By one percent or more, or by rounding if Keras computes in float32."""
    layer = case.keras(dtype="mixed_float16")
    bar = ROUNDED if BACKEND in case.right_on else case.error
    assert error(layer, ops.cast(case.x, "float16"), case.reference(case.x)) > bar


@every_layer
def test_values_are_those_of_float32_under_any_policy(case, policy):
    """Compared with float64, for inputs that fail in float16."""
    x = ops.cast(case.x, policy.compute_dtype)
    layer = case.ours()
    assert error(layer, x, case.reference(case.x)) < 1e-5
    assert {variable.dtype for variable in layer.variables} <= {"float32"}


@every_layer
def test_float32_inputs_are_not_rounded(case):
    """In a float16 model."""
    keras.config.set_dtype_policy("mixed_float16")
    x = (case.x * (1 + np.random.default_rng(1).uniform(0, 2**-10, case.x.shape))).astype("float32")
    assert error(case.ours(), ops.convert_to_tensor(x), case.reference(x.astype("float64"))) < 1e-5


def slope(layer, x, weights):
    """Returns the gradient of a weighted sum of the outputs."""
    return numpy(gradient(lambda x: ops.sum(layer(x) * ops.cast(weights, layer(x).dtype)), x)).astype("float64")


@pytest.mark.parametrize(("case", "inputs"), covering(1, CASES, ["float16", "float32"]))
def test_gradients_are_those_of_float32(case, inputs):
    """Compared with the Keras layer in float64; those of float16 inputs are rounded to float16."""
    keras.config.set_dtype_policy("mixed_float16")
    # TensorFlow has no float64 kernel for volumes on CPUs.
    reference = "float32" if BACKEND == "jax" or isinstance(case.ours(), layers.AveragePooling3D) else "float64"
    weights = random(-100, 100, case.reference(case.x).shape, seed=1)
    expected = slope(case.keras(dtype=reference), ops.convert_to_tensor(case.x, reference), weights)
    found = slope(case.ours(), ops.convert_to_tensor(case.x, inputs), weights)
    scale = np.abs(expected).max()
    assert scale > 0
    np.testing.assert_allclose(found, expected, **GRADIENT[inputs](scale))


GRADIENT = {
    "float32": lambda scale: {"rtol": 1e-4, "atol": 1e-6 * scale},
    "float16": lambda scale: {"rtol": 1e-3, "atol": 1e-6 * scale + 2.0**-24},
}


@pytest.mark.parametrize(("case", "output_dtype", "policy"), covering(1, CASES, [None, "compute", WIDE], POLICIES))
def test_output_dtype(case, output_dtype, policy):
    """None keeps float32, "compute" casts to the policy's dtype, a name to that dtype; eager and symbolic."""
    keras.config.set_dtype_policy(policy)
    layer, x = case.ours(output_dtype=output_dtype), case.x
    compute_dtype = keras.config.dtype_policy().compute_dtype
    expected = {None: "float32", "compute": compute_dtype}.get(output_dtype, output_dtype)
    real, symbolic = layer(ops.cast(x, "float32")), layer(keras.Input(x.shape[1:]))
    assert dtype(real) == dtype(symbolic) == expected
    assert real.shape[1:] == symbolic.shape[1:]


class SumOfSquares(keras.layers.Layer):
    """A custom layer without output shape, which Keras traces."""

    def call(self, x):
        return ops.sum(x * x, axis=-1)


@pytest.mark.parametrize(
    "inner",
    [SumOfSquares, lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])],
    ids=["custom", "model"],
)
def test_symbolic_outputs_have_the_dtype_of_eager_ones(inner, policy):
    """Also around layers that Keras has to trace: half-precision inputs, float32 outputs."""
    layer = layers.Float32(inner())
    x = keras.Input((4,), dtype=policy.compute_dtype)
    assert dtype(layer(x)) == dtype(layer(np.ones((1, 4), policy.compute_dtype))) == "float32"


class BuildsLater(keras.layers.Layer):
    """A custom layer that creates its sublayer in `build`."""

    def build(self, input_shape):
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("symbolic", [True, False])
def test_sublayers_created_in_build_are_float32(symbolic):
    """A sum of 70,000 ones, which overflows in float16."""
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = layers.Float32(BuildsLater()), np.ones((1, 70_000), "float32")
    inputs = keras.Input((70_000,))
    total = (keras.Model(inputs, layer(inputs)) if symbolic else layer)(x)
    assert (dtype(total), numpy(total)[0, 0]) == ("float32", 70_000.0)
    assert layer.layer.dense.compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "mixed_float16"


class BuildsHalf(BuildsLater):
    """Another one, whose sublayer has a half-precision policy."""

    def build(self, input_shape):
        self.dense = keras.layers.Dense(1, kernel_initializer="ones", dtype="mixed_float16")
        self.dense.build(input_shape)


def test_sublayers_created_in_build_with_another_policy_are_float32():
    """Whatever the code of the wrapped layer sets."""
    layer = layers.Float32(BuildsHalf())
    assert numpy(layer(np.ones((1, 70_000), "float32")))[0, 0] == 70_000.0
    assert layer.layer.dense.compute_dtype == "float32"


def test_time_distributed_accepts_it():
    """It needs the output shape only."""
    layer = keras.layers.TimeDistributed(layers.Float32(keras.layers.Dense(3)))
    assert layer(keras.Input((5, 4))).shape == (None, 5, 3)


def test_attention_can_be_wrapped():
    """The `build` method of a layer with several inputs takes several shapes."""
    keras.config.set_dtype_policy("mixed_float16")
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float16")
    layer = layers.Float32(keras.layers.MultiHeadAttention(2, 4))
    assert dtype(layer(x, x)) == "float32"


@pytest.mark.parametrize("make", [layers.Softmax, layers.Mean])
def test_output_dtype_can_be_a_numpy_dtype(make):
    """The config holds its name."""
    layer = make(output_dtype=np.dtype(WIDE))
    assert layer.get_config()["output_dtype"] == WIDE
    assert dtype(layer(ops.ones((1, 2), "float32"))) == WIDE


@every_layer
@pytest.mark.parametrize("output_dtype", ["int32", "half", 3])
def test_a_bad_output_dtype_is_refused(case, output_dtype):
    """The error names the argument."""
    with pytest.raises(ValueError, match="output_dtype"):
        case.ours(output_dtype=output_dtype)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A model that takes its layer as an argument."""

    def __init__(self, layer, **arguments):
        super().__init__(**arguments)
        self.before, self.layer = keras.layers.Activation("linear"), layer

    def call(self, x):
        return self.layer(self.before(x))

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "layer": keras.saving.deserialize_keras_object(config["layer"])})


def functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(keras.layers.Activation("linear")(inputs)))


MODELS = {
    "functional": functional,
    "sequential": lambda layer, shape: keras.Sequential([keras.Input(shape), keras.layers.Activation("linear"), layer]),
    "subclassed": lambda layer, _: Subclassed(layer),
}


@pytest.mark.parametrize(("case", "output_dtype", "model"), covering(1, CASES, [None, "compute"], MODELS))
def test_models_save_and_load(case, output_dtype, model, tmp_path):
    """Every kind of model returns the outputs of the layer; a loaded one under another policy, too."""
    keras.config.set_dtype_policy("mixed_float16")
    layer, x = case.ours(output_dtype=output_dtype), case.x
    first = model(layer, x.shape[1:])
    outputs = first(ops.cast(x, "float32"))
    assert dtype(outputs) == ("float16" if output_dtype else "float32")
    np.testing.assert_allclose(numpy(outputs), numpy(layer(ops.cast(x, "float16"))), rtol=1e-6)
    first.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")(ops.cast(x, "float32"))
    assert dtype(again) == dtype(outputs)
    np.testing.assert_array_equal(numpy(again), numpy(outputs))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: layers.Sum(axis=(1,), keepdims=True), [[[4.0, 6.0]]]),
        (lambda: layers.LogSoftmax(axis=1), [[[-2.126928] * 2, [-0.126928] * 2]]),
        (lambda: layers.Softmax(axis=(1, 2)), [[[0.032059, 0.087144], [0.236883, 0.643914]]]),
    ],
)
def test_axes_are_saved(make, expected, tmp_path):
    """If they are not the default."""
    model, x = functional(make(), (2, 2)), np.array([[[1.0, 2.0], [3.0, 4.0]]])
    model.save(tmp_path / "model.keras")
    for saved_or_loaded in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(numpy(saved_or_loaded(x)), expected, rtol=2e-5)


@pytest.mark.parametrize("policy", few(["mixed_float16"], {policy: policy for policy in POLICIES}))
def test_models_train(policy):
    """Islands between half-precision layers: losses are finite and decrease."""
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.GroupNormalization(2),
            keras.layers.Activation("relu"),
            layers.AveragePooling2D(2),
            layers.GlobalAveragePooling2D(),
            layers.LayerNormalization(),
            keras.layers.Dense(3),
            layers.Softmax(),
        ]
    )
    x, y = random(-1, 1, (12, 8, 8, 1)).astype("float32"), np.arange(12) % 3
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    losses = model.fit(x, y, epochs=3, batch_size=12, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_masks_pass_through():
    """Float32 passes the mask of its input to the layer and to its output."""
    keras.config.set_dtype_policy("mixed_float16")
    ids = np.array([[1, 2, 0, 0]])
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(ids)
    pooled = layers.Float32(keras.layers.GlobalAveragePooling1D())(embedded)
    mean = numpy(embedded)[:, :2].mean(axis=1, dtype="float64")
    np.testing.assert_allclose(numpy(pooled), mean, rtol=1e-4)
    kept = layers.Float32(keras.layers.Activation("linear"))(embedded)
    np.testing.assert_array_equal(numpy(keras.src.backend.get_keras_mask(kept)), ids != 0)


@pytest.mark.parametrize("wrap", [lambda layer: layer, layers.Float32], ids=["bare", "wrapped"])
def test_a_wrapped_layer_that_drops_masks_still_does(wrap):
    """With the warning of Keras."""

    class Doubles(keras.layers.Layer):
        def call(self, x):
            return x * 2

    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 2, 0, 0]]))
    with pytest.warns(UserWarning, match="does not support mask"):
        dropped = wrap(Doubles())(embedded)
    assert keras.src.backend.get_keras_mask(dropped) is None


def test_masks_reach_a_wrapped_lstm_in_a_saved_model(tmp_path):
    """Padding does not change outputs, also in a loaded model."""
    keras.config.set_dtype_policy("mixed_float16")
    ids = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(5, 4, mask_zero=True)(ids)
    model = keras.Model(ids, layers.Float32(keras.layers.LSTM(3))(embedded))
    model.save(tmp_path / "model.keras")
    for saved_or_loaded in (model, keras.models.load_model(tmp_path / "model.keras")):
        padded, bare = np.array([[1, 2, 3, 0, 0]]), np.array([[1, 2, 3]])
        np.testing.assert_allclose(numpy(saved_or_loaded(padded)), numpy(model(bare)), rtol=1e-6)


def test_training_passes_through():
    """Wrapped dropout drops in training only."""
    layer = layers.Float32(keras.layers.Dropout(0.5))
    x = np.ones((4, 100), "float32")
    assert (ops.convert_to_numpy(layer(x, training=True)) == 0).any()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x, training=False)), x)


def test_a_built_layer_keeps_its_weights():
    """Wrapping changes only the dtype of the computation."""
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
    """Integer sums would wrap."""
    total = layers.Sum()(np.full((1, 3), 100, "int8"))
    assert (dtype(total), float(total[0])) == ("float32", 300.0)


def test_wrapped_layers_without_autocast_do_not_round_their_inputs(policy):
    """`LayerNormalization` with a float32 policy computes in float32, but rounds to the dtype of its inputs."""
    x = random(-300, 300, (2, 8))
    inner = keras.layers.LayerNormalization()
    wrapped = layers.Float32(inner)(ops.cast(x, policy.compute_dtype))
    np.testing.assert_allclose(numpy(wrapped), standardized64(x, -1), rtol=1e-5)
    if policy.compute_dtype == "float16":
        alone = keras.layers.LayerNormalization(dtype="float32")(ops.cast(x, "float16"))
        assert (dtype(alone), np.abs(numpy(alone) / standardized64(x, -1) - 1).max() > ROUNDED) == ("float32", True)


def test_masked_softmax_with_very_low_logits():
    """Keras masks float16 with -30,000; probabilities of lower logits become 0."""
    keras.config.set_dtype_policy("mixed_float16")
    logits, mask = np.array([[-40_000.0, -40_000.0, 0.0]]), np.array([[True, True, False]])
    np.testing.assert_array_equal(numpy(keras.layers.Softmax()(logits, mask=mask)), [[0, 0, 0]])
    np.testing.assert_allclose(numpy(layers.Softmax()(logits, mask=mask)), [[0.5, 0.5, 0]])


def test_masked_steps_do_not_count():
    """The mask comes with the inputs or as an argument; Keras divides float16 sums."""
    keras.config.set_dtype_policy("mixed_float16")
    x, mask = np.ones((1, 80_000, 1)), np.arange(80_000)[None] < 70_000
    x[0, 70_000:] = 0.0
    assert np.isnan(numpy(keras.layers.GlobalAveragePooling1D()(x, mask=mask)))
    assert numpy(layers.GlobalAveragePooling1D()(x, mask=mask)) == 1.0
    masked = keras.layers.Masking()(x)
    assert numpy(layers.GlobalAveragePooling1D()(masked)) == 1.0


@pytest.mark.parametrize(
    "make",
    [layers.Softmax, layers.LogSoftmax, layers.UnitNormalization, layers.LayerNormalization, layers.BatchNormalization],
)
def test_masks_of_inputs_reach_the_outputs(make):
    """And the next layer."""
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.layers.Masking()(np.array([[[1.0, 2.0], [0.0, 0.0]]]))
    for output_dtype in (None, "compute"):
        outputs = make(output_dtype=output_dtype)(x)
        np.testing.assert_array_equal(numpy(keras.src.backend.get_keras_mask(outputs)), [[True, False]])


def test_batch_normalization_trains_and_its_statistics_are_float32():
    """Under "float16", the Keras variance of inputs of 3,000 is inf after one step. Masked steps do not count."""
    keras.config.set_dtype_policy("float16")
    x = np.array([1.0, -1.0, 3.0, 1.0, -1.0, -3.0]).reshape(2, 3, 1) * np.full(2, 3000.0)
    mask = np.array([[True, True, False]] * 2)
    theirs, ours = keras.layers.BatchNormalization(), layers.BatchNormalization()
    theirs(x, training=True)
    assert np.isinf(numpy(theirs.moving_variance)).all()
    outputs = numpy(ours(x, training=True, mask=mask))
    np.testing.assert_allclose(outputs, x / 3000.0, rtol=1e-5)
    one_step = 0.99 + 0.01 * 3000.0**2
    np.testing.assert_allclose(numpy(ours.moving_variance), [one_step] * 2, rtol=1e-5)
    model = keras.Sequential([ours])
    model(x, training=False)
    np.testing.assert_allclose(numpy(ours.moving_variance), [one_step] * 2, rtol=1e-5)
    model(x, training=True)
    assert (numpy(ours.moving_variance) > 2 * one_step).all()


@pytest.mark.parametrize("make", [layers.LayerNormalization, lambda: layers.GroupNormalization(2)])
def test_updates_are_not_lost_under_a_float16_policy(make):
    """Float16 has no number between 1 and 1.00098."""
    keras.config.set_dtype_policy("float16")
    layer = make()
    layer.build((None, 4))
    layer.gamma.assign(np.full(4, 1.0001))
    np.testing.assert_allclose(numpy(layer.gamma), np.full(4, 1.0001), rtol=1e-6)
