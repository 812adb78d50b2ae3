"""`conversion_report` of graphs with and without conversion."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tensorflow.python.eager import context
from tf1 import V1, X, Y

import tfmixed.compat.v1 as shim
from tfmixed import hardware
from tfmixed.compat.v1 import conversion, conversion_report, graph_rewrite

fast = pytest.mark.skipif(hardware.describe().policy != "mixed_bfloat16", reason="a CPU that is fast in bfloat16")


@pytest.fixture(autouse=True)
def _switched_off_again():
    yield
    if graph_rewrite.is_enabled():
        shim.disable_mixed_precision_graph_rewrite()


def training(opt):
    x, y, loss = tf1.network()
    return opt.minimize(loss), {x: X, y: Y}


@fast
def test_session_that_converts():
    """Nodes by operation and dtype, casts, and refused nodes by list."""
    opt = shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    with tf.Graph().as_default():
        train, feed = training(opt)
        with tf1.session(V1.ConfigProto()) as session:
            session.run(train, feed)
            report = conversion_report(session, train, feed)
    assert report.dtype == "bfloat16"
    assert report.converted["MatMul"] == 5
    assert "MatMul" not in report.refused.get("allow", {})
    assert report.refused["deny"]["SparseSoftmaxCrossEntropyWithLogits"] == 1
    assert min(report.casts) >= 2
    counted = {count.operation: count for count in report.counts if count.dtype == "bfloat16"}
    assert (counted["MatMul"].list, counted["MatMul"].nodes) == ("allow", 5)
    printed = str(report)
    assert f"casts added: {report.casts[0]} to it, {report.casts[1]} back" in printed
    assert "SparseSoftmaxCrossEntropyWithLogits" in printed


def test_session_that_converts_nothing():
    """All nodes are float32, and no casts are added."""
    with tf.Graph().as_default():
        train, feed = training(V1.train.AdamOptimizer())
        with tf1.session() as session:
            report = conversion_report(session, train, feed)
    assert (report.dtype, report.converted, report.casts) == (None, {}, (0, 0))
    assert report.refused["allow"] == {"MatMul": 5}


@fast
def test_earlier_runs_are_not_reported():
    """TensorFlow keeps exported graphs that were not fetched."""
    shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    weight = tf.Variable(tf.ones((32, 32)))
    context.enable_run_metadata()
    tf.function(lambda x: x @ weight @ weight @ weight @ weight)(tf.ones((4, 32)))
    context.disable_run_metadata()
    report = conversion_report(tf.function(lambda x: x @ weight), tf.ones((4, 32)))
    assert report.converted["MatMul"] == 1


@fast
def test_function_can_be_reported_repeatedly():
    """TensorFlow exports a graph once for each set of options. The options are restored."""
    shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    weight = tf.Variable(tf.ones((32, 32)))
    function = tf.function(lambda x: tf.reduce_sum(tf.nn.relu(x @ weight) @ weight))
    before = tf.config.optimizer.get_experimental_options()
    function(tf.ones((4, 32)))
    reports = [conversion_report(function, tf.ones((4, 32))) for _ in range(3)]
    assert [report.converted["MatMul"] for report in reports] == [2, 2, 2]
    assert reports[0] == reports[2]
    assert tf.config.optimizer.get_experimental_options() == before


@fast
def test_fetched_products_are_not_converted():
    """Although they are on the allow list."""
    shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    with tf.Graph().as_default():
        x = V1.placeholder(tf.float32, (16, 16))
        product = tf.nn.relu(x @ x) @ x
        with V1.Session() as session:
            report = conversion_report(session, product, {x: np.ones((16, 16))})
    assert report.converted["MatMul"] == 1
    assert report.refused["allow"] == {"MatMul": 1}


@fast
def test_fused_kernels_count_as_their_operation():
    """A convolution with bias and ReLU is one oneDNN kernel."""
    shim.enable_mixed_precision_graph_rewrite(V1.train.AdamOptimizer())
    kernel, bias = tf.Variable(tf.ones((3, 3, 8, 8))), tf.Variable(tf.ones(8))

    @tf.function
    def function(x):
        for _ in range(2):
            x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), bias))
        return tf.reduce_sum(x)

    assert conversion_report(function, tf.ones((2, 8, 8, 8))).converted["Conv2D"] == 2


ONEDNN = """
import tensorflow as tf
from tfmixed.compat.v1 import conversion_report

scale, kernel = tf.Variable(tf.ones(8)), tf.Variable(tf.ones((3, 3, 8, 8)))

