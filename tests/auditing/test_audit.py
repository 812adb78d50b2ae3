"""Findings of `audit` for hazards in custom layers, plain functions and Keras's own layers."""

from __future__ import annotations

import itertools
import re
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from thorough import thorough

from tfmixed import LossScaleOptimizer, audit, force_float32, measure_gradients
from tfmixed._islands import gradient_sums

# NumPy's, when TensorFlow makes a constant of -1e9.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")


@pytest.fixture(autouse=True)
def _half(monkeypatch):
    """No layer of another test keeps float32 sums."""
    monkeypatch.setattr(gradient_sums, "_covered", weakref.WeakSet())
    keras.config.set_dtype_policy("mixed_float16")


class Planted(keras.layers.Layer):
    """A user's layer around a plain function."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def model_of(function, shape=(64,), dtype="float32", **layer):
    """A model with a planted function and a head in float32, which has no hazard of its own."""
    inputs = keras.Input(shape, dtype=dtype)
    x = Planted(function, name="planted", **layer)(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, dtype="float32", name="head")(x))


def found(model, *given, severities=("severe", "warning")):
    return [
        (finding.layer, finding.severity, finding.op)
        for finding in audit(model, *given)
        if finding.severity in severities
    ]


def keep(reduction):
    return lambda x: reduction(x)[:, None]


HAZARDS = {
    "keras sum": (keep(lambda x: ops.sum(x, 1)), (12_544,), "severe", "sum", "12,544 terms: .* a mean of 5.2"),
    "tf sum": (keep(lambda x: tf.reduce_sum(x, 1)), (1024,), "warning", "sum", "1,024 terms: .* a mean of 64"),
    "norm": (keep(lambda x: tf.norm(x, axis=1)), (100,), "severe", "norm", "100 squares: .* root mean square of 26"),
    "sum of x * x": (keep(lambda x: ops.sum(x * x, 1)), (100,), "severe", "norm", "100 squares"),
    "l2 loss": (lambda x: x * tf.nn.l2_loss(x), (100,), "severe", "norm", "100 x an unknown number of squares"),
    "tf mean": (lambda x: tf.reduce_mean(x, 1), (4096, 3), "warning", "mean", "stops growing at 2,048 times"),
    "variance": (keep(lambda x: tf.math.reduce_variance(x, 1)), (64,), "severe", "variance", "above 256"),
    "mean of squares": (keep(lambda x: ops.mean(ops.square(x), 1)), (64,), "severe", "square", "above 256"),
    "exp": (ops.exp, (8,), "severe", "exp", "above 11.1"),
    "log": (lambda x: ops.log(ops.relu(x)), (8,), "severe", "log", "-inf"),
    "pow": (lambda x: ops.power(x, 3.0), (8,), "warning", "pow 3", "above 40.3"),
    "cumsum": (lambda x: ops.cumsum(x, 1), (4096,), "severe", "cumulative sum", "running sum of 4,096 terms"),
    "prod": (keep(lambda x: ops.prod(x, 1)), (64,), "severe", "product", "if they are above 1.19"),
    "softmax": (ops.softmax, (64,), "warning", "softmax", "64 values: .* become 0"),
    "entropy": (lambda x: -ops.log(ops.softmax(x)), (8,), "severe", "log of softmax", "from_logits"),
    "pooling": (
        lambda x: ops.average_pool(x, 50)[:, 0, 0],
        (50, 50, 2),
        "severe",
        "average pooling",
        "average of 2,500 values",
    ),
    "epsilon": (lambda x: x / (ops.abs(x) + 1e-12), (8,), "severe", "constant", "1e-12 is 0 in float16"),
    "mask": (lambda x: ops.where(x > 0, x, -1e9), (8,), "severe", "constant", r"-1e\+09 is infinite"),
    "exp of a quotient": (lambda x: ops.exp(ops.relu(x) / ops.relu(-x)), (8,), "severe", "exp", "above 11.1"),
    "exp of a part": (lambda x: ops.exp(tf.split(x, 2, axis=1)[1]), (8,), "severe", "exp", "above 11.1"),
    "exp into tanh": (lambda x: ops.tanh(ops.exp(x)), (8,), "severe", "exp", "above 11.1"),
    "logsumexp with another maximum": (
        keep(lambda x: ops.log(ops.sum(ops.exp(x - ops.max(x)), -1))),
        (8,),
        "severe",
        "log",
        "-inf",
    ),
    "product of halves": (
        keep(lambda x: ops.sum(x[:, :512] * x[:, 512:], -1)),
        (1024,),
        "warning",
        "sum",
        "512 terms: .* a mean of 128",
    ),
    "segments": (
        lambda x: tf.math.unsorted_segment_sum(x, tf.zeros(tf.shape(x)[0], "int32"), 1) + 0 * x,
        (8,),
        "warning",
        "scattered sum",
        "2,048 times a term",
    ),
    "division": (lambda x: x / (ops.abs(x) + 1e-6), (8,), "warning", "division", "can be 1e-06"),
    "focal": (lambda x: ops.log(ops.clip(ops.sigmoid(x), 1e-7, 1.0)), (8,), "severe", "log of sigmoid", "become 1e-07"),
    "rsqrt": (lambda x: ops.rsqrt(ops.relu(x)), (8,), "warning", "rsqrt", "gradient overflows"),
}


def audit_of_branches(functions, policy):
    """Audits one model with a planted layer for each function, and returns its findings by the name of the function."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    inputs, outputs = [], []
    for number, (function, shape) in enumerate(functions.values()):
        inputs.append(keras.Input(shape))
        planted = Planted(function, name=f"planted{number}")(inputs[-1])
        outputs.append(keras.layers.Dense(1, dtype="float32", name=f"head{number}")(planted))
    findings = {f"planted{number}": [] for number in range(len(functions))}
    for finding in audit(keras.Model(inputs, outputs)):
        findings[finding.layer].append(finding)
    keras.config.set_dtype_policy(before)
    return dict(zip(functions, findings.values(), strict=True))


