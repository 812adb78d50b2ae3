"""Promotion: scripts and custom layers see float32, Keras layers compute in half precision."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow, tf
from keras import layers, ops
from thorough import covering

import tfmixed

if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

pytestmark = pytest.mark.filterwarnings("ignore:policy .* is slow here")
HALVES = ["float16", "bfloat16"]
X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")


def dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


class Spy(layers.Layer):
    """A custom layer that records the dtypes in its `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)
        self.dtypes = None

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.scale = self.add_weight(shape=(4,), initializer="ones")

    def call(self, x):
        inside = self.dense(x)
        self.dtypes = {dtype(x), dtype(inside), dtype(self.scale * 1.0)}
        return inside * self.scale

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 4)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer, self.top = Spy(), layers.Dense(1)

    def call(self, x):
        return self.top(self.layer(x)) + np.float32(1)


def functional(*stack, shape=(8,)):
    x = inputs = keras.Input(shape)
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


def trained(model, x=X, epochs=1, optimizer="sgd"):
    model.compile(optimizer, "mse")
    return model.fit(x, x[..., :1], epochs=epochs, batch_size=16, shuffle=False, verbose=0).history["loss"]


BUILDERS = {"functional": lambda: functional(layers.Dense(4), Spy(), layers.Dense(1)), "subclassed": Subclassed}


@pytest.mark.parametrize(("half", "build"), covering(1, HALVES, BUILDERS))
def test_custom_code_and_scripts_see_float32(half, build):
    """In inputs, variables and outputs of Keras layers, and in the outputs of a model."""
    tfmixed.set_policy(f"mixed_{half}")
    model = build()
    assert np.isfinite(trained(model)).all()
    spy = next(layer for layer in model._flatten_layers() if isinstance(layer, Spy))
    assert spy.dtypes == {"float32"}
    assert spy.dense.compute_dtype == half
    assert spy.dtype_policy.name == f"mixed_{half}"  # passed on to sublayers
    assert dtype(model(X)) == model.predict(X, verbose=0).dtype == "float32"
    assert dtype(model.layers[-1](np.ones((1, 4)))) == "float32"


class OfKerasHub(layers.Layer):
    """A layer written for half precision."""

    def call(self, x):
        self.received = dtype(x)
        return x


OfKerasHub.call.__module__ = "keras_hub.layers"


def test_keras_layers_keep_half_precision_among_themselves():
    """In nested graphs, symbolic and eager; layers of KerasHub, too."""
    tfmixed.set_policy("mixed_bfloat16")
    graph = functional(layers.Dense(4), keras.Sequential([layers.LSTM(4, return_sequences=True)]), shape=(3, 8))
    last = OfKerasHub()
    whole = functional(graph, last, shape=(3, 8))
    assert {layer.output.dtype for layer in (*graph.layers[1:], *whole.layers[1:])} == {"bfloat16"}
    assert dtype(whole(ops.ones((2, 3, 8)))) == "float32"
    assert last.received == "bfloat16"


@needs_tensorflow
def test_products_of_keras_layers_stay_in_half_precision():
    """Also inside custom layers and models."""
    tfmixed.set_policy("mixed_bfloat16")
    model = Subclassed()
    model(X)
    graph = tf.function(model).get_concrete_function(tf.TensorSpec((16, 8))).graph
    products = [op.outputs[0].dtype for op in graph.get_operations() if op.type == "MatMul"]
    assert products == [tf.bfloat16, tf.bfloat16]


class Cell(layers.Layer):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.state_size, self.dense = units, layers.Dense(units)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs, states):
        output = self.dense(inputs) + states[0] * ops.ones((), "float32")
        return output, [output]


class Doubled(layers.Dense):
    def call(self, x):
        return super().call(x) * ops.convert_to_tensor(np.float32(2))


def double(x):
    return x * ops.convert_to_tensor(np.float32(2))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Doubled(4), "float32"),
        (lambda: layers.Lambda(double, output_shape=(3, 8)), "float32"),
        (lambda: layers.Dense(4, activation=double), "bfloat16"),
        (lambda: layers.TimeDistributed(Spy()), "float32"),
        (lambda: layers.RNN(Cell(), return_sequences=True), "float32"),
        (lambda: layers.RNN([layers.LSTMCell(3), Cell()], return_sequences=True), "float32"),
        (lambda: layers.Rescaling(2.0), "float32"),
    ],
    ids=["subclass", "Lambda", "activation", "TimeDistributed", "cell", "cells", "preprocessing"],
)
@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["call", "fit"])
def test_all_kinds_of_custom_code(make, expected, train):
    """Symbolic outputs have the dtype of real ones."""
    tfmixed.set_policy("mixed_bfloat16")
    layer, dtypes = make(), []
    tail = layers.Lambda(lambda x: (dtypes.append(dtype(x)), x)[1], output_shape=lambda shape: shape)
    tail.autocast = False  # receives the dtype of the layer's output
    model, x = functional(layers.Dense(8), layer, tail, layers.Dense(1), shape=(3, 8)), np.stack([X] * 3, 1)
    assert layer.output.dtype == expected
    assert np.isfinite(trained(model, x) if train else ops.convert_to_numpy(model(x))).all()
    assert dtypes[-1] == expected


@pytest.mark.parametrize("half", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_losses_of_layers_are_computed_in_float32(half):
    """The square of 300 overflows in float16."""
    tfmixed.set_policy(f"mixed_{half}")
    regularized = layers.Dense(1, "relu", kernel_initializer="ones", activity_regularizer=keras.regularizers.L2(1.0))
    model = functional(regularized, layers.ActivityRegularization(l1=1.0), shape=(1,))
    if BACKEND == "jax":  # where losses are for `stateless_call`
        variables = model.trainable_variables, model.non_trainable_variables
        losses = model.stateless_call(*variables, ops.array([[300.0]]), return_losses=True)[2]
    else:
        model(ops.array([[300.0]]))
        losses = model.losses
    assert [(dtype(loss), float(ops.convert_to_numpy(loss))) for loss in losses] == [
        ("float32", 90000.0),
        ("float32", 300.0),
    ]
    assert trained(model, np.full((16, 1), 300, "float32"))[0] > 90000
    assert regularized.get_config()["activity_regularizer"]["class_name"] == "L2"


def test_calls_of_a_layer_may_overlap():
    """As in threads and replicas: the first call ends before the second, and the layer keeps its functions."""
    tfmixed.set_policy("mixed_bfloat16")
    entered, ended, dtypes = threading.Event(), threading.Event(), []

    def overlapping(x):
        dtypes.append(dtype(x))
        if threading.current_thread() is second:
            entered.set()
            ended.wait(9)
        else:
            second.start()
            entered.wait(9)
        return x

    layer = layers.Dense(2, activation=overlapping, activity_regularizer="l2")
    layer.build((1, 2))
    second = threading.Thread(target=layer, args=(ops.ones((1, 2)),))
    layer(ops.ones((1, 2)))
    ended.set()
    second.join()
    assert dtypes == ["float32", "float32"]
    assert vars(layer)["activation"] is layer.activation is overlapping
    assert type(layer.activity_regularizer) is type(vars(layer)["activity_regularizer"]) is keras.regularizers.L2


def test_sublayers_made_in_a_call_get_the_regularizer_itself():
    """Keras reads it from the running layer. Layers have no additional attributes."""
    tfmixed.set_policy("mixed_bfloat16")
    attention = layers.GroupQueryAttention(4, 2, 1, activity_regularizer="l2")
    attention(*[ops.ones((1, 3, 8))] * 2)
    made = [layer.activity_regularizer for layer in attention._flatten_layers()]
    assert {type(regularizer) for regularizer in made} == {keras.regularizers.L2, type(None)}
    assert not hasattr(layers.Flatten(), "activation")
    other = layers.Dense(2, activation=layers.LeakyReLU())
    assert isinstance(other.activation, layers.LeakyReLU)
    del other.activation
    assert not hasattr(other, "activation")


def test_masks_survive():
    """In the outputs that a script receives."""
    tfmixed.set_policy("mixed_bfloat16")
    embedded = layers.Embedding(9, 2, mask_zero=True)(ops.array([[1, 0]]))
    assert dtype(embedded) == "float32"
    assert ops.convert_to_numpy(embedded._keras_mask).tolist() == [[True, False]]


@needs_tensorflow
@pytest.mark.parametrize("half", HALVES)
def test_normalization_adapts_to_datasets_of_any_magnitude(half):
    """Keras raises a dtype error, or rounds years and incomes to eight bits."""
    tfmixed.set_policy(f"mixed_{half}")
    x = np.stack([90_000 + 20_000 * X[:, 0], 2005 + X[:, 1]], 1)
    layer = layers.Normalization()
    layer.adapt(tf.data.Dataset.from_tensor_slices(x).batch(4))
    np.testing.assert_allclose(layer(x), (x - x.mean(0)) / x.std(0), atol=1e-2)


def test_a_layer_keeps_the_promotion_of_its_creation():
    """Like its policy; `promote=False` and other policies do not change new layers."""
    with tfmixed.policy_scope("mixed_bfloat16"):
        promoting = Subclassed()
    with tfmixed.policy_scope("mixed_bfloat16", promote=False):
        plain = layers.Dense(1)
    assert promoting.predict(X, verbose=0).dtype == "float32"
    assert dtype(plain(X)) == "bfloat16"
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert Spy().compute_dtype == dtype(layers.Dense(1)(X)) == "bfloat16"


def test_files_do_not_change(tmp_path):
    """Keras alone reads them; loaded layers promote if new layers do."""
    tfmixed.set_policy("mixed_bfloat16")
    model = functional(layers.Dense(4), Doubled(4))
    model.save(tmp_path / "model.keras")
    configs = [layer.get_config()["dtype"] for layer in model.layers[1:]]
    keras.config.set_dtype_policy("mixed_bfloat16")
    tfmixed._islands.promotion.switch(False)
    assert configs == [layer.get_config()["dtype"] for layer in functional(layers.Dense(4), Doubled(4)).layers[1:]]
    tfmixed._islands.promotion.switch(True)
    loaded = keras.models.load_model(tmp_path / "model.keras", {"Doubled": Doubled})
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert loaded.layers[-1].compute_dtype == "float32"


class Sampling(layers.Layer):
    def call(self, inputs):
        mean, log_var = inputs
        self.add_loss(-1e-2 * tf.reduce_mean(1 + log_var - tf.square(mean) - tf.exp(log_var)))
        return mean + tf.exp(0.5 * log_var) * tf.random.stateless_normal(tf.shape(mean), (0, 1))


class Adversaries(keras.Model):
    """A GAN with a gradient penalty, in one step."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(8)])
        self.critic = keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(1)])

    def train_step(self, data):
        real = data[0]
        labels = tf.concat([tf.zeros((16, 1)), tf.ones((16, 1))], 0)
        with tf.GradientTape() as tape:
            fake = self.generator(real[:, ::-1], training=True)
            between = real + 0.5 * (fake - real)
            with tf.GradientTape() as inner:
                inner.watch(between)
                answer = self.critic(between)
            penalty = tf.square(tf.norm(inner.gradient(answer, between), axis=1) - 1.0)
            error = tf.square(self.critic(tf.concat([fake, real], 0)) - labels)
            loss = tf.reduce_mean(error) + tf.reduce_mean(penalty) + tf.reduce_mean(tf.square(fake - real))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"error": loss}


def adversaries():
    model = Adversaries()
    model.compile("adam", auto_scale_loss=False)
    return model


def autoencoder():
    inputs = keras.Input((8,))
    hidden = layers.Dense(16, "tanh", activity_regularizer="l2")(inputs)
    code = Sampling()([layers.Dense(4)(hidden), layers.Dense(4)(hidden)])
    code = layers.Lambda(lambda x: x * tf.constant([1.0, 2.0, 3.0, 4.0]))(code)
    model = keras.Model(inputs, layers.Dense(8)(code))
    model.compile("adam", loss=lambda t, p: tf.reduce_mean(tf.square(t - p)), metrics=[lambda t, p: t - p])
    return model


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize("build", [autoencoder, adversaries])
@pytest.mark.parametrize("half", HALVES)
def test_scripts_written_for_float32_train(half, build):
    """With float32 noise, constants, labels and images in custom layers and training steps."""
    curves = []
    for policy in ("float32", f"mixed_{half}"):
        tfmixed.set_policy(policy)
        keras.utils.set_random_seed(0)
        history = build().fit(X, X, epochs=8, batch_size=16, shuffle=False, verbose=0).history
        curves.append([float(value) for value in history.get("error") or history["loss"]])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)
    assert curves[1][-1] < curves[1][0]


def explained(run, capfd):
    """Returns the lines that `tfmixed run` prints for the exception of a function."""
    from tfmixed._cli.run import dtype_mismatch

    try:
        run()
    except Exception as error:
        dtype_mismatch.explain(error)
    else:
        pytest.fail("no exception")
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("tfmixed: ")]


def half(*shape):
    return ops.ones(shape or 2, "float16")


def single(*shape):
    return ops.ones(shape or 2, "float32")


def loop(x):
    return tf.while_loop(lambda _: tf.constant(True), lambda x: tf.cast(x, "float32"), [x])


MIXED = {
    "tensorflow": {
        "sum": lambda: half() + single(),
        "concat": lambda: tf.concat([single(), half()], 0),
        "where": lambda: tf.where([True, False], half(), single()),
        "einsum": lambda: tf.einsum("i,i->", half(), single()),
        "conversion": lambda: tf.convert_to_tensor(half(), "float32"),
        "assignment": lambda: tf.Variable([1.0, 1.0]).assign_add(half()),
        "graph": lambda: tf.function(lambda x: x + single())(half()),
        "loop": lambda: tf.function(loop)(half()),
        "branches": lambda: tf.function(lambda x: tf.cond(x[0] > 0, half, single))(half()),
        "TensorArray": lambda: tf.TensorArray("float32", 2).write(0, half()),
        "ops.conv": lambda: ops.conv(half(1, 4, 1), np.ones((1, 1, 1), "float32")),
        "layer": lambda: Doubled(4)(X),
    },
    "jax": {
        "concat": lambda: jax.lax.concatenate([half(), single()], 0),
        "loop": lambda: jax.lax.fori_loop(0, 2, lambda _, x: x + single(), half()),
    },
    "torch": {
        "product": lambda: half(2, 2) @ single(2, 2),
        "Linear": lambda: torch.nn.Linear(2, 2, device=half().device)(half(2, 2)),
        "index": lambda: single().__setitem__(ops.array([0]), half(1)),
    },
}[BACKEND]


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes_are_explained(name, capfd):
    """With the line of the script, the policy, and a remedy."""
    keras.config.set_dtype_policy("mixed_float16")
    [line] = explained(MIXED[name], capfd)
    assert "test_promotion.py:" in line
    assert "mixed_float16" in line
    assert "tf.cast(x, y.dtype)" in line


def test_operations_without_half_precision_get_other_advice(capfd):
    """Their input has to be cast, not another operand."""
    keras.config.set_dtype_policy("mixed_float16")
    for run in (lambda: ops.rfft(half()), lambda: ops.svd(half(2, 2))):
        [line] = explained(run, capfd)
        assert f"test_promotion.py:{run.__code__.co_firstlineno} " in line
        assert 'keras.ops.cast(x, "float32")' in line


OTHER = {
    "number": lambda: float("half"),
    "shapes": lambda: half() + half(3),
    "policy": lambda: layers.Dense(2, dtype="mixed_half"),
    "raised": lambda: (_ for _ in ()).throw(ValueError("half of float32")),
    "rank": lambda: layers.Conv2D(2, 1)(half(2, 2)),
}
if BACKEND == "tensorflow":
    OTHER |= {
        "double": lambda: tf.add(half(), tf.ones(2, "float64")),
        "halves": lambda: tf.add(half(), tf.ones(2, "bfloat16")),
        "own": lambda: (_ for _ in ()).throw(ValueError("expected float32 but got half")),
    }


@pytest.mark.parametrize("name", OTHER)
def test_other_errors_are_not_explained(name, capfd):
    """Although their messages name dtypes."""
    keras.config.set_dtype_policy("mixed_float16")
    assert explained(OTHER[name], capfd) == []


@needs_tensorflow
def test_errors_are_explained_only_under_half_precision(capfd):
    """By the global policy, or by that of the running layer."""
    assert explained(MIXED["sum"], capfd) == []
    [line] = explained(lambda: Doubled(4, dtype="mixed_float16")(X), capfd)
    assert "policy mixed_float16" in line


SCRIPT = """
import keras, numpy as np, tensorflow as tf

class Own(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        return x * self.scale + tf.ones(4)

for layers in ([Own()], [keras.layers.Dense(4), Own(), keras.layers.Dense(1)]):
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("adam", loss=lambda t, p: tf.reduce_mean(tf.square(t - p)))
    model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    print(model(np.ones((1, 4))).dtype.name)
keras.layers.Dense(4)(np.ones((1, 4))) + tf.ones(4, "float16")
"""


@pytest.mark.slow
@needs_tensorflow
def test_a_run_promotes_and_explains_errors(tmp_path):
    """A model of custom layers alone needs no loss scale, and is not refused."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "tfmixed", "run", "--policy", "mixed_float16", "train.py"]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(tfmixed.__file__))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout.split(), done.returncode) == (["float32", "float32"], 1), done.stderr
    printed = [line for line in done.stderr.splitlines() if line.startswith("tfmixed:")]
    place = f"train.py:{len(SCRIPT.splitlines())}"
    assert printed[-2].startswith(f"tfmixed: {place} ")
    assert "mixed_float16" in printed[-2]
    assert "promotion.py" not in done.stderr
