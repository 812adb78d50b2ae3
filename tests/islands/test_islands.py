"""`force_float32`: what it changes, that values are those of float32, and that models save and load with it."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow, tf
from keras import layers, ops, tree
from sensitive_models import LOGITS, SENSITIVE, STEPS, UNEVEN, Cell, Classifier, Powers, dense, through
from thorough import covering, thorough

import tfmixed
from tfmixed import force_float32
from tfmixed._islands.planner import Plan


@pytest.fixture(params=SENSITIVE)
def case(request):
    """A function that makes a model and its input under a policy, and the expected report."""
    make, expected = SENSITIVE[request.param]

    def made(policy):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        return make()

    return made, expected


def dtypes(outputs):
    return {keras.backend.standardize_dtype(output.dtype) for output in tree.flatten(outputs)}


def numbers(outputs):
    return [ops.convert_to_numpy(ops.cast(output, "float32")) for output in tree.flatten(outputs)]


def force_own_code(model, layer):
    """Forces a layer like `force_float32` if an audit finds a hazard in its code; on every backend."""
    plan = Plan(model)
    plan.force_own_code(layer)
    return plan.apply()


def weights(model):
    return [ops.convert_to_numpy(weight) for weight in model.weights]


def error(outputs, right):
    """Returns the largest relative error, or inf for nonfinite values."""
    with np.errstate(all="ignore"):
        pairs = zip(numbers(outputs), numbers(right), strict=True)
        errors = [np.where(a == b, 0.0, np.abs(a - b) / np.abs(b)) for a, b in pairs]
    return max(np.nan_to_num(array, nan=np.inf).max() for array in errors)


def test_values_are_those_of_float32(case):
    """They were not before. Weights stay, and a second call changes nothing."""
    make, expected = case
    model, x = make("mixed_float16")
    before, kept = model(x), weights(model)
    assert force_float32(model) == expected
    after = model(x)
    assert force_float32(model) == []
    for old, new in zip(kept, weights(model), strict=True):
        np.testing.assert_array_equal(old, new)
    right, _ = make("float32")
    right.set_weights(kept)
    assert dtypes(after) == dtypes(model.outputs if hasattr(model, "outputs") else after) == {"float32"}
    if expected != ["p: output"] and (BACKEND, expected) != ("torch", ["norm"]):  # right without it
        assert error(before, right(x)) > 1e-4
    assert error(after, right(x)) < (5e-4 if "block" in expected[0] or "cumsum" in expected else 1e-5)


@pytest.mark.parametrize(
    ("case", "policy"), covering(1, list(SENSITIVE), ["mixed_float16", "float16"]), indirect=["case"]
)
def test_loaded_models_keep_the_change(case, policy, tmp_path):
    """Under another global policy, with bitwise equal outputs and nothing left to change."""
    make, expected = case
    model, x = make(policy)
    assert force_float32(model) == expected
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(numbers(again(x)), numbers(model(x)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert dtypes(again(x)) == {"float32"}
    assert force_float32(again) == []


@pytest.mark.slow
def test_models_load_in_a_fresh_process(tmp_path):
    """Under float32, with no import but the package and the classes of the models."""
    some = list(SENSITIVE.values())[::8]
    for number, (make, _) in enumerate(some):
        keras.utils.clear_session()
        keras.config.set_dtype_policy("mixed_float16")
        model, x = make()
        force_float32(model)
        model.save(tmp_path / f"{number}.keras")
        np.savez(tmp_path / f"{number}.npz", x, *numbers(model(x)))
    code = f"""
import pathlib, keras, numpy as np, tfmixed, sensitive_models
for path in pathlib.Path({str(tmp_path)!r}).glob("*.keras"):
    model, saved = keras.models.load_model(path), np.load(path.with_suffix(".npz"))
    x, *right = saved.values()
    for ours, theirs in zip(keras.tree.flatten(model(x)), right, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(ours), theirs, rtol=1e-6)
    print(path.stem)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1] / "helpers",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(some)


