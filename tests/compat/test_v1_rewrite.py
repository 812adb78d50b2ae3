"""The graph rewrite: affected sessions and functions, messages, errors and supported optimizers."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf1
from tensorflow.python.training.experimental import mixed_precision_global_state
from tf1 import V1, X, Y

import tfmixed
import tfmixed.compat.v1 as shim
from tfmixed import hardware
from tfmixed.compat.v1 import conversion_report, graph_rewrite

fast = pytest.mark.skipif(hardware.describe().policy != "mixed_bfloat16", reason="a CPU that is fast in bfloat16")
# Messages for machines without fast half precision have their own tests.
pytestmark = pytest.mark.filterwarnings("ignore:The graph rewrite to bfloat16 is not fast")
OFF, ON = 2, 1  # of RewriterConfig.Toggle


@pytest.fixture(autouse=True)
def _switched_off_again():
    yield
    if graph_rewrite.is_enabled():
        shim.disable_mixed_precision_graph_rewrite()
    assert tf.config.optimizer.get_experimental_options().get("auto_mixed_precision_onednn_bfloat16") in (None, False)
    assert not mixed_precision_global_state.is_mixed_precision_graph_rewrite_enabled()


def enable(opt=None, **arguments):
    return shim.enable_mixed_precision_graph_rewrite(opt or V1.train.AdamOptimizer(0.05), **arguments)


def configured(toggle=0):
    config = V1.ConfigProto()
    config.graph_options.rewrite_options.auto_mixed_precision = toggle
    return config


def converted(config=None):
    """Returns the number of converted products in a training step of a small network."""
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        train = V1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with tf1.session(config) as session:
            return conversion_report(session, train, {x: X, y: Y}).converted.get("MatMul", 0)


@fast
def test_sessions_with_and_without_a_configuration(capsys):
    """The dtype and the reason are printed. A configuration can opt out."""
    assert converted() == 0
    enable()
    assert "graph rewrite to bfloat16: this CPU multiplies bfloat16" in capsys.readouterr().err
    assert [converted(config) for config in (None, V1.ConfigProto(), configured(ON), configured(OFF))] == [5, 5, 5, 0]
    shim.disable_mixed_precision_graph_rewrite()
    assert [converted(config) for config in (None, V1.ConfigProto())] == [0, 0]


@fast
def test_configuration_is_copied():
    """Its other options remain in effect."""
    enable()
    config = V1.ConfigProto(allow_soft_placement=True)
    with V1.Session(config=config) as session:
        assert session._config.allow_soft_placement
        assert session._config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 == ON
    assert config == V1.ConfigProto(allow_soft_placement=True)


@fast
def test_monitored_sessions():
    """They create their session themselves."""
    enable()
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        train = V1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with V1.train.MonitoredTrainingSession(config=V1.ConfigProto()) as session:
            assert conversion_report(session, train, {x: X, y: Y}).converted["MatMul"] == 5


@fast
def test_interactive_sessions():
    """TensorFlow runs no pass there without a change of the configuration."""
    enable()
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        train = V1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with contextlib.closing(V1.InteractiveSession()) as session:
            session.run(V1.global_variables_initializer())
            assert conversion_report(session, train, {x: X, y: Y}).converted["MatMul"] == 5


def test_grappler_optimizes_interactive_sessions_while_the_rewrite_is_enabled():
    """On any machine, a product and its bias become one kernel."""
    fused = []
    for switch in (lambda: None, lambda: enable(dtype="bfloat16"), shim.disable_mixed_precision_graph_rewrite):
        switch()
        with tf.Graph().as_default(), contextlib.closing(V1.InteractiveSession()) as session:
            x = V1.placeholder(tf.float32, [4, 4])
            result = tf.identity(tf.nn.relu(tf.nn.bias_add(x @ x, x[0])))
            fused.append("BiasAdd" not in str(conversion_report(session, result, {x: np.ones((4, 4))})))
    assert fused == [False, True, False]


@fast
def test_functions_that_were_traced_before():
    """They are converted, and no longer converted after the rewrite is disabled."""
    weight = tf.Variable(tf.ones((32, 32)))
    product = tf.function(lambda x: tf.reduce_sum(tf.nn.relu(x @ weight) @ weight))
    product(tf.ones((16, 32)))
    counts = []
    for switch in (enable, shim.disable_mixed_precision_graph_rewrite):
        switch()
        counts.append(conversion_report(product, tf.ones((16, 32))).converted.get("MatMul", 0))
    assert counts == [2, 0]


def test_sessions_that_are_not_converted_are_reported(capsys):
    """Counts the sessions that were created before, whether or not they are open."""
    mixed_precision_global_state.set_non_mixed_precision_session_created(False)
    enable(dtype="bfloat16")
    assert "sessions" not in capsys.readouterr().err
    shim.disable_mixed_precision_graph_rewrite()
    with V1.Session(graph=tf.Graph()):
        enable(dtype="bfloat16")
    assert "sessions" in capsys.readouterr().err


@pytest.fixture
def machine(monkeypatch):
    """Replaces the detected hardware."""

    def become(*devices):
        monkeypatch.setattr(hardware, "describe", lambda: hardware.Hardware(devices))

    return become


def test_machine_without_fast_half_precision(machine):
    """Warns with the reason, converts nothing, and still scales the loss."""
    machine(hardware.cpu(frozenset(), "old"))
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic"):
        optimizer = enable(loss_scale=64)
    assert (graph_rewrite.active(), float(optimizer.loss_scale), converted()) == (None, 64.0, 0)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), "float16"), ((9, 0), "float16"), ((6, 1), None)])
def test_gpus_convert_to_float16(machine, capability, dtype, capsys):
    """From compute capability 7.0, even if the GPU also has bfloat16."""
    machine(hardware.cpu(frozenset(), "old"), hardware.gpu("GPU", capability))
    if dtype is None:
        with pytest.warns(UserWarning, match="no tensor cores"):
            enable()
    else:
        enable()
    assert graph_rewrite.active() == dtype
    printed = capsys.readouterr().err
    if dtype is None:
        assert "graph rewrite to" not in printed
    else:
        assert "graph rewrite to float16: compute capability " in printed
        assert tf.config.optimizer.get_experimental_options()["auto_mixed_precision"]
        for config, wanted in ((V1.ConfigProto(), ON), (configured(OFF), OFF)):
            with V1.Session(graph=tf.Graph(), config=config) as session:
                assert session._config.graph_options.rewrite_options.auto_mixed_precision == wanted


def test_unsuitable_dtype_warns(machine, capsys):
    """float16 without a GPU, and bfloat16 on a CPU without it."""
    machine(hardware.cpu(frozenset({"avx512_bf16"}), "new"))
    with pytest.warns(UserWarning, match="to float16 only"):
        enable(dtype="float16")
    shim.disable_mixed_precision_graph_rewrite()
    machine(hardware.cpu(frozenset(), "old"))
    with pytest.warns(UserWarning, match="not fast"):
        enable(dtype="bfloat16")
    assert "graph rewrite to" not in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_is_converted_without_onednn():
    """The environment variable is read once in a process."""
    environment = {"TF_ENABLE_ONEDNN_OPTS": "0"}
    assert tf1.script(WITHOUT_ONEDNN, environment=environment).split() == ["None"]


WITHOUT_ONEDNN = """
import warnings
import tfmixed.compat.v1 as tf
from tfmixed import hardware
from tfmixed.compat.v1 import graph_rewrite