@pytest.fixture(scope="module")
def hazards():
    """The findings of all planted hazards, in float16 and in float32."""
    functions = {name: case[:2] for name, case in HAZARDS.items()}
    return {policy: audit_of_branches(functions, policy) for policy in ("mixed_float16", "float32")}


@pytest.mark.parametrize("name", HAZARDS)
def test_a_planted_hazard_is_found_with_its_number(name, hazards):
    """In a custom layer, with the number that matters. In float32 there are no hazards."""
    *_, severity, op, risk = HAZARDS[name]
    found = [finding for finding in hazards["mixed_float16"][name] if finding.op == op]
    assert [(finding.severity, finding.dtype) for finding in found] == [(severity, "float16")]
    assert re.search(risk, found[0].risk + found[0].advice)
    assert found[0].source.startswith("test_audit.py:")
    in_float32 = [(finding.severity, finding.op) for finding in hazards["float32"][name]]
    assert in_float32 in ([], [("note", "log of softmax")], [("note", "log of sigmoid")])


SAFE = {
    "squares of bounded values": keep(lambda x: tf.reduce_sum(tf.square(tf.tanh(x)), -1)),
    "mean of bounded squares": keep(lambda x: tf.reduce_mean(tf.math.squared_difference(tf.tanh(x), 0.5), -1)),
    "exp of a negative square": lambda x: ops.exp(-ops.square(x)),
    "a root of what is above 0": lambda x: ops.sqrt(ops.abs(x) + 1e-2),
    "a fourth root": lambda x: ops.power(ops.abs(x) + 1e-3, 0.25),
    "a comparison with what is infinite": lambda x: ops.where(x > -1e9, x, 0.0),
    "a softmax by hand": lambda x: (e := ops.exp(x - ops.max(x, -1, keepdims=True))) / ops.sum(e, -1, keepdims=True),
    "a short position": lambda x: x + ops.cast(ops.arange(64), x.dtype),
    "exp of a difference to the maximum": lambda x: ops.exp(x - ops.max(x, 1, keepdims=True)),
    "logsumexp": keep(lambda x: ops.logsumexp(x, 1)),
    "tf logsumexp": keep(lambda x: tf.reduce_logsumexp(x, 1)),
    "exp of minus a square": lambda x: ops.exp(-ops.abs(x)),
    "sum of probabilities": keep(lambda x: ops.sum(ops.sigmoid(x), 1)),
    "sum of few": keep(lambda x: ops.sum(x[:, :16], 1)),
    "keras mean": keep(lambda x: ops.mean(x, 1)),
    "keras variance": keep(lambda x: ops.var(x, 1)),
    "gelu": lambda x: ops.gelu(x, approximate=True),
    "softplus": ops.softplus,
    "silu": ops.silu,
    "log of 1 and more": lambda x: ops.log(1.0 + ops.relu(x)),
    "square of what is bounded": lambda x: ops.square(ops.tanh(x)),
    "float32 inside": keep(lambda x: ops.sum(ops.square(ops.cast(x, "float32")), 1)),
    "cross-entropy by hand": lambda x: ops.relu(x) - x + ops.log1p(ops.exp(-ops.abs(x))),
    "an epsilon that float16 holds": lambda x: x / (ops.abs(x) + 1e-4),
    "a clip": lambda x: ops.clip(x, -1e9, 1e9),
    "attention": lambda x: keras.layers.Softmax(dtype="float32")(x),
}


