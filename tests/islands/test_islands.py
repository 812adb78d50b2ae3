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
    """Makes a model, its input and what is said of it, under the global policy."""
    make, said = SENSITIVE[request.param]

    def made(policy):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        return make()

    return made, said


def dtypes(outputs):
    return {keras.backend.standardize_dtype(output.dtype) for output in tree.flatten(outputs)}


def numbers(outputs):
    return [ops.convert_to_numpy(ops.cast(output, "float32")) for output in tree.flatten(outputs)]


def force_own_code(model, layer):
    """What `force_float32` does with a layer in whose code an audit found something; on every backend."""
    plan = Plan(model)
    plan.force_own_code(layer)
    return plan.make()


def weights(model):
    return [ops.convert_to_numpy(weight) for weight in model.weights]


def error(outputs, right):
    """The largest relative error; where something is not finite, infinite."""
    with np.errstate(all="ignore"):
        pairs = zip(numbers(outputs), numbers(right), strict=True)
        errors = [np.where(a == b, 0.0, np.abs(a - b) / np.abs(b)) for a, b in pairs]
    return max(np.nan_to_num(each, nan=np.inf).max() for each in errors)


def test_values_are_those_of_float32(case):
    """And were not before. Weights stay as they are; what was changed is what is expected, once."""
    make, said = case
    model, x = make("mixed_float16")
    before, kept = model(x), weights(model)
    assert force_float32(model) == said
    after = model(x)
    assert force_float32(model) == []
    for old, new in zip(kept, weights(model), strict=True):
        np.testing.assert_array_equal(old, new)
    right, _ = make("float32")
    right.set_weights(kept)
    assert dtypes(after) == dtypes(model.outputs if hasattr(model, "outputs") else after) == {"float32"}
    if said != ["p: output"] and (BACKEND, said) != ("torch", ["norm"]):  # They are right already.
        assert error(before, right(x)) > 1e-4
    assert error(after, right(x)) < (5e-4 if "block" in said[0] or "cumsum" in said else 1e-5)