@tf.function
def step(x):
    with tf.GradientTape() as tape:
        y = tf.nn.conv2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), kernel, 1, "VALID")
        y = tf.nn.relu(tf.compat.v1.nn.fused_batch_norm(y, scale, scale)[0])
        loss = tf.reduce_sum(tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(y, kernel, 1, "SAME"), scale)))
    return tape.gradient(loss, [scale, kernel])

counts = conversion_report(step, tf.ones((2, 8, 8, 8))).counts
print(*sorted((c.operation, c.list) for c in counts if "Conv" in c.operation or "Norm" in c.operation))
"""


@pytest.mark.slow
def test_onednn_kernels_count_as_their_operation():
    """The name of batch normalization contains Fused for other kernels, too."""
    printed = tf1.script(ONEDNN, environment={"TF_ENABLE_ONEDNN_OPTS": "1"})
    on_lists = {"Conv2D": "allow", "Conv2DBackpropInput": "allow", "Conv2DBackpropFilter": "allow"}
    on_lists |= {"FusedBatchNormV3": "infer", "FusedBatchNormGradV3": "infer"}
    assert printed.strip() == " ".join(map(str, sorted(on_lists.items())))


def test_concrete_function():
    """Reported like a `tf.function`."""
    square = tf.function(lambda x: x @ x).get_concrete_function(tf.TensorSpec((8, 8)))
    assert conversion_report(square, tf.ones((8, 8))).refused == {"allow": {"MatMul": 1}}


@pytest.mark.slow
def test_float16_in_sessions_and_functions():
    """Loops and branches are converted in sessions, but not in functions."""
    environment = {"TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_EMULATE_FP16": "0"}
    assert tf1.script(FLOAT16, environment=environment).split() == ["float16", "loop", "branch"]


FLOAT16 = """
import tensorflow as tf
import tf1
from tf1 import V1, X, Y
from tfmixed.compat.v1 import conversion_report

config = V1.ConfigProto()
config.graph_options.rewrite_options.auto_mixed_precision_cpu = 1
with tf.Graph().as_default():
    x, y, loss = tf1.network()
    with tf1.session(config) as session:
        report = conversion_report(session, loss, {x: X, y: Y})
assert report.converted["MatMul"] == 2 and min(report.casts) > 0, report
print(report.dtype)

flows = {
    "loop": lambda x: tf.while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, tf.nn.relu(x @ x) @ x), [0, x])[1],
    "branch": lambda x: tf.cond(x[0, 0] > 0, lambda: tf.nn.relu(x @ x) @ x, lambda: x),
}
tf.config.optimizer.set_experimental_options({"auto_mixed_precision_cpu": True})
for name, flow in flows.items():
    with tf.Graph().as_default():
        total = tf.reduce_sum(flow(V1.placeholder_with_default(tf.ones((8, 8)), (8, 8))))
        with V1.Session(config=config) as session:
            report = conversion_report(session, total)
            assert report.converted["MatMul"] == 2 and "allow" not in report.refused, report
    report = conversion_report(tf.function(lambda x: tf.reduce_sum(flow(x))), tf.ones((8, 8)))
    assert report.refused["allow"] == {"MatMul": 2} and "MatMul" not in report.converted, report
    print(name)
"""


def test_function_without_a_graph_is_an_error():
    """Compiled by XLA, or called while a graph is built."""
    compiled = tf.function(lambda x: x @ x, jit_compile=True)
    with pytest.raises(ValueError, match="jit_compile"):
        conversion_report(compiled, tf.ones((8, 8)))
    with tf.Graph().as_default(), pytest.raises(ValueError, match="session"):
        conversion_report(compiled, tf.ones((8, 8)))


@pytest.mark.parametrize("runner", [lambda: None, V1.Session, None], ids=["function", "class", "none"])
def test_invalid_runner(runner):
    """Neither a session nor a `tf.function`."""
    with pytest.raises(TypeError, match="runner"):
        conversion_report(runner)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_lists_are_those_of_this_tensorflow(dtype):
    """No list is empty, and no operation is on two lists."""
    found = conversion._lists(dtype)
    assert min(map(len, found.values())) >= 7
    assert sum(map(len, found.values())) == len(frozenset().union(*found.values()))
    assert [conversion.list_of(name, dtype) for name in ("Conv2D", "Mul", "Exp", "Reshape", "Fft")] == [
        "allow",
        "infer",
        "deny",
        "clear",
        "none",
    ]


def test_the_lists_follow_the_environment(monkeypatch):
    """Including the old names of the variables."""
    monkeypatch.setenv("TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_INFERLIST_REMOVE", "Mul,Add")
    monkeypatch.setenv("TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_BLACKLIST_ADD", "Mul")
    assert [conversion.list_of(name, "float16") for name in ("Mul", "Add", "AddV2")] == ["deny", "none", "infer"]