@pytest.mark.parametrize("kind", ["nested", pytest.param("classifier", marks=pytest.mark.slow)])
def test_weights_files_fit_models_with_and_without_the_change(kind, tmp_path):
    """The names in the file do not change."""
    keras.config.set_dtype_policy("mixed_float16")
    (plain, _), (forced, _) = (SENSITIVE[kind][0]() for _ in range(2))
    force_float32(forced)
    for source, target in ((plain, forced), (forced, plain)):
        source.save_weights(tmp_path / "model.weights.h5")
        target.set_weights([weight * 0 for weight in weights(target)])
        target.load_weights(tmp_path / "model.weights.h5")
        for ours, theirs in zip(weights(source), weights(target), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("dense", "mixed_float16"),
        pytest.param("classifier", "mixed_float16", marks=pytest.mark.slow),
        pytest.param("classifier", "float16", marks=thorough),
    ],
)
def test_training_continues(kind, policy, tmp_path):
    """With the optimizer state and a retraced train function, also after loading."""
    keras.config.set_dtype_policy(policy)
    model, x = SENSITIVE[kind][0]()
    model.compile(tfmixed.LossScaleOptimizer("adam", 8), "categorical_crossentropy")
    labels = np.eye(4, dtype="float32")[[0, 1]]
    fit = {"batch_size": 2, "verbose": 0}
    model.fit(x, labels, **fit)
    assert dtypes(model.predict(x, verbose=0)) <= {"float16", "bfloat16"}
    state = [ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
    assert force_float32(model)
    for old, new in zip(state, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))
    assert dtypes(model.predict(x, verbose=0)) == {"float32"}
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    for trained in (model, again):
        trained.fit(x, labels, **fit)
        assert int(trained.optimizer.iterations) == 2
    for ours, theirs in zip(weights(model), weights(again), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@needs_tensorflow
def test_gradients_are_those_of_float32():
    """For a label with a small probability, which is 0 in half precision."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = through(dense(4, activation="softmax"), LOGITS)
    force_float32(model)
    with tf.GradientTape() as tape:
        loss = -ops.mean(ops.log(model(x)[:, 3]))
    (kernel, _) = tape.gradient(loss, model.trainable_variables)
    right = np.mean([np.outer(row, np.exp(row) / np.exp(row).sum() - [0, 0, 0, 1]) for row in LOGITS], axis=0)
    np.testing.assert_allclose(kernel, right, rtol=2e-3, atol=1e-3)


def test_own_code_around_sublayers(tmp_path):
    """Products of sublayers stay in half precision, the code around them is float32; code never gets two dtypes."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs, powers = keras.Input((4,)), Powers(name="powers")
    model = keras.Model(inputs, layers.Activation("tanh", name="last")(powers(inputs)))
    x = np.full((2, 4), 300.0, "float32")
    assert np.ptp(numbers(model(x))[0]) == 0 == numbers(model(x))[0][0, 0]  # the sum of squares is inf
    assert force_own_code(model, powers) == ["powers: own code"]
    assert force_own_code(model, powers) == []
    assert powers.scale.compute_dtype == "float16"
    np.testing.assert_allclose(numbers(model(x))[0], np.tanh(0.5), rtol=1e-3)
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numbers(again(x))[0], numbers(model(x))[0])
    assert again.get_layer("powers").scale.compute_dtype == "float16"


@keras.saving.register_keras_serializable("test_islands")
class Around(keras.Model):
    """Custom code that needs the dtype of its sublayers to stay."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.powers, self.other = Powers(name="powers"), layers.Dense(4, name="other")

    def call(self, x):
        a, b = self.powers(x), self.other(x)
        assert a.dtype == b.dtype, f"{a.dtype} and {b.dtype}"
        return {"sum": a + b, "first": a}


def test_custom_code_gets_the_dtype_of_before(tmp_path):
    """An output that it returns unchanged is float32 without loss."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = Around(name="around"), np.full((2, 4), 300.0, "float32")
    model(x)
    assert force_own_code(model, model.powers) == ["powers: own code"]
    assert dtypes(model(x)) == {"float16"}
    assert force_float32(model) == ["around: output"]
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    for saved_or_loaded in (model, keras.models.load_model(tmp_path / "model.keras")):
        outputs = saved_or_loaded(x)
        assert dtypes(outputs) == {"float32"}
        np.testing.assert_allclose(numbers(outputs["first"])[0], 0.5, rtol=1e-6)
        assert len(set(numbers(outputs["sum"])[0][0].astype("float16") - numbers(outputs["sum"])[0][0])) == 1