@pytest.fixture(scope="module")
def safe():
    """The findings of all safe functions in float16."""
    return audit_of_branches({name: (function, (64,)) for name, function in SAFE.items()}, "mixed_float16")


@pytest.mark.parametrize("name", SAFE)
def test_safe_operations_are_not_reported(name, safe):
    """Bounded, protected or computed in float32: notes at most."""
    assert [finding for finding in safe[name] if finding.severity != "note"] == []


def test_sums_of_few_terms_are_not_reported():
    """A note from 32 on."""
    for count, said in ((31, []), (32, ["note"])):
        total = keep(lambda x, count=count: ops.sum(x[:, :count], 1))
        assert [finding.severity for finding in audit(model_of(total)) if finding.op == "sum"] == said


def test_sums_over_the_last_axis_do_not_stagnate():
    """Over the last axis TensorFlow adds up in parts."""
    assert found(model_of(keep(lambda x: tf.reduce_mean(x, -1)), (20_000,))) == []


def compiled(output, loss, shape=(8,)):
    """A classifier whose hidden layer is float16."""
    inputs = keras.Input(shape)
    model = keras.Model(inputs, output(keras.layers.Dense(8, name="hidden")(inputs)))
    model.compile(LossScaleOptimizer("sgd"), loss)
    return model


@pytest.mark.parametrize("loss", ["categorical_crossentropy", "sparse_categorical_crossentropy"])
def test_a_softmax_before_a_cross_entropy(loss):
    """Half-precision probabilities and their logarithm; with a float32 softmax Keras finds the logits by itself."""
    model = compiled(keras.layers.Dense(8, activation="softmax", name="out"), loss)
    assert found(model) == [("out", "severe", "softmax"), ("loss", "severe", "log of softmax")]
    assert "from_logits=True" in audit(model).findings[1].advice
    assert found(compiled(keras.layers.Dense(8, activation="softmax", dtype="float32"), loss)) == []


def test_a_half_precision_softmax_at_the_end():
    """It is severe, since a loss may take its logarithm."""
    inputs = keras.Input((8,))
    assert found(keras.Model(inputs, keras.layers.Softmax(name="out")(inputs))) == [("out", "severe", "softmax")]


