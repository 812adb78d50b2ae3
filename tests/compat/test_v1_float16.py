"""float16 without a GPU: the CUDA pass on a virtual cluster, and real float16 kernels on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tensorflow.core.protobuf import config_pb2, device_properties_pb2
from tensorflow.python.grappler import cluster, tf_optimizer
from tf1 import V1, X, Y

from tfmixed.compat.v1 import LossScaleOptimizer

cuda = pytest.mark.skipif(not tf.test.is_built_with_cuda(), reason="the build has no CUDA pass")


def machine(architecture):
    """Returns a virtual cluster of a CPU and a GPU."""
    # A GPU without an architecture aborts the process.
    environment = {"architecture": architecture, "cuda": "12050", "cudnn": "90000"}
    devices = [
        device_properties_pb2.NamedDevice(
            name=f"/job:localhost/replica:0/task:0/device:{kind}:0",
            properties=device_properties_pb2.DeviceProperties(
                type=kind, vendor="nvidia", frequency=1000, num_cores=8, environment=more, memory_size=2**33
            ),
        )
        for kind, more in (("CPU", {}), ("GPU", environment))
    ]
    return cluster.Cluster(devices=devices)


def rewritten(graph, needed, architecture):
    """Returns a graph rewritten by TensorFlow's float16 pass for GPUs."""
    for operation in graph.get_operations():
        operation._set_device("/job:localhost/replica:0/task:0/device:GPU:0")
    with graph.as_default():
        for node in needed:
            V1.add_to_collection(V1.GraphKeys.TRAIN_OP, node)
        meta_graph = V1.train.export_meta_graph()
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.auto_mixed_precision, options.min_graph_nodes = 1, -1
    options.optimizers.append("auto_mixed_precision")
    return tf_optimizer.OptimizeGraph(config, meta_graph, cluster=machine(architecture))


def training(graph):
    with graph.as_default():
        x, y, loss = tf1.network()
        train = LossScaleOptimizer(V1.train.AdamOptimizer(0.05)).minimize(loss)
        return x, y, loss, train, V1.global_variables_initializer()


def halves(graph_def):
    return {node.name for node in graph_def.node if node.attr["T"].type == tf.float16.as_datatype_enum}


@cuda
def test_cuda_pass_converts_products_and_not_the_unscaling():
    """Division by the scale in float16 would undo the loss scaling."""
    graph = tf.Graph()
    _, _, loss, train, init = training(graph)
    found = rewritten(graph, [train, loss, init], "8.0")
    products = {operation.name for operation in graph.get_operations() if operation.type == "MatMul"}
    assert len(products) >= 5
    assert products <= halves(found)
    assert not any(name.startswith("loss_scaling") for name in halves(found))


@cuda
def test_cuda_pass_converts_nothing_on_an_old_gpu():
    """Its compute capability is below 7.0."""
    graph = tf.Graph()
    _, _, loss, train, init = training(graph)
    assert not halves(rewritten(graph, [train, loss, init], "6.0"))


@cuda
def test_graph_of_the_cuda_pass_trains_as_in_float32():
    """On a CPU, without other rewrites."""
    graph = tf.Graph()
    x, y, loss, train, init = training(graph)
    graph_def = rewritten(graph, [train, loss, init], "8.0")
    losses = []
    for definition in (V1.GraphDef.FromString(graph.as_graph_def().SerializeToString()), graph_def):
        for node in definition.node:
            node.device = ""
        config = V1.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        with tf.Graph().as_default():
            tf.import_graph_def(definition, name="")
            with V1.Session(config=config) as session:
                session.run(init.name)
                feed = {x.name: X, y.name: Y}
                losses.append([session.run([loss.name, train.name], feed)[0] for _ in range(20)])
    assert losses[0][-1] < 0.5 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


KERNELS = """
import numpy as np
import tensorflow as tf
import tf1
from tf1 import V1, X, Y
from tfmixed.compat.v1 import LossScaleOptimizer, conversion_report
from tfmixed.scaling import DynamicScale

def session(half):
    config = V1.ConfigProto()
    if half:
        # Converts the nodes that the CUDA pass converts, to real float16 kernels on a CPU.
        config.graph_options.rewrite_options.auto_mixed_precision_cpu = 1
    return config

def gradients(half, factor, scale):
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        opt = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), scale)
        pairs = opt.compute_gradients(loss * factor)
        fetches = [tf.reduce_max(tf.abs(gradient)) + 0.0 * tf.reduce_sum(gradient) for gradient, _ in pairs]
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient, _ in pairs], 0)
        flat = flat + tf.zeros_like(flat)
        with tf1.session(session(half)) as opened:
            report = conversion_report(opened, flat, {x: X, y: Y})
            return opened.run(flat, {x: X, y: Y}), report

exact, report = gradients(False, 1e-7, 1.0)
assert not report.converted
vanished, report = gradients(True, 1e-7, 1.0)
assert report.converted["MatMul"] >= 4, report
kernels = slice(0, 8 * 16)  # of the first layer, whose gradient comes from a product
scaled, _ = gradients(True, 1e-7, 2.0**15)
assert np.abs(exact[kernels]).max() > 0
assert not vanished[kernels].any(), vanished[kernels]
np.testing.assert_allclose(scaled, exact, rtol=0.05, atol=np.abs(exact).max() * 0.01)
print("vanished and came back")

with tf.Graph().as_default():
    x, y, loss = tf1.network()
    step = V1.train.get_or_create_global_step()
    opt = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1e-6), DynamicScale(initial_scale=2.0**15))
    train = opt.minimize(loss * 1e3, global_step=step)
    with tf1.session(session(True)) as opened:
        before, scales, steps = opened.run(V1.trainable_variables()), [], []
        for _ in range(12):
            opened.run(train, {x: X, y: Y})
            scale, number = opened.run([opt.loss_scale, step])
            scales.append(float(scale))
            steps.append(int(number))
        assert np.isfinite(np.concatenate([weight.ravel() for weight in opened.run(V1.trainable_variables())])).all()
    fallen = scales[: steps.index(1)] if 1 in steps else scales
    assert len(fallen) >= 4 and fallen == [2.0 ** (14 - number) for number in range(len(fallen))], scales
    assert steps[-1] > 0, (scales, steps)
    assert scales[-1] == fallen[-1], scales
print(fallen[-1], steps)
"""


@pytest.mark.slow
def test_scaling_prevents_underflow_in_float16_kernels():
    """With a large loss, the scale halves and global_step stays constant until the gradients fit."""
    # Without emulation, the pass for CPUs uses float16 kernels. Read once in a process.
    environment = {"TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_EMULATE_FP16": "0"}
    assert "vanished and came back" in tf1.script(KERNELS, environment=environment)