new = hardware.cpu(frozenset({"avx512_bf16"}), "new")
hardware.describe = lambda: hardware.Hardware((new,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tf.enable_mixed_precision_graph_rewrite(tf.train.AdamOptimizer())
assert "oneDNN" in str(caught[0].message), caught
print(graph_rewrite.active())
"""


def test_dtype_of_tensorflow():
    """`tf.bfloat16` instead of its name."""
    enable(dtype=tf.bfloat16)
    assert graph_rewrite.active() == "bfloat16"


def test_invalid_dtype():
    """Neither float16 nor bfloat16."""
    with pytest.raises(ValueError, match="float32"):
        enable(dtype=tf.float32)
    with pytest.raises(ValueError, match="half"):
        enable(dtype="half")


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
def test_a_policy_and_the_rewrite_exclude_each_other(capsys):
    """The message names the first one, and nothing else is printed."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    with pytest.raises(ValueError, match=r"first.*mixed_bfloat16"):
        enable()
    assert "graph rewrite to" not in capsys.readouterr().err
    keras.config.set_dtype_policy("float32")
    optimizer = enable(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"then.*mixed_bfloat16"):
        tfmixed.set_policy("mixed_bfloat16")
    assert tfmixed.set_policy("float64").name == "float64"
    keras.config.set_dtype_policy("mixed_bfloat16")
    with tf.Graph().as_default(), pytest.raises(ValueError, match=r"then.*mixed_bfloat16"):
        optimizer.minimize(V1.get_variable("w", initializer=1.0))


def test_disabling_twice_warns():
    """As in TensorFlow."""
    enable(dtype="bfloat16")
    shim.disable_mixed_precision_graph_rewrite()
    with pytest.warns(UserWarning, match="already disabled"):
        shim.disable_mixed_precision_graph_rewrite()


def test_disables_a_rewrite_that_tensorflow_enabled():
    """Another library may call TensorFlow's own function."""
    V1.mixed_precision.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    shim.disable_mixed_precision_graph_rewrite()
    assert not mixed_precision_global_state.is_mixed_precision_graph_rewrite_enabled()
    assert not tf.config.optimizer.get_experimental_options()["auto_mixed_precision"]


def test_earlier_options_are_restored():
    """Even if the rewrite is enabled twice."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})
    enable(dtype="bfloat16")
    enable(dtype="bfloat16")
    shim.disable_mixed_precision_graph_rewrite()
    assert tf.config.optimizer.get_experimental_options()["auto_mixed_precision"]
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": before.get("auto_mixed_precision", False)})


# Supported optimizers.


@fast
def test_keras_model_trains_under_the_rewrite():
    """With `fit`. The dtype of the layers is still float32."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(3)])
    optimizer = enable(keras.optimizers.Adam(0.01), loss_scale=256.0)
    assert isinstance(optimizer, tfmixed.LossScaleOptimizer)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(X, Y, batch_size=16, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    step = tf.function(lambda x: tf.nn.softmax(model(x, training=True)))
    assert conversion_report(step, tf.constant(X)).converted["MatMul"] >= 1
    assert int(optimizer.attempted_steps) == 12


REFUSED = {
    "nothing": None,
    "a name": "adam",
    "wrapped by ours": tfmixed.LossScaleOptimizer("sgd"),
    "wrapped by Keras": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
}


@pytest.mark.parametrize("opt", REFUSED.values(), ids=REFUSED)
def test_invalid_optimizer_does_not_enable_the_rewrite(opt):
    """Not an optimizer, or one that scales the loss itself."""
    with pytest.raises(ValueError, match="opt"):
        shim.enable_mixed_precision_graph_rewrite(opt)
    assert not graph_rewrite.is_enabled()


def test_wrapping_twice_is_an_error():
    """As in TensorFlow."""
    once = enable(dtype="bfloat16")
    with pytest.raises(ValueError, match="opt"):
        enable(once)


def test_legacy_optimizers_of_tf_keras():
    """Constant scales, and scales that double and halve."""
    tf_keras = pytest.importorskip("tf_keras")
    sgd = tf_keras.optimizers.legacy.SGD
    fixed, dynamic = enable(sgd(), loss_scale=64.0, dtype="bfloat16"), enable(sgd(), dtype="bfloat16")
    assert (float(fixed.loss_scale), fixed.dynamic, dynamic.dynamic) == (64.0, False, True)
    weight = tf.Variable(1.0)
    fixed.minimize(lambda: fixed.get_scaled_loss(weight) / 64.0, [weight])
    assert np.isfinite(float(weight))
    for odd in ({"hysteresis": 2}, {"min_scale": 2.0}, {"growth_delay": 3}, {"tolerance": 0.1}):
        with pytest.raises(ValueError, match="loss_scale"):
            enable(sgd(), loss_scale=tfmixed.DynamicScale(**odd), dtype="bfloat16")