def test_a_half_precision_output():
    """Logits in float16."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert found(compiled(keras.layers.Dense(8, name="out"), loss)) == [("out", "warning", "output")]


def test_a_cross_entropy_in_float16():
    """A custom loss that passes float16 logits to TensorFlow."""

    class Model(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(tf.cast(y, y_pred.dtype), y_pred))

    inputs = keras.Input((8,))
    model = Model(inputs, keras.layers.Dense(8, name="out")(inputs))
    model.compile("sgd")
    batch = np.ones((2, 8), "float32")
    expected = {("loss", "severe", "cross-entropy"), ("loss", "warning", "cast"), ("out", "warning", "output")}
    assert set(found(model, batch, batch)) >= expected


@pytest.mark.parametrize(
    ("function", "severity"),
    [
        (lambda x: ops.cast(x, "float16"), "severe"),
        (lambda x: tf.cast(x + 1, tf.float16), "severe"),
        (lambda x: ops.cast(ops.cast(x, "float32"), "float16"), "severe"),
        (lambda x: ops.cast(ops.cumsum(ops.ones_like(x), 1), "float16"), "warning"),
        (lambda x: ops.cast(ops.argmax(ops.one_hot(x, 64), -1), "float16"), None),
        (lambda x: ops.cast(ops.shape(x)[0] * ops.ones_like(x), "float16"), None),
        (lambda x: ops.cast(x > 3, "float16"), None),
        (lambda x: ops.one_hot(x, 8, dtype="float16")[:, 0], None),
    ],
    ids=["ids", "tf ids", "through float32", "positions", "classes", "a size", "a mask", "one-hot"],
)
def test_integers_in_float16(function, severity):
    """Integers above 2,048 are rounded; masks and one-hot vectors are exact."""
    casts = [finding for finding in audit(model_of(function, (8,), "int32", autocast=False)) if finding.op == "cast"]
    assert [finding.severity for finding in casts] == ([severity] if severity else [])
    assert all("above 2,048" in finding.risk for finding in casts)


def test_half_precision_variables():
    """Under the policy float16."""
    keras.config.set_dtype_policy("float16")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="dense")])
    assert found(model) == [("dense", "severe", "variables"), ("dense", "warning", "output")]
    assert "force_float32" not in str(audit(model)).splitlines()[-1]


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_constants_of_the_optimizer(policy):
    """Of the compiled one, with what becomes of them; not of a safe one, whose variables are fine, too."""
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="dense")])
    for optimizer in (keras.optimizers.Adam(), LossScaleOptimizer("adam")):
        model.compile(optimizer, "mse")
        (finding,) = [finding for finding in audit(model) if finding.op == "optimizer"]
        assert (finding.layer, finding.severity, finding.dtype) == (optimizer.name, "severe", policy)
        assert re.match("Adam: .* becomes", finding.risk)
        assert f"'mixed_{policy}'" in finding.advice
        assert "force_float32" not in str(audit(model)).splitlines()[-1]
    model.compile(keras.optimizers.SGD(weight_decay=1e-6), "mse")
    assert ("warning", "optimizer") in [kind[1:] for kind in found(model)]
    model.compile(type("Safe", (keras.optimizers.Adam,), {"float32_arithmetic": True})(), "mse")
    assert not {"variables", "optimizer"} & {finding.op for finding in audit(model)}


def test_widths_and_float32_remainders():
    """Reported for layers with many multiplications, except the last one."""
    inputs = keras.Input((64,))
    x = keras.layers.Dense(60, name="odd")(inputs)
    x = keras.layers.Dense(64, name="slow", dtype="float32")(x)
    x = keras.layers.Dense(64, name="fast")(x)
    model = keras.Model(inputs, keras.layers.Dense(8, name="head", dtype="float32")(x))
    notes = {(finding.layer, finding.op): finding.risk for finding in audit(model) if finding.severity == "note"}
    assert notes.keys() == {("odd", "width"), ("slow", "matrix product")}
    assert "units 60 (use 64)" in notes["odd", "width"]
    assert "31% of the model's multiplications" in notes["slow", "matrix product"]


def test_a_run_tells_where_values_overflow_first():
    """Layers after the first overflow are not reported."""
    inputs = keras.Input((64,))
    x = Planted(lambda x: x * 1000.0, name="grows")(inputs)
    x = Planted(lambda x: x * x, name="overflows")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head", dtype="float32")(x))
    runs = [finding for finding in audit(model, np.ones((2, 64), "float32")) if finding.op == "overflow"]
    assert [(finding.layer, finding.severity) for finding in runs] == [("overflows", "severe")]
    assert "128 of 128 values overflowed: in float32 they reach 1e+06" in runs[0].risk


@pytest.mark.slow
def test_a_run_is_the_same_where_functions_run_eagerly():
    """The audit still reads graphs, and restores the setting."""
    model, inputs = model_of(lambda x: x * x), np.full((2, 64), 300.0, "float32")
    expected = audit(model, inputs)
    tf.config.run_functions_eagerly(True)
    try:
        assert audit(model, inputs) == expected
        assert tf.config.functions_run_eagerly()
    finally:
        tf.config.run_functions_eagerly(False)
    assert [finding.op for finding in expected if finding.op == "overflow"]


def test_a_run_tells_what_vanishes_and_what_is_wrong():
    """Squares of small numbers, and an average of 90,000 threes that becomes 4."""
    vanishing = audit(model_of(lambda x: x * x), np.full((2, 64), 1e-5, "float32"))
    assert [(finding.layer, finding.severity) for finding in vanishing if finding.op == "underflow"] == [
        ("planted", "severe")
    ]
    inputs = keras.Input((300, 300, 1))
    pooled = keras.layers.AveragePooling2D(300, name="pool")(inputs)
    model = keras.Model(inputs, keras.layers.Flatten(dtype="float32")(pooled))
    wrong = [
        finding for finding in audit(model, np.full((1, 300, 300, 1), 3, "float32")) if finding.op == "wrong values"
    ]
    assert [(finding.layer, finding.severity) for finding in wrong] == [("pool", "severe")]
    assert "the mean is 4, in float32 3" in wrong[0].risk


def test_a_run_tells_of_gradients_at_the_present_loss_scale():
    """Keras's scale of 32,768 is too much for a mean of 64 values that are thousands."""
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(8, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32", kernel_initializer="ones")(hidden))
    model.compile("sgd", "mse")
    batch = np.full((4, 64), 100, "float32"), np.zeros((4, 1), "float32")
    assert any(
        "at a loss scale of 32,768" in finding.risk for finding in audit(model, *batch) if "gradient" in finding.op
    )


def test_nothing_in_the_model_changes():
    """Weights, moving averages, random states, policies and calls."""
    inputs = keras.Input((8,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(inputs))
    model = keras.Model(inputs, keras.layers.Dropout(0.5)(keras.layers.Softmax()(x)))
    model.compile("adam", "mse")
    before = [variable.numpy() for variable in model.variables]
    policies = [layer.dtype_policy.name for layer in model._flatten_layers()]
    audit(model, np.ones((4, 8), "float32"), np.ones((4, 8), "float32"))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert [layer.dtype_policy.name for layer in model._flatten_layers()] == policies
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    assert keras.config.dtype_policy().name == "mixed_float16"


class Subclassed(keras.Model):
    """Lists of layers, a shared one, a nested model and a sum in its own code."""

    def __init__(self):
        super().__init__(name="mine")
        self.blocks = [keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="a_1")]
        self.inner = keras.Sequential([keras.layers.Dense(8), Planted(ops.exp, name="deep")], name="inner")

    def call(self, x):
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return ops.sum(ops.tile(self.inner(x), (1, 1000)), axis=1, keepdims=True)


def test_subclassed_models_name_the_innermost_layer():
    """Also where names collide with the suffixes that TensorFlow gives repeated scopes."""
    model = Subclassed()
    model(np.ones((2, 8), "float32"))
    layers = {(finding.layer, finding.op) for finding in audit(model)}
    assert ("mine", "sum") in layers
    assert any(path.endswith("deep") and op == "exp" for path, op in layers)


def test_loops_and_nested_functions_are_read():
    """Operations in a `tf.function` and in the body of a loop."""

    @tf.function
    def nested(x):
        return tf.exp(x)

    assert ("planted", "severe", "exp") in found(model_of(nested))

    def loop(x):
        return tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, tf.exp(x)), [0, x])[1]

    assert ("planted", "severe", "exp") in found(model_of(loop))