class Exponential(keras.layers.Layer):
    """Overflows in half precision."""

    def call(self, x):
        return ops.exp(x)


class Mixes(keras.layers.Layer):
    """Fails with float32 from its sublayer: TensorFlow does not add float32 and float16."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.part = Exponential(name="part")

    def call(self, x):
        return tf.add(self.part(x), x)


@needs_tensorflow
def test_custom_code_that_refuses_float32_is_forced_itself():
    """The attempt is undone, and the code around is computed in float32."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1, dtype="float32")(Mixes(name="mixes")(layers.Dense(4)(inputs))))
    assert force_float32(model) == ["mixes/part", "mixes: own code"]
    assert np.isfinite(numbers(model(np.ones((1, 4))))[0]).all()


@keras.saving.register_keras_serializable("test_islands")
class Total(keras.layers.Layer):
    """Casts to float32 itself, too late."""

    def call(self, x):
        return ops.cast(ops.sum(ops.square(x), axis=-1, keepdims=True), "float32")


@keras.saving.register_keras_serializable("test_islands")
class Residual(keras.Model):
    """Holds lists of models and dicts of layers; adds to its own input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [keras.Sequential([layers.Dense(4), layers.LayerNormalization()]) for _ in range(2)]
        self.heads = {"p": layers.Dense(3, activation="softmax", name="p"), "q": layers.Dense(2, name="q")}
        self.total = Total(name="total")

    def call(self, x):
        total = self.total(x)
        for block in self.blocks:
            assert x.dtype == block(x).dtype
            x = x + block(x)
        assert keras.backend.standardize_dtype(total.dtype) == "float32"
        return {"total": total, **{key: head(x) for key, head in self.heads.items()}}


def test_a_layer_that_returns_float32_still_does(tmp_path):
    """Next to sublayers in lists and dicts."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = Residual(name="residual"), np.full((2, 4), 300.0, "float32")
    assert np.isinf(numbers(model(x)["total"])[0]).all()
    assert force_own_code(model, model.total) == ["total"]
    assert force_float32(model) == ["p: activation", "residual: output"]
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    for saved_or_loaded in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_array_equal(numbers(saved_or_loaded(x)["total"])[0], 360_000.0)
        np.testing.assert_allclose(numbers(saved_or_loaded(x)["p"])[0].sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "wrapper",
    [layers.RNN, lambda cell, **kw: layers.Bidirectional(layers.RNN(cell), **kw)],
    ids=["RNN", "Bidirectional"],
)
def test_recurrent_cells_keep_the_dtype_of_their_states(wrapper, tmp_path):
    """Steps are float32, states keep their dtype."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = through(wrapper(Cell(), name="rnn"), np.zeros((1, 3, 4), "float32"))
    assert numbers(model(x))[0].max() == 0  # exp(-30) is 0 in float16
    assert force_own_code(model, model.get_layer("rnn"))
    np.testing.assert_allclose(numbers(model(x))[0], np.exp(-7.5), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numbers(again(x))[0], numbers(model(x))[0])


def test_activations_inside_recurrent_layers():
    """At every time step."""
    keras.config.set_dtype_policy("mixed_float16")
    lstm = layers.LSTM(4, activation="softmax", name="lstm")
    model, x = through(layers.Bidirectional(lstm, name="two"), STEPS)
    before = numbers(model(x))[0]
    assert sorted(force_float32(model)) == [
        "two/backward_lstm/lstm_cell: activation",
        "two/forward_lstm/lstm_cell: activation",
        "two: output",
    ]
    np.testing.assert_allclose(numbers(model(x))[0], before, atol=1e-3)


def test_safe_layers_are_left_unchanged():
    """Layers that compute in float32 themselves or lose nothing, and models without half precision."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4, 4))
    x = layers.LayerNormalization()(inputs)
    x = layers.BatchNormalization()(layers.Dense(4, "relu")(x)) + ops.sum(x, axis=1, keepdims=True)
    x = layers.GlobalAveragePooling1D()(layers.AveragePooling1D(2)(layers.RMSNormalization()(x)))
    last = layers.Dense(2, "softmax", dtype="float32", name="predictions")
    assert force_float32(keras.Model(inputs, last(ops.mean(x, axis=-1, keepdims=True)))) == []
    keras.config.set_dtype_policy("float32")
    assert force_float32(SENSITIVE["dense"][0]()[0]) == []
    assert force_float32(SENSITIVE["classifier"][0]()[0]) == []


