"""The switch of the graph rewrite: what it reaches, what it says, and what it refuses."""

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
# What each says on a machine that is fast in nothing is tested by itself.
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
    """Returns what a session converts of the products of a small network, fetched with a training step."""
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        train = V1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with tf1.session(config) as session:
            return conversion_report(session, train, {x: X, y: Y}).converted.get("MatMul", 0)


@fast
def test_it_reaches_sessions_with_and_without_a_configuration(capsys):
    """And says what it converts to, and why; a configuration that has it off is left alone."""
    assert converted() == 0
    enable()
    assert "graph rewrite to bfloat16: this CPU multiplies bfloat16" in capsys.readouterr().err
    assert [converted(each) for each in (None, V1.ConfigProto(), configured(ON), configured(OFF))] == [5, 5, 5, 0]
    shim.disable_mixed_precision_graph_rewrite()
    assert [converted(each) for each in (None, V1.ConfigProto())] == [0, 0]


@fast
def test_the_configuration_of_a_script_stays_as_it_is():
    """It is copied; what else it says is heard."""
    enable()
    config = V1.ConfigProto(allow_soft_placement=True)
    with V1.Session(config=config) as session:
        assert session._config.allow_soft_placement
        assert session._config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 == ON
    assert config == V1.ConfigProto(allow_soft_placement=True)


@fast
def test_it_reaches_monitored_sessions():
    """They make their session by themselves."""
    enable()
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        train = V1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with V1.train.MonitoredTrainingSession(config=V1.ConfigProto()) as session:
            assert conversion_report(session, train, {x: X, y: Y}).converted["MatMul"] == 5


@fast
def test_it_reaches_interactive_sessions():
    """TensorFlow lets no pass run there, so that graphs in the making need no place for all of their nodes."""
    enable()
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        train = V1.train.GradientDescentOptimizer(0.1).minimize(loss)
        with contextlib.closing(V1.InteractiveSession()) as session:
            session.run(V1.global_variables_initializer())
            assert conversion_report(session, train, {x: X, y: Y}).converted["MatMul"] == 5


def test_grappler_works_for_interactive_sessions_while_the_rewrite_is_on():
    """On any machine: a product and its bias become one kernel."""
    fused = []
    for switch in (lambda: None, lambda: enable(dtype="bfloat16"), shim.disable_mixed_precision_graph_rewrite):
        switch()
        with tf.Graph().as_default(), contextlib.closing(V1.InteractiveSession()) as session:
            x = V1.placeholder(tf.float32, [4, 4])
            result = tf.identity(tf.nn.relu(tf.nn.bias_add(x @ x, x[0])))
            fused.append("BiasAdd" not in str(conversion_report(session, result, {x: np.ones((4, 4))})))
    assert fused == [False, True, False]


@fast
def test_it_reaches_functions_that_were_traced_before():
    """And lets go of them."""
    weight = tf.Variable(tf.ones((32, 32)))
    product = tf.function(lambda x: tf.reduce_sum(tf.nn.relu(x @ weight) @ weight))
    product(tf.ones((16, 32)))
    seen = []
    for switch in (enable, shim.disable_mixed_precision_graph_rewrite):
        switch()
        seen.append(conversion_report(product, tf.ones((16, 32))).converted)
    assert [each.get("MatMul", 0) for each in seen] == [2, 0]


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
    """Lets the machine be another one."""

    def become(*devices):
        monkeypatch.setattr(hardware, "describe", lambda: hardware.Hardware(devices))

    return become


def test_a_machine_that_is_fast_in_nothing_goes_on_in_float32(machine):
    """With a warning that says why; the loss is scaled all the same."""
    machine(hardware.cpu(frozenset(), "old"))
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic"):
        optimizer = enable(loss_scale=64)
    assert (graph_rewrite.active(), float(optimizer.loss_scale), converted()) == (None, 64.0, 0)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), "float16"), ((9, 0), "float16"), ((6, 1), None)])
def test_on_a_gpu_it_is_float16_from_7_0_on(machine, capability, dtype, capsys):
    """Volta and newer, and it says why, though newer ones have bfloat16 too."""
    machine(hardware.cpu(frozenset(), "old"), hardware.gpu("GPU", capability))
    if dtype is None:
        with pytest.warns(UserWarning, match="no tensor cores"):
            enable()
    else:
        enable()
    assert graph_rewrite.active() == dtype
    told = capsys.readouterr().err
    if dtype is None:
        assert "graph rewrite to" not in told
    else:
        assert "graph rewrite to float16: compute capability " in told
        assert tf.config.optimizer.get_experimental_options()["auto_mixed_precision"]
        for config, wanted in ((V1.ConfigProto(), ON), (configured(OFF), OFF)):
            with V1.Session(graph=tf.Graph(), config=config) as session:
                assert session._config.graph_options.rewrite_options.auto_mixed_precision == wanted