def test_operations_in_functional_models_are_read():
    """`keras.ops` on symbolic tensors."""
    inputs = keras.Input((8192,))
    x = ops.sum(keras.layers.Activation("linear")(inputs), axis=1, keepdims=True)
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x))
    assert [(finding.op, finding.severity) for finding in audit(model)] == [("sum", "severe")]


def test_saved_models_have_the_same_findings(tmp_path):
    """Saving and loading does not change the findings."""
    model = compiled(keras.layers.Dense(8, activation="softmax"), "categorical_crossentropy")
    model.save(tmp_path / "model.keras")
    assert audit(keras.models.load_model(tmp_path / "model.keras")).findings == audit(model).findings


def test_a_float32_model_has_nothing_to_audit():
    """The table explains it."""
    keras.config.set_dtype_policy("float32")
    report = audit(compiled(keras.layers.Dense(8, activation="softmax"), "categorical_crossentropy"))
    assert len(report) == 0
    assert "Nothing computes in half precision" in str(report)


def test_the_table_groups_by_severity(monkeypatch):
    """Each severity has a heading, and the last line has counts."""
    monkeypatch.setenv("COLUMNS", "120")
    text = str(audit(model_of(lambda x: ops.exp(x) + ops.softmax(x))))
    assert text.index("severe: goes wrong on ordinary values") < text.index("warning: goes wrong on large or small")
    assert "planted (test_audit.py:" in text
    assert "1 severe, 1 warning, 0 notes" in text


@pytest.mark.parametrize("model", ["resnet", keras.Sequential([keras.layers.Dense(1)])])
def test_unbuilt_models_need_inputs(model):
    """The error names the argument."""
    with pytest.raises(ValueError, match="built"):
        audit(model)


class Two(keras.Model):
    """A model with two inputs, in a dict or as two arguments."""

    def call(self, inputs, second=None):
        return ops.exp(inputs["a"]) + inputs["b"] if second is None else ops.exp(inputs) + second


def test_inputs_are_known_from_the_build():
    """Also structures of inputs. Two arguments need a batch."""
    model, array = Two(), np.ones((1, 2), "float32")
    model({"a": array, "b": array})
    assert any(finding.op == "exp" for finding in audit(model))
    model = Two()
    model(array, array)
    with pytest.raises(ValueError, match="batch"):
        audit(model)