@pytest.mark.parametrize(
    ("case", "policy"), covering(1, list(SENSITIVE), ["mixed_float16", "float16"]), indirect=["case"]
)
def test_it_is_there_again_in_a_loaded_model(case, policy, tmp_path):
    """Under another global policy, and in a clone: the same values to the bit, nothing left to change."""
    make, said = case
    model, x = make(policy)
    assert force_float32(model) == said
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(numbers(again(x)), numbers(model(x)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert dtypes(again(x)) == {"float32"}
    assert force_float32(again) == []


def test_models_load_in_a_fresh_process(tmp_path):
    """In one under float32 that names nothing of ours but the package, and the classes of the models."""
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
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(some)


def test_weights_files_fit_both_ways(tmp_path):
    """Names in them are as before."""
    keras.config.set_dtype_policy("mixed_float16")
    plain, forced = Classifier(), Classifier()
    for model in (plain, forced):
        model(STEPS)
    force_float32(forced)
    for source, target in ((plain, forced), (forced, plain)):
        source.save_weights(tmp_path / "model.weights.h5")
        target.set_weights([weight * 0 for weight in weights(target)])
        target.load_weights(tmp_path / "model.weights.h5")
        for ours, theirs in zip(weights(source), weights(target), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("float16", marks=thorough)])
def test_training_goes_on(policy, tmp_path):
    """With the optimizer's state, what was compiled before, and after loading."""
    keras.config.set_dtype_policy(policy)
    model = Classifier(name="classifier")
    model(STEPS)
    model.compile(tfmixed.LossScaleOptimizer("adam", 8), "categorical_crossentropy")
    labels = np.eye(4, dtype="float32")[[0, 1]]
    fit = {"batch_size": 2, "verbose": 0}
    model.fit(STEPS, labels, **fit)
    assert dtypes(model.predict(STEPS, verbose=0)) <= {"float16", "bfloat16"}
    state = [ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
    assert force_float32(model)
    for old, new in zip(state, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))
    assert dtypes(model.predict(STEPS, verbose=0)) == {"float32"}
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, again):
        each.fit(STEPS, labels, **fit)
        assert int(each.optimizer.iterations) == 2
    for ours, theirs in zip(weights(model), weights(again), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@needs_tensorflow
def test_gradients_are_those_of_float32():
    """Through the softmax of a label of small probability, which half precision has as 0."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = through(dense(4, activation="softmax"), LOGITS)
    force_float32(model)
    with tf.GradientTape() as tape:
        loss = -ops.mean(ops.log(model(x)[:, 3]))
    (kernel, _) = tape.gradient(loss, model.trainable_variables)
    right = np.mean([np.outer(row, np.exp(row) / np.exp(row).sum() - [0, 0, 0, 1]) for row in LOGITS], axis=0)
    np.testing.assert_allclose(kernel, right, rtol=2e-3, atol=1e-3)


def test_own_code_around_sublayers(tmp_path):
    """The sublayers' products stay half, all between them is float32; a user's code never gets two dtypes."""
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
    """A user's code that needs the dtype of its sublayers to stay."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.powers, self.other = Powers(name="powers"), layers.Dense(4, name="other")

    def call(self, x):
        a, b = self.powers(x), self.other(x)
        assert a.dtype == b.dtype, f"{a.dtype} and {b.dtype}"
        return {"sum": a + b, "first": a}


def test_a_users_code_gets_back_what_it_had(tmp_path):
    """And what it returns as it is, is float32 with all its bits."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = Around(name="around"), np.full((2, 4), 300.0, "float32")
    model(x)
    assert force_own_code(model, model.powers) == ["powers: own code"]
    assert dtypes(model(x)) == {"float16"}
    assert force_float32(model) == ["around: output"]
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        outputs = each(x)
        assert dtypes(outputs) == {"float32"}
        np.testing.assert_allclose(numbers(outputs["first"])[0], 0.5, rtol=1e-6)
        assert len(set(numbers(outputs["sum"])[0][0].astype("float16") - numbers(outputs["sum"])[0][0])) == 1


class Exponential(keras.layers.Layer):
    """What overflows in half precision."""

    def call(self, x):
        return ops.exp(x)


class Mixes(keras.layers.Layer):
    """TensorFlow adds no float32 to float16."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.part = Exponential(name="part")

    def call(self, x):
        return tf.add(self.part(x), x)


@needs_tensorflow
def test_a_users_code_that_takes_no_float32_gets_none():
    """It is tried, and taken back; what is around it is computed in float32 then."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1, dtype="float32")(Mixes(name="mixes")(layers.Dense(4)(inputs))))
    assert force_float32(model) == ["mixes/part", "mixes: own code"]
    assert np.isfinite(numbers(model(np.ones((1, 4))))[0]).all()


@keras.saving.register_keras_serializable("test_islands")
class Total(keras.layers.Layer):
    """Says float32 itself, too late."""

    def call(self, x):
        return ops.cast(ops.sum(ops.square(x), axis=-1, keepdims=True), "float32")


@keras.saving.register_keras_serializable("test_islands")
class Residual(keras.Model):
    """Lists of models and dicts of layers; adds to its own input."""

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


def test_a_layer_that_gives_float32_goes_on_to_do_so(tmp_path):
    """Among sublayers in lists and dicts."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = Residual(name="residual"), np.full((2, 4), 300.0, "float32")
    assert np.isinf(numbers(model(x)["total"])[0]).all()
    assert force_own_code(model, model.total) == ["total"]
    assert force_float32(model) == ["p: activation", "residual: output"]
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_array_equal(numbers(each(x)["total"])[0], 360_000.0)
        np.testing.assert_allclose(numbers(each(x)["p"])[0].sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "wrapper",
    [layers.RNN, lambda cell, **kw: layers.Bidirectional(layers.RNN(cell), **kw)],
    ids=["RNN", "Bidirectional"],
)
def test_recurrent_cells_keep_the_dtype_of_their_states(wrapper, tmp_path):
    """Each step in float32, each state as before."""
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


def test_what_needs_nothing_is_left_alone():
    """Layers that compute in float32 by themselves or lose nothing; models without half precision."""
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
    ("selector", "said"),
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
def test_selectors(selector, said):
    """Names, patterns, paths, classes, functions and lists; what they name is forced whole."""
    model = named()
    assert force_float32(model, selector) == said
    assert force_float32(model, selector) == []
    for layer in model._flatten_layers():
        forced = layer.name in {path.split("/")[-1] for path in said} or (layer.name == "inner" and "block" in said)
        if isinstance(layer, layers.Dense):
            assert layer.compute_dtype == ("float32" if forced else "float16"), layer.name
    assert model(np.ones((1, 4))).shape == (1, 4)


def test_attention_can_be_forced_whole(tmp_path):
    """With its projections."""
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
def test_a_name_of_nothing_is_an_error(selector):
    """It tells the names that are near, and nothing is changed."""
    model = named()
    with pytest.raises(ValueError, match=r"layers must match layers of the model, received .*near .*(first|block)"):
        force_float32(model, selector)
    assert {layer.compute_dtype for layer in model.layers[1:]} == {"float16"}


@pytest.mark.parametrize("selector", [3, [3], None])
def test_other_selectors_are_errors(selector):
    """The message says what is possible."""
    with pytest.raises(ValueError, match=r"layers must be .* received (3|None)"):
        force_float32(named(), selector)


def test_models_must_be_built():
    """The message says how."""
    with pytest.raises(ValueError, match=r"model must be built, received .*call it on data, or `model.build"):
        force_float32(keras.Sequential([layers.Dense(1)]))
    with pytest.raises(ValueError, match="model must be a Keras model, received 'model'"):
        force_float32("model")


def test_layers_stay_what_they_are():
    """The objects, their classes, names, configs and paths."""
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
    """Through what is cast."""
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
    """A user's model that is right but for a sublayer, and makes that anew when it is loaded."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.soft = layers.Dense(4, "softmax", name="soft")
        self.last = layers.Dense(1, dtype="float32", name="last")

    def call(self, x):
        return self.last(self.soft(x))


def test_a_users_model_that_stays_as_it_is_keeps_what_was_changed_inside(tmp_path):
    """A loaded one has nothing left to change."""
    keras.config.set_dtype_policy("mixed_float16")
    model = Holder(name="holder")
    model(np.ones((2, 4), "float32"))
    assert force_float32(model) == ["soft: activation"]
    model.save(tmp_path / "model.keras")
    assert force_float32(keras.models.load_model(tmp_path / "model.keras")) == []


class Averages(keras.Model):
    """A user's code, in which a mask goes along with its tensor."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embed = layers.Embedding(5, 4, mask_zero=True)
        self.pool = layers.GlobalAveragePooling1D(name="pool")

    def call(self, ids):
        return self.pool(self.embed(ids))


def test_masks_of_what_is_widened_count():
    """Padding changes nothing in an average that gets float16."""
    keras.config.set_dtype_policy("mixed_float16")
    model = Averages()
    model(np.array([[1, 2]]))
    assert force_float32(model, "pool") == ["pool"]
    padded, bare = (numbers(model(np.array([each])))[0] for each in ([1, 2, 0, 0], [1, 2]))
    np.testing.assert_allclose(padded, bare, rtol=1e-6)


PARTIAL = functools.partial(keras.activations.softmax, axis=-1)


@pytest.mark.parametrize(
    ("shape", "inner", "said"),
    [
        ((4,), lambda x: ops.sum(ops.square(layers.Dense(4)(x)), axis=-1, keepdims=True), ["square", "sum"]),
        ((4, 2), lambda x: layers.GlobalAveragePooling1D(name="pool")(layers.Masking()(x)), ["pool"]),
        ((4,), lambda x: layers.Dense(4, PARTIAL, name="part")(x), ["part: activation"]),
    ],
    ids=["sum of squares", "average with a mask", "partial softmax"],
)
def test_short_ones_are_known_by_what_they_are(shape, inner, said):
    """Inside a model that returns float32, and where no axis is long."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(1, dtype="float32")(inner(inputs)))
    assert [re.sub(r"_\d+", "", each) for each in force_float32(model)] == said


def test_long_means_128():
    """From there on average pooling and sums are forced; shorter ones are not; of unknown length they are."""
    keras.config.set_dtype_policy("mixed_float16")
    for size, said in ((127, []), (128, ["pool"])):
        model, _ = through(
            lambda x, size=size: layers.Dense(1, dtype="float32")(layers.AveragePooling1D(size, name="pool")(x)),
            UNEVEN[..., None],
        )
        assert force_float32(model) == said
    for size, said in ((127, []), (128, ["sum"]), (None, ["sum"])):
        inputs = keras.Input((size, 2))
        total = ops.sum(layers.Dense(2)(inputs), axis=1)
        model = keras.Model(inputs, layers.Dense(1, dtype="float32")(total))
        assert [name.split("_")[0] for name in force_float32(model)] == said


def test_configs_hold_it():
    """Without a file."""
    keras.config.set_dtype_policy("mixed_float16")
    model, x = SENSITIVE["dense"][0]()
    force_float32(model)
    again = keras.models.model_from_json(model.to_json())
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(numbers(again(x))[0], numbers(model(x))[0])


@keras.saving.register_keras_serializable("test_islands")
class Coded(layers.Layer):
    """A user's layer around a function of its name."""

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
    """Calls one such layer after another."""

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


def chained(codes, functional):
    model = Chain(codes, name="chain")
    if not functional:
        return model
    inputs = keras.Input((16,))
    x = model.first(inputs)
    for layer in model.coded:
        x = layer(x)
    return keras.Model(inputs, model.last(x))


@needs_tensorflow
@pytest.mark.parametrize("functional", [True, False], ids=["functional", "subclassed"])
@pytest.mark.parametrize(
    ("codes", "level", "changed"),
    [
        (["squares", "sum"], 400.0, {"squares", "sum"}),
        (["exp", "part"], 20.0, {"exp", "part"}),
        (["log"], -30.0, {"first: activation", "log"}),
    ],
    ids=["squares, sum", "exp, part", "sigmoid, log"],
)
def test_what_one_layer_gives_reaches_the_next_in_float32(codes, level, changed, functional, tmp_path):
    """Where each is forced, and where what follows is float32 already; in one call, and in a saved model."""
    x = np.linspace(0.9, 1.0, 32, dtype="float32").reshape(2, 16) * level
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    right = chained(codes, functional)(x)
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    model = chained(codes, functional)
    assert error(model(x), right) > 0.1
    assert changed <= set(force_float32(model))
    assert force_float32(model) == []
    assert error(model(x), right) < 5e-3
    assert tfmixed.audit(model, x).of("severe") == []
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    assert error(keras.models.load_model(tmp_path / "model.keras")(x), right) < 5e-3


@needs_tensorflow
def test_a_decorated_call_is_traced_anew():
    """What was compiled before the change is not used after it."""

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
def test_a_loss_does_not_matter():
    """Whatever targets it takes."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((20, 8))
    model = keras.Model(inputs, layers.Dense(6, dtype="float32")(Coded("exp", name="exp")(inputs)))
    model.compile("adam", keras.losses.CTC())
    assert force_float32(model) == ["exp"]


@needs_tensorflow
def test_inputs_serve_where_the_model_does_not_tell_them():
    """Ids, which a model that is no graph does not tell from numbers."""

    class Ids(keras.Model):
        def __init__(self):
            super().__init__(name="ids")
            self.table, self.exp = self.add_weight(shape=(4, 8)), Coded("exp", name="exp")

        def call(self, ids):
            return self.exp(tf.cast(tf.gather(self.table, ids), self.compute_dtype))

    keras.config.set_dtype_policy("mixed_float16")
    model, ids = Ids(), np.array([[0, 3]])
    model(ids)
    with pytest.warns(UserWarning, match="force_float32 looks at known classes only"):
        assert "exp" not in force_float32(model)
    assert "exp" in force_float32(model, inputs=ids)


def test_a_layer_can_be_named_by_itself():
    """And must be one of the model's."""
    keras.config.set_dtype_policy("mixed_float16")
    hidden = layers.Dense(2, name="hidden")
    model = keras.Sequential([keras.Input((2,)), hidden, layers.Dense(1)])
    with pytest.raises(ValueError, match="layers must be among the model's"):
        force_float32(model, layers.Dense(2))
    assert force_float32(model, hidden) == ["hidden"]


def test_clones_need_no_registered_class():
    """As before the change."""

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
    """A user's layer with an added loss, and a regularizer that its config does not hold."""

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
KINDS = [pytest.param(kind, marks=[needs_tensorflow][: kind == "own_code"]) for kind in ADDING]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_layers_add_are_float32(kind, tmp_path):
    """Squares of 300 overflow in float16; and TensorFlow adds no half-precision loss to a float32 one."""
    make, said = ADDING[kind]
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((16,)), make(), layers.Dense(1, name="last")])
    model.set_weights([np.full(each.shape, 1.0) for each in model.weights])
    x, y = np.full((4, 16), 300.0, "float32"), np.zeros((4, 1), "float32")
    assert force_float32(model) == [*said, "last: output"]
    assert force_float32(model) == []
    model.compile("sgd", "mse", run_eagerly=True)
    loss = model.evaluate(x, y, verbose=0)
    assert np.isfinite(loss)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert force_float32(loaded) == []
    for each in (model, loaded):
        each.compile("sgd", "mse", run_eagerly=True)
        each(x)
        assert dtypes(each.losses) == {"float32"}
        assert each.evaluate(x, y, verbose=0) == pytest.approx(loss, rel=1e-3)
        assert each.fit(x, y, verbose=0).history["loss"][0] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("policy", "mode"), [("mixed_float16", "float8"), ("mixed_bfloat16", "int8"), ("mixed_float16", "int4")]
)
@pytest.mark.parametrize("first", ["quantize", "force"])
@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_quantized_layers(policy, mode, first, tmp_path):
    """Keras calls another method of theirs, and quantizes nothing that is not exactly of its own class."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    hidden = layers.Dense(8, "relu", activity_regularizer="l2", name="hidden")
    model = keras.Sequential([keras.Input((4,)), hidden, layers.Dense(3, "softmax", name="out")])
    x = ops.convert_to_tensor(np.linspace(-1, 1, 32).reshape(8, 4), "float32")
    before = numbers(model(x))[0]
    said = ["hidden: activity regularizer", "out: activation"]
    if first == "quantize":
        model.quantize(mode)
        assert force_float32(model) == said
    else:
        assert force_float32(model) == said
        model.quantize(mode)
    assert [layer.quantization_mode for layer in model.layers] == [mode] * 2
    assert force_float32(model) == []
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.quantization_mode for layer in loaded.layers] == [mode] * 2
    for each in (model, loaded):
        assert dtypes([each(x), each.losses]) == {"float32"} == dtypes(each.outputs)
        assert numbers(each(x))[0] == pytest.approx(before, abs=0.2)
    assert numbers(loaded(x))[0] == pytest.approx(numbers(model(x))[0], abs=1e-6)


class Counted(layers.Layer):
    """A user's layer that counts its calls and warns."""

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
def test_code_of_ones_own_runs_as_often_as_the_docs_say(function, runs):
    """Once, once more for constants, and again after something was forced in it; its warnings are kept for training."""
    keras.config.set_dtype_policy("mixed_float16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = keras.Sequential([keras.Input((4,)), Counted(function, name="mine"), layers.Dense(1, dtype="float32")])
    Counted.calls = 0
    assert force_float32(model) == ["mine"] * (runs > 1)
    assert Counted.calls == runs