def named():
    keras.config.set_dtype_policy("mixed_float16")
    block = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inner")], name="block")
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="middle")(block(layers.Dense(4, name="first")(inputs)))
    return keras.Model(inputs, layers.Dense(4, name="last")(x))


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("first", ["first"]),
        ("block/inner", ["block/inner"]),
        ("*i*", ["first", "block/inner", "middle"]),
        ("block", ["block"]),
        (keras.Sequential, ["block"]),
        (layers.Dense, ["first", "block/inner", "middle", "last"]),
        (lambda layer: layer.name.startswith("m"), ["middle"]),
        (["sensitive", "first"], ["first", "last: output"]),
        ([], []),
        (layers.LSTM, []),
    ],
)
def test_selectors(selector, expected):
    """Names, patterns, paths, classes, functions and lists force layers as a whole."""
    model = named()
    assert force_float32(model, selector) == expected
    assert force_float32(model, selector) == []
    names = {path.split("/")[-1] for path in expected} | ({"inner"} if "block" in expected else set())
    for layer in model._flatten_layers():
        forced = layer.name in names
        if isinstance(layer, layers.Dense):
            assert layer.compute_dtype == ("float32" if forced else "float16"), layer.name
    assert model(np.ones((1, 4))).shape == (1, 4)


def test_attention_can_be_forced_as_a_whole(tmp_path):
    """Including its projections."""
    keras.config.set_dtype_policy("mixed_float16")
    model = Classifier(name="classifier")
    model(STEPS)
    assert force_float32(model, "mha") == ["block/mha"]
    assert {layer.compute_dtype for layer in model.block.mha._flatten_layers()} == {"float32"}
    model.predictions.dtype_policy = "mixed_bfloat16"
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert {layer.compute_dtype for layer in again.block.mha._flatten_layers()} == {"float32"}
    assert (again.block.parts[0].compute_dtype, again.predictions.compute_dtype) == ("float16", "bfloat16")
    np.testing.assert_array_equal(numbers(again(STEPS))[0], numbers(model(STEPS))[0])


@pytest.mark.parametrize("selector", ["frist", "block/*x", ["first", "frist"]])
def test_an_unknown_name_is_an_error(selector):
    """The error lists similar names, and nothing is changed."""
    model = named()
    with pytest.raises(ValueError, match=r"first|block"):
        force_float32(model, selector)
    assert {layer.compute_dtype for layer in model.layers[1:]} == {"float16"}


@pytest.mark.parametrize("selector", [3, [3], None])
def test_other_selectors_are_errors(selector):
    """The error lists the valid kinds."""
    with pytest.raises(ValueError, match="pattern"):
        force_float32(named(), selector)


def test_models_must_be_built():
    """Keras models only."""
    with pytest.raises(ValueError, match="built"):
        force_float32(keras.Sequential([layers.Dense(1)]))
    with pytest.raises(ValueError, match="Keras model"):
        force_float32("model")