def test_given_integers_are_judged_by_their_values():
    """Pixels up to 255 are exact in float16."""
    model = model_of(lambda x: ops.cast(x, "float16"), (8,), "int32", autocast=False)
    assert [finding.op for finding in audit(model, np.full((2, 8), 255)) if finding.op == "cast"] == []
    assert [finding.op for finding in audit(model, np.full((2, 8), 4097)) if finding.op == "cast"] == ["cast"]


@pytest.mark.slow
def test_layers_after_an_overflow_are_not_reported():
    """Layers that only propagate the overflow are not reported."""
    inputs = keras.Input((4, 8))
    x = Planted(lambda x: x * x * 1000.0, name="overflows")(keras.layers.Dense(8, kernel_initializer="ones")(inputs))
    for number in range(3):
        x = keras.layers.Dense(8, name=f"after{number}")(keras.layers.LayerNormalization()(x))
    x = keras.layers.LSTM(4, name="loop")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x))
    run = audit(model, np.full((2, 4, 8), 10, "float32"))
    assert [finding.layer for finding in run if finding.op == "overflow"] == ["overflows"]


@keras.saving.register_keras_serializable("test_audit")
class Stateful(keras.layers.Layer):
    """Doubles what it multiplies by, and draws noise from a generator of its own."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones", trainable=False)
        self.noise = keras.random.SeedGenerator(0)

    def call(self, x):
        y = x * self.factor + keras.random.normal((8,), seed=self.noise, dtype=x.dtype)
        self.factor.assign(2 * self.factor)
        return y + keras.random.normal((8,), dtype=x.dtype)


def test_states_and_noise_are_not_differences():
    """Layer states and random states are restored after each run."""
    model = keras.Sequential([keras.Input((8,)), Stateful(), keras.layers.Activation("linear", dtype="float32")])
    keras.utils.set_random_seed(1)
    expected = keras.random.normal((3,)).numpy()
    keras.utils.set_random_seed(1)
    assert [finding.op for finding in audit(model, np.ones((4, 8), "float32")) if finding.op == "wrong values"] == []
    assert float(model.layers[0].factor) == 1.0
    np.testing.assert_array_equal(keras.random.normal((3,)).numpy(), expected)


@pytest.mark.parametrize(
    "form", ["names", *(pytest.param(form, marks=pytest.mark.slow) for form in ("list", "one loss"))]
)
def test_targets_and_losses_are_paired_as_in_fit(form):
    """Labels of one dimension, an output without a loss and names in any order reach the losses as in `fit`."""
    calls = []

    def loss(y, outputs):
        calls.append((tuple(y.shape), tuple(outputs.shape), outputs.dtype.name))
        return ops.mean(ops.square(y - outputs), axis=-1)

    inputs, x, y = keras.Input((8,)), np.ones((4, 8), "float32"), np.ones(4)
    outputs = [keras.layers.Dense(1, name="b")(inputs), keras.layers.Dense(3, name="a")(inputs)]
    losses, targets = {
        "list": ([loss, None], y),
        "names": ({"a": loss, "b": loss}, {"a": np.ones((4, 3)), "b": y}),
        "one loss": (loss, [y, np.ones((4, 3))]),
    }[form]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", losses, run_eagerly=True)
    assert audit(model, x, targets).loss
    assert not model._compile_loss.built
    in_audit = {*calls}
    calls.clear()
    model.evaluate(x, targets, batch_size=4, verbose=0)
    assert in_audit == {*calls}


class Tower(keras.Model):
    """Takes integers of an unknown shape."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(50, 8), keras.layers.Dense(1, name="head")

    def call(self, x):
        return self.head(self.embedding(x[:, 0]))


def test_a_model_that_is_not_built_is_built_for_the_inputs():
    """As in `fit`, except for its optimizer."""
    model = Tower()
    model.compile("adam", "mse")
    run = audit(model, np.ones((4, 2), "int64"), np.ones(4))
    assert (run.ran, run.loss, run.dtypes) == (True, True, {"float16": 2})
    assert [finding.path.rpartition("/")[2] for finding in model.variables] == ["embeddings", "kernel", "bias"]
    assert not model.optimizer.built


@pytest.mark.slow
def test_the_loss_is_that_of_fit():
    """The mean over the batch of a loss by name, times its weight: 1,024 samples do not make its gradient overflow."""
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32", name="head")(keras.layers.Dense(8)(inputs)))
    batch = np.ones((1024, 8), "float32"), np.zeros((1024, 1), "float32")
    model.compile("sgd", "mse")
    assert [finding.op for finding in audit(model, *batch) if "gradient" in finding.op] == []
    model.compile("sgd", "mse", loss_weights=[1e6])
    assert [finding.op for finding in audit(model, *batch) if "gradient" in finding.op] == ["gradient overflow"]