def test_a_dtype_that_converts_nothing_here_is_said(machine, capsys):
    """float16 without a GPU, bfloat16 where the CPU has none; that it converts is not said."""
    machine(hardware.cpu(frozenset({"avx512_bf16"}), "new"))
    with pytest.warns(UserWarning, match="to float16 only"):
        enable(dtype="float16")
    shim.disable_mixed_precision_graph_rewrite()
    machine(hardware.cpu(frozenset(), "old"))
    with pytest.warns(UserWarning, match="not fast"):
        enable(dtype="bfloat16")
    assert "graph rewrite to" not in capsys.readouterr().err


def test_without_onednn_nothing_converts():
    """Which is switched off by a variable that is read once a process."""
    environment = {"TF_ENABLE_ONEDNN_OPTS": "0"}
    assert tf1.script(WITHOUT_ONEDNN, environment=environment).split() == ["None"]


WITHOUT_ONEDNN = """
import warnings
import tfmixed.compat.v1 as tf
from tfmixed import hardware
from tfmixed.compat.v1 import graph_rewrite

new = hardware.cpu(frozenset({"avx512_bf16"}), "new")
hardware.describe = lambda: hardware.Hardware((new,))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    tf.enable_mixed_precision_graph_rewrite(tf.train.AdamOptimizer())
assert "oneDNN" in str(told[0].message), told
print(graph_rewrite.active())
"""


def test_a_dtype_of_tensorflow_is_one_too():
    """`tf.bfloat16` for its name."""
    enable(dtype=tf.bfloat16)
    assert graph_rewrite.active() == "bfloat16"


def test_another_dtype_is_an_error():
    """With those that there are."""
    with pytest.raises(ValueError, match="float32"):
        enable(dtype=tf.float32)
    with pytest.raises(ValueError, match="half"):
        enable(dtype="half")


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
def test_a_policy_and_the_rewrite_exclude_each_other(capsys):
    """The message says which came first; nothing else is said before it."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    with pytest.raises(ValueError, match="mixed_bfloat16.* first"):
        enable()
    assert "graph rewrite to" not in capsys.readouterr().err
    keras.config.set_dtype_policy("float32")
    optimizer = enable(dtype="bfloat16")
    with pytest.raises(ValueError, match="mixed_bfloat16.* second"):
        tfmixed.set_policy("mixed_bfloat16")
    assert tfmixed.set_policy("float64").name == "float64"
    keras.config.set_dtype_policy("mixed_bfloat16")
    with tf.Graph().as_default(), pytest.raises(ValueError, match="mixed_bfloat16.* second"):
        optimizer.minimize(V1.get_variable("w", initializer=1.0))


def test_switching_off_twice_is_said():
    """As in TensorFlow."""
    enable(dtype="bfloat16")
    shim.disable_mixed_precision_graph_rewrite()
    with pytest.warns(UserWarning, match="already disabled"):
        shim.disable_mixed_precision_graph_rewrite()


def test_it_switches_off_what_tensorflow_switched_on():
    """By its own function, as a library may that knows nothing of this package."""
    V1.mixed_precision.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    shim.disable_mixed_precision_graph_rewrite()
    assert not mixed_precision_global_state.is_mixed_precision_graph_rewrite_enabled()
    assert not tf.config.optimizer.get_experimental_options()["auto_mixed_precision"]


def test_options_that_were_set_before_come_back():
    """Also after it is enabled twice."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})
    enable(dtype="bfloat16")
    enable(dtype="bfloat16")
    shim.disable_mixed_precision_graph_rewrite()
    assert tf.config.optimizer.get_experimental_options()["auto_mixed_precision"]
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": before.get("auto_mixed_precision", False)})


# The optimizers that it takes.


@fast
def test_a_keras_model_trains_under_the_rewrite_and_stays_float32_in_code():
    """With `fit`; dtype of layers and outputs are those without."""
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
def test_what_is_no_optimizer_is_refused_and_nothing_is_switched_on(opt):
    """Or scales the loss already."""
    with pytest.raises(ValueError, match="opt"):
        shim.enable_mixed_precision_graph_rewrite(opt)
    assert not graph_rewrite.is_enabled()


def test_wrapping_twice_is_refused():
    """As in TensorFlow."""
    once = enable(dtype="bfloat16")
    with pytest.raises(ValueError, match="opt"):
        enable(once)


def test_legacy_optimizers_of_tf_keras_are_wrapped_by_its_own():
    """Constant scales, and those that double and halve."""
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