def test_layers_keep_their_identity():
    """The same objects, with the same classes, names, configs and paths."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = SENSITIVE["dense"][0]()
    layer, config, path = model.get_layer("p"), model.get_layer("p").get_config(), model.get_layer("p").kernel.path
    force_float32(model)
    assert model.get_layer("p") is layer
    assert isinstance(layer, layers.Dense)
    assert (type(layer).__name__, layer.kernel.path) == ("Dense", path)
    assert {**layer.get_config(), **config}.keys() - config.keys() == {"in_float32"}
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(numbers(clone(x))[0], numbers(model(x))[0])


def test_masks_pass_through():
    """Casts keep masks."""
    keras.config.set_dtype_policy("mixed_float16")
    ids = keras.Input((None,), dtype="int32")
    x = layers.TimeDistributed(layers.Dense(4, "softmax"))(layers.Embedding(5, 4, mask_zero=True)(ids))
    model = keras.Model(ids, layers.GlobalAveragePooling1D()(x))
    before = numbers(model(np.array([[1, 2, 0, 0]])))[0]
    force_float32(model)
    np.testing.assert_allclose(numbers(model(np.array([[1, 2, 0, 0]])))[0], before, rtol=1e-2)
    np.testing.assert_allclose(
        numbers(model(np.array([[1, 2, 0]])))[0], numbers(model(np.array([[1, 2]])))[0], rtol=1e-6
    )


@keras.saving.register_keras_serializable("test_islands")
class Holder(keras.Model):
    """A custom model that creates its only sensitive sublayer again when it is loaded."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.soft = layers.Dense(4, "softmax", name="soft")
        self.last = layers.Dense(1, dtype="float32", name="last")

    def call(self, x):
        return self.last(self.soft(x))


def test_a_custom_model_saves_changes_of_its_sublayers(tmp_path):
    """In the loaded model there is nothing left to change."""
    keras.config.set_dtype_policy("mixed_float16")
    model = Holder(name="holder")
    model(np.ones((2, 4), "float32"))
    assert force_float32(model) == ["soft: activation"]
    model.save(tmp_path / "model.keras")
    assert force_float32(keras.models.load_model(tmp_path / "model.keras")) == []


class Averages(keras.Model):
    """Custom code in which a tensor carries its mask."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embed = layers.Embedding(5, 4, mask_zero=True)
        self.pool = layers.GlobalAveragePooling1D(name="pool")

    def call(self, ids):
        return self.pool(self.embed(ids))


def test_widened_tensors_keep_their_masks():
    """Padding does not change an average of float16 inputs."""
    keras.config.set_dtype_policy("mixed_float16")
    model = Averages()
    model(np.array([[1, 2]]))
    assert force_float32(model, "pool") == ["pool"]
    padded, bare = (numbers(model(np.array([ids])))[0] for ids in ([1, 2, 0, 0], [1, 2]))
    np.testing.assert_allclose(padded, bare, rtol=1e-6)


PARTIAL = functools.partial(keras.activations.softmax, axis=-1)


@pytest.mark.parametrize(
    ("shape", "inner", "expected"),
    [
        ((4,), lambda x: ops.sum(ops.square(layers.Dense(4)(x)), axis=-1, keepdims=True), ["square", "sum"]),
        ((4, 2), lambda x: layers.GlobalAveragePooling1D(name="pool")(layers.Masking()(x)), ["pool"]),
        ((4,), lambda x: layers.Dense(4, PARTIAL, name="part")(x), ["part: activation"]),
    ],
    ids=["sum of squares", "average with a mask", "partial softmax"],
)
def test_sensitive_operations_on_short_axes_are_found(shape, inner, expected):
    """Inside a model that returns float32."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(1, dtype="float32")(inner(inputs)))
    assert [re.sub(r"_\d+", "", path) for path in force_float32(model)] == expected