def test_a_loss_that_cannot_be_made_up_is_left_out():
    """The loss needs targets. The table says that it was not read."""

    def loss(y, x):
        return ops.mean(x) * y["weight"]

    model = model_of(ops.exp)
    model.compile("sgd", loss)
    report = audit(model, np.ones((2, 64), "float32"))
    assert ("planted", "severe", "exp") in [(finding.layer, finding.severity, finding.op) for finding in report]
    assert "The loss was not read" in str(report)
    assert force_float32(model) == ["planted"]


@pytest.mark.slow
def test_ctc_can_be_read():
    """Its gradient is a function that C++ creates, without a Python graph."""
    inputs = keras.Input((12, 8))
    model = keras.Model(inputs, keras.layers.Dense(6, dtype="float32")(Planted(ops.exp, name="planted")(inputs)))
    model.compile("adam", keras.losses.CTC())
    assert ("planted", "severe", "exp") in found(model, np.ones((2, 12, 8), "float32"), np.ones((2, 3), "int32"))


def test_a_call_on_the_instance_is_restored():
    """A `call` that is set on the instance is restored."""
    model = model_of(ops.relu)
    planted = model.get_layer("planted")
    planted.__dict__["call"] = ops.tanh
    audit(model)
    assert planted.__dict__["call"] is ops.tanh


class Block(keras.layers.Layer):
    """A layer without `build`, whose sublayers have no path in Keras."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.softmax = keras.layers.Softmax(name="softmax")

    def call(self, x):
        return self.softmax(x)


def test_layers_of_one_name_are_told_apart_and_can_be_forced_by_theirs():
    """The names of the enclosing layers are part of the path."""
    inputs = keras.Input((64,))
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(Block(name="b")(Block(name="a")(inputs))))
    layers = [finding.layer for finding in audit(model) if finding.op == "softmax"]
    assert layers == ["a/softmax", "b/softmax"]
    assert force_float32(model, layers[0]) == ["a/softmax"]


def test_constants_of_decorated_functions_are_their_own():
    """Two constants of the same name, in two functions of the same name."""

    def add(number):
        return tf.function(lambda x: x / (tf.abs(x) + number), autograph=False)

    inputs = keras.Input((8,))
    x = Planted(add(1.0), name="one")(Planted(add(1e-12), name="tiny")(inputs))
    report = audit(keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x)))
    assert [(finding.layer, finding.risk[:5]) for finding in report if finding.op == "constant"] == [("tiny", "1e-12")]


MODELS = {
    "resnet": lambda: keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3)),
    "mobilenet": lambda: keras.applications.MobileNetV2(weights=None, input_shape=(64, 64, 3)),
    "efficientnet": lambda: keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3)),
    "convnext": lambda: keras.applications.ConvNeXtTiny(weights=None, input_shape=(64, 64, 3)),
}


# Each takes about twenty seconds. The Transformer below is in the default suite.
SLOW = [("resnet", "mixed_bfloat16")]
PRODUCT = itertools.product(MODELS, ("mixed_float16", "mixed_bfloat16"))


@pytest.mark.parametrize(
    ("name", "policy"), [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else thorough) for case in PRODUCT]
)
def test_well_made_models_have_few_findings(name, policy):
    """The softmax at the end and its logarithm in the loss; for bfloat16, a long bias gradient in ResNet."""
    keras.config.set_dtype_policy(policy)
    model = MODELS[name]()
    model.compile("sgd", "categorical_crossentropy")
    severity = "severe" if policy == "mixed_float16" else "warning"
    expected = [(severity, "softmax"), (severity, "log of softmax")]
    if (name, policy) == ("resnet", "mixed_bfloat16"):
        expected.append(("warning", "bias gradient"))
    assert [(finding.severity, finding.op) for finding in audit(model)] == expected
    if policy == "mixed_float16":
        whole = [finding for finding in force_float32(model) if not finding.endswith(": activation")]
        # Pixels up to 255 less their mean: EfficientNet and ConvNeXt begin with that.
        assert len(whole) == (name in ("efficientnet", "convnext"))
        assert all("normalization" in finding for finding in whole)
        assert found(model, severities=("severe",)) == []


def transformer():
    ids = keras.Input((64,), dtype="int32")
    x = keras.layers.Embedding(1000, 64)(ids) + keras.layers.Embedding(64, 64)(ops.arange(64))
    attended = keras.layers.MultiHeadAttention(4, 16, dropout=0.1)(x, x, use_causal_mask=True)
    x = keras.layers.LayerNormalization()(x + attended)
    hidden = keras.layers.Dense(256, activation="gelu")(x)
    x = keras.layers.LayerNormalization()(x + keras.layers.Dense(64)(hidden))
    return keras.Model(ids, keras.layers.Dense(1000, name="out")(x))


@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
def test_a_transformer_has_few_findings(policy):
    """Its output, and the half-precision softmax of attention with dropout."""
    keras.config.set_dtype_policy(policy)
    model = transformer()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    softmax = "warning" if policy == "mixed_float16" else "note"
    assert sorted((finding.severity, finding.op) for finding in audit(model)) == sorted(
        [(softmax, "softmax"), ("warning", "output")]
    )
    assert len(force_float32(model)) == 2
    assert [(finding.severity, finding.op) for finding in audit(model)] == []


class AddsLoss(keras.layers.Layer):
    """A user's layer that adds a loss."""

    def call(self, x):
        self.add_loss(keras.ops.sum(keras.ops.square(x)))
        return x