def test_axes_of_128_elements_are_long():
    """Average pooling and sums are forced from that length on, and if the length is unknown."""
    keras.config.set_dtype_policy("mixed_float16")
    for size, expected in ((127, []), (128, ["pool"])):
        model, _ = through(
            lambda x, size=size: layers.Dense(1, dtype="float32")(layers.AveragePooling1D(size, name="pool")(x)),
            UNEVEN[..., None],
        )
        assert force_float32(model) == expected
    for size, expected in ((127, []), (128, ["sum"]), (None, ["sum"])):
        inputs = keras.Input((size, 2))
        total = ops.sum(layers.Dense(2)(inputs), axis=1)
        model = keras.Model(inputs, layers.Dense(1, dtype="float32")(total))
        assert [name.split("_")[0] for name in force_float32(model)] == expected


def test_configs_contain_the_change():
    """As JSON."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = SENSITIVE["dense"][0]()
    force_float32(model)
    again = keras.models.model_from_json(model.to_json())
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(numbers(again(x))[0], numbers(model(x))[0])


@keras.saving.register_keras_serializable("test_islands")
class Coded(layers.Layer):
    """A custom layer around a named function."""

    def __init__(self, code, **kwargs):
        super().__init__(**kwargs)
        self.code = code

    def get_config(self):
        return {**super().get_config(), "code": self.code}

    def call(self, x):
        return {
            "squares": lambda: x * x,
            "sum": lambda: tf.reduce_sum(x, -1, keepdims=True),
            "exp": lambda: tf.exp(x),
            "part": lambda: x / tf.reduce_sum(x, -1, keepdims=True),
            "log": lambda: tf.math.log(x + 1e-10),
        }[self.code]()


@keras.saving.register_keras_serializable("test_islands")
class Chain(keras.Model):
    """Calls such layers in a row."""

    def __init__(self, codes, **kwargs):
        super().__init__(**kwargs)
        self.codes = codes
        self.first = layers.Dense(16, "sigmoid", name="first") if "log" in codes else layers.Activation("linear")
        self.coded = [Coded(code, name=code) for code in codes]
        self.last = layers.Dense(1, dtype="float32", kernel_initializer="ones", name="last")

    def get_config(self):
        return {**super().get_config(), "codes": self.codes}

    def build(self, shape):
        self.first.build(shape)
        self.last.build((*shape[:-1], 1 if "sum" in self.codes else 16))

    def call(self, x):
        x = self.first(x)
        for layer in self.coded:
            x = layer(x)
        return self.last(x)


def chained(codes, kind):
    model = Chain(codes, name="chain")
    if kind == "subclassed":
        return model
    inputs = keras.Input((16,))
    x = model.first(inputs)
    for layer in model.coded:
        x = layer(x)
    return keras.Model(inputs, model.last(x))


CHAINS = {
    "squares, sum": (["squares", "sum"], 400.0, {"squares", "sum"}),
    "exp, part": (["exp", "part"], 20.0, {"exp", "part"}),
    "sigmoid, log": (["log"], -30.0, {"first: activation", "log"}),
}
MARKED = {
    ("squares, sum", "functional"): (),
    ("exp, part", "subclassed"): (),
    ("sigmoid, log", "functional"): pytest.mark.slow,
}


@needs_tensorflow
@pytest.mark.parametrize(
    ("chain", "kind"),
    [
        pytest.param(chain, kind, id=f"{name}, {kind}", marks=MARKED.get((name, kind), thorough))
        for name, chain in CHAINS.items()
        for kind in ("functional", "subclassed")
    ],
)
def test_forced_layers_pass_float32_on(chain, kind, tmp_path):
    """To a layer that is forced as well, and to one that is float32 anyway; also in a loaded model."""
    codes, level, changed = chain
    x = np.linspace(0.9, 1.0, 32, dtype="float32").reshape(2, 16) * level
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    right = chained(codes, kind)(x)
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    model = chained(codes, kind)
    assert error(model(x), right) > 0.1
    assert changed <= set(force_float32(model))
    assert force_float32(model) == []
    assert error(model(x), right) < 5e-3
    assert tfmixed.audit(model, x).of("severe") == []
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    assert error(keras.models.load_model(tmp_path / "model.keras")(x), right) < 5e-3


@needs_tensorflow
def test_a_decorated_call_is_retraced():
    """A function compiled before the change is not used after it."""

    class Decorated(keras.Model):
        def __init__(self):
            super().__init__(name="decorated")
            self.scores, self.softmax = layers.Dense(16), layers.Softmax(name="softmax")

        @tf.function
        def call(self, x):
            return self.softmax(self.scores(x))

    keras.config.set_dtype_policy("mixed_float16")
    model, x = Decorated(), np.full((1, 8), 30.0, "float32")
    assert (numbers(model(x))[0] == 0).any()
    assert force_float32(model) == ["softmax", "decorated: output"]
    logits = numbers(model.scores(x))[0].astype("float64")
    powers = np.exp(logits - logits.max())
    np.testing.assert_allclose(numbers(model(x))[0], powers / powers.sum(), rtol=1e-3, atol=1e-30)


@needs_tensorflow
def test_the_compiled_loss_does_not_matter():
    """Whatever targets it requires."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((20, 8))
    model = keras.Model(inputs, layers.Dense(6, dtype="float32")(Coded("exp", name="exp")(inputs)))
    model.compile("adam", keras.losses.CTC())
    assert force_float32(model) == ["exp"]


@needs_tensorflow
def test_inputs_describe_models_with_unknown_inputs():
    """Such as integer ids of a subclassed model."""

    class Ids(keras.Model):
        def __init__(self):
            super().__init__(name="ids")
            self.table, self.exp = self.add_weight(shape=(4, 8)), Coded("exp", name="exp")

        def call(self, ids):
            return self.exp(tf.cast(tf.gather(self.table, ids), self.compute_dtype))

    keras.config.set_dtype_policy("mixed_float16")
    model, ids = Ids(), np.array([[0, 3]])
    model(ids)
    with pytest.warns(UserWarning, match="known layer classes"):
        assert "exp" not in force_float32(model)
    assert "exp" in force_float32(model, inputs=ids)


def test_a_layer_can_be_a_selector():
    """It must be part of the model."""
    keras.config.set_dtype_policy("mixed_float16")
    hidden = layers.Dense(2, name="hidden")
    model = keras.Sequential([keras.Input((2,)), hidden, layers.Dense(1)])
    with pytest.raises(ValueError, match="part of the model"):
        force_float32(model, layers.Dense(2))
    assert force_float32(model, hidden) == ["hidden"]


def test_clones_need_no_registered_class():
    """The same as without the change."""

    class Mine(layers.Layer):
        def call(self, x):
            return ops.exp(x)

    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((2,))
    model = keras.Model(inputs, Mine(name="mine")(inputs))
    assert force_float32(model, "mine")[0] == "mine"
    clone = keras.models.clone_model(model)
    assert clone.get_layer("mine").compute_dtype == "float32"