@pytest.mark.parametrize(
    "layer",
    [
        lambda: AddsLoss(name="adds"),
        pytest.param(lambda: keras.layers.ActivityRegularization(l2=1.0, name="adds"), marks=pytest.mark.slow),
        pytest.param(lambda: keras.layers.Dense(64, activity_regularizer="l2", name="adds"), marks=pytest.mark.slow),
    ],
    ids=["add_loss", "ActivityRegularization", "activity_regularizer"],
)
def test_added_losses_are_reported_for_their_layers(layer):
    """`force_float32` repairs them. The losses of the last call are kept."""
    model = keras.Sequential([keras.Input((64,)), layer(), keras.layers.Dense(1, dtype="float32", name="head")])
    model(np.ones((2, 64)))
    before = model.losses
    assert found(model) == [("adds", "severe", "norm"), ("adds", "warning", "added loss")]
    assert all(one is other for one, other in zip(before, model.losses, strict=True))
    force_float32(model)
    assert found(model, np.ones((2, 64))) == []


class OwnLoss(keras.Model):
    """A model that sums the added losses itself."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(keras.ops.cast(y_pred, "float32") - y)) + sum(self.losses)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [("mixed_float16", OwnLoss), pytest.param("mixed_bfloat16", keras.Model, marks=pytest.mark.slow)],
)
def test_added_losses_meet_that_of_compile(policy, kind):
    """In half precision Keras's `fit` raises a TypeError. `force_float32` makes the step work."""
    keras.config.set_dtype_policy(policy)
    hidden = keras.layers.Dense(8, activity_regularizer="l2", name="h")(x := keras.Input((8,)))
    model = kind(x, keras.layers.Dense(1, dtype="float32")(hidden))
    model.compile("sgd", "mse", run_eagerly=True)
    batch = np.ones((4, 8), "float32"), np.ones((4, 1), "float32")
    assert ("h", "warning", "added loss") in found(model, *batch)
    assert len(measure_gradients(model, batch, precision=policy.removeprefix("mixed_"))) == 6
    assert force_float32(model) == ["h: activity regularizer"]
    assert found(model) == []
    model.fit(*batch, verbose=0)


def test_weight_regularizers_are_reported_for_their_layers():
    """If the variables are float16."""
    layer = keras.layers.Dense(64, kernel_regularizer="l2", name="adds", dtype="float16")
    model = keras.Sequential([keras.Input((64,)), layer, keras.layers.Dense(1, dtype="float32", name="head")])
    assert ("adds", "severe", "norm") in found(model)
    force_float32(model)
    assert found(model) == [("adds", "severe", "variables")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["float8", "int4"])
@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_quantized_layers_are_read_as_they_compute(mode):
    """With and without data. The float32 run is quantized too."""
    hidden, out = keras.layers.Dense(16, "relu", name="hidden"), keras.layers.Dense(3, "softmax", name="out")
    model = keras.Sequential([keras.Input((8,)), hidden, out])
    model.quantize(mode)
    model.compile("sgd", "mse")
    for given in ((), (np.ones((2, 8)), np.ones((2, 3)))):
        findings = audit(model, *given)
        assert ("out", "severe", "softmax") in [(found.layer, found.severity, found.op) for found in findings]
        assert {finding.layer for finding in findings} <= {"out", "hidden", "loss"}
    force_float32(model)
    assert found(model, np.ones((2, 8)), np.ones((2, 3))) == []