@keras.saving.register_keras_serializable("test_islands")
class AddsLoss(layers.Layer):
    """A custom layer with an added loss, and a regularizer that is not in its config."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.activity_regularizer = keras.regularizers.L2(1.0)

    def call(self, x):
        self.add_loss(ops.mean(ops.abs(x)))
        return x

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype_policy.name}


ADDING = {
    "activity_regularizer": (lambda: layers.Dense(8, activity_regularizer="l2", name="a"), ["a: activity regularizer"]),
    "layer": (lambda: layers.ActivityRegularization(l2=1.0, name="a"), ["a: activity regularizer"]),
    "recurrent": (
        lambda: keras.Sequential(
            [layers.Reshape((2, 8)), layers.GRU(8, activity_regularizer="l1", name="a")], name="b"
        ),
        ["b/a: activity regularizer"],
    ),
    "variables": (
        lambda: layers.Dense(8, kernel_regularizer="l2", bias_regularizer="l1", name="a", dtype="float16"),
        ["a: weight regularizer"],
    ),
    "own_code": (lambda: AddsLoss(name="a"), ["a"]),
}
MARKS = {"own_code": needs_tensorflow} | dict.fromkeys(["layer", "recurrent", "variables"], pytest.mark.slow)
KINDS = [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in ADDING]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_layers_add_are_float32(kind, tmp_path):
    """Squares of 300 overflow in float16, and TensorFlow does not add half-precision losses to float32 ones."""
    make, expected = ADDING[kind]
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((16,)), make(), layers.Dense(1, name="last")])
    model.set_weights([np.full(weight.shape, 1.0) for weight in model.weights])
    x, y = np.full((4, 16), 300.0, "float32"), np.zeros((4, 1), "float32")
    assert force_float32(model) == [*expected, "last: output"]
    assert force_float32(model) == []
    model.compile("sgd", "mse", run_eagerly=True)
    loss = model.evaluate(x, y, verbose=0)
    assert np.isfinite(loss)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert force_float32(loaded) == []
    for saved_or_loaded in (model, loaded):
        saved_or_loaded.compile("sgd", "mse", run_eagerly=True)
        saved_or_loaded(x)
        assert dtypes(saved_or_loaded.losses) == {"float32"}
        assert saved_or_loaded.evaluate(x, y, verbose=0) == pytest.approx(loss, rel=1e-3)
        assert saved_or_loaded.fit(x, y, verbose=0).history["loss"][0] == pytest.approx(loss, rel=1e-3)


QUANTIZED = {"float8": "mixed_float16", "int8": "mixed_bfloat16", "int4": "mixed_float16"}


@pytest.mark.parametrize(
    ("mode", "first"),
    [
        pytest.param(mode, first, marks=[pytest.mark.slow][: mode != "int8"])
        for mode in QUANTIZED
        for first in ("quantize", "force")
    ],
)
@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_quantized_layers(mode, first, tmp_path):
    """Keras calls another method of theirs, and quantizes only layers that are exactly of its own classes."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(QUANTIZED[mode])
    hidden = layers.Dense(8, "relu", activity_regularizer="l2", name="hidden")
    model = keras.Sequential([keras.Input((4,)), hidden, layers.Dense(3, "softmax", name="out")])
    x = ops.convert_to_tensor(np.linspace(-1, 1, 32).reshape(8, 4), "float32")
    before = numbers(model(x))[0]
    expected = ["hidden: activity regularizer", "out: activation"]
    if first == "quantize":
        model.quantize(mode)
    assert force_float32(model) == expected
    if first == "force":
        model.quantize(mode)
    assert [layer.quantization_mode for layer in model.layers] == [mode] * 2
    assert force_float32(model) == []
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.quantization_mode for layer in loaded.layers] == [mode] * 2
    for saved_or_loaded in (model, loaded):
        assert dtypes([saved_or_loaded(x), saved_or_loaded.losses]) == {"float32"} == dtypes(saved_or_loaded.outputs)
        assert numbers(saved_or_loaded(x))[0] == pytest.approx(before, abs=0.2)
    assert numbers(loaded(x))[0] == pytest.approx(numbers(model(x))[0], abs=1e-6)


class Counted(layers.Layer):
    """A custom layer that counts its calls and warns."""

    calls = 0

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        Counted.calls += 1
        warnings.warn("called", stacklevel=1)
        return self.function(x)


@needs_tensorflow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("function", "runs"), [(ops.relu, 1), (lambda x: x + 1e-12, 3), (ops.exp, 2)], ids=["safe", "constant", "unsafe"]
)
def test_custom_code_runs_as_often_as_documented(function, runs):
    """Once, once more for constants, and again after it was forced; its warnings are not issued."""
    keras.config.set_dtype_policy("mixed_float16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = keras.Sequential([keras.Input((4,)), Counted(function, name="mine"), layers.Dense(1, dtype="float32")])
    Counted.calls = 0
    assert force_float32(model) == ["mine"] * (runs > 1)
    assert Counted.calls == runs
