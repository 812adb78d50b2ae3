"""Scripts that use the graph rewrite like well-known projects, and train on small data as in float32."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1, X, Y
from thorough import covering

import tfmixed.compat.v1 as shim
from tfmixed import hardware
from tfmixed.compat.v1 import conversion_report, graph_rewrite

converts = hardware.describe().policy == "mixed_bfloat16"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The graph rewrite")]


@pytest.fixture(autouse=True)
def _own_graph():
    with tf.Graph().as_default():
        yield
    shim.uninstall()
    if graph_rewrite.is_enabled():
        shim.disable_mixed_precision_graph_rewrite()


# Like the BERT scripts of NVIDIA's DeepLearningExamples: a custom optimizer that calls `get_variable` in
# `apply_gradients`, a loss scale that a hook reads, clipping that handles infinity, and accumulation in tf.cond.


class DecayingAdam(V1.train.Optimizer):
    """Adam with decoupled weight decay, which creates its moments in `apply_gradients`."""

    def __init__(self, learning_rate, decay=0.01, excluded=("bias",)):
        super().__init__(False, "DecayingAdam")
        self.learning_rate, self.decay, self.excluded = learning_rate, decay, excluded

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        updates = []
        for gradient, weight in grads_and_vars:
            if gradient is None or weight is None:
                continue
            path = re.match(r"^(.*):\d+$", weight.name)[1]
            first, second = (
                V1.get_variable(f"{path}/{moment}", weight.shape.as_list(), trainable=False, initializer=zeros())
                for moment in ("adam_m", "adam_v")
            )
            next_first = 0.9 * first + 0.1 * gradient
            next_second = 0.999 * second + 0.001 * tf.square(gradient)
            update = next_first / (tf.sqrt(next_second) + 1e-6)
            if not any(part in path for part in self.excluded):
                update += self.decay * weight
            updates += [weight.assign(weight - self.learning_rate * update)]
            updates += [first.assign(next_first), second.assign(next_second)]
        return tf.group(*updates, name=name)


def zeros():
    return V1.zeros_initializer()


def warmed_up(step, peak, steps, warmup):
    rate = V1.train.polynomial_decay(peak, step, steps, end_learning_rate=0.0)
    done = tf.cast(step, tf.float32) / warmup
    return tf.where(tf.cast(step, tf.float32) < warmup, peak * done, rate)


def bert(loss, opt, accumulate=1):
    """Returns a training step that counts `global_step` itself."""
    step = V1.train.get_or_create_global_step()
    weights = V1.trainable_variables()
    pairs = opt.compute_gradients(loss / accumulate, weights)
    pairs = [(gradient, weight) for gradient, weight in pairs if gradient is not None]
    grads, weights = zip(*pairs, strict=True)
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in grads])
    norm = tf.cond(finite, lambda: tf.linalg.global_norm(grads), lambda: tf.constant(1.0))
    clipped, _ = tf.clip_by_global_norm(grads, clip_norm=1.0, use_norm=norm)
    if accumulate == 1:
        train = opt.apply_gradients(list(zip(clipped, weights, strict=True)))
        counted = tf.cond(finite, lambda: step + 1, lambda: tf.identity(step))
        with V1.control_dependencies([train, counted]):  # the learning rate reads the step: before, not while, it moves
            return tf.group(train, step.assign(counted))
    micro = V1.get_variable("local_step", initializer=np.int32(1), trainable=False)
    all_finite = V1.get_variable("batch_finite", initializer=True, trainable=False)
    sums = [
        V1.get_variable(f"accum/{number}", weight.shape.as_list(), trainable=False, initializer=zeros())
        for number, weight in enumerate(weights)
    ]
    begins = tf.equal(micro % accumulate, 1)
    remembered = tf.cond(
        begins, lambda: all_finite.assign(finite), lambda: all_finite.assign(tf.logical_and(all_finite, finite))
    )
    added = tf.cond(
        begins,
        lambda: [kept.assign(grad) for kept, grad in zip(sums, clipped, strict=True)],
        lambda: [kept.assign_add(grad) for kept, grad in zip(sums, clipped, strict=True)],
    )
    ends = tf.identity(tf.equal(micro % accumulate, 0), name="update_step")
    with V1.control_dependencies(added):
        train = tf.cond(ends, lambda: opt.apply_gradients(list(zip(added, weights, strict=True))), lambda: tf.no_op())
    counted = tf.cond(tf.logical_and(ends, remembered), lambda: step + 1, lambda: tf.identity(step))
    with V1.control_dependencies([train, counted, ends]):
        return tf.group(train, step.assign(counted), micro.assign_add(1))


def bert_model(package, scaled, accumulate, factor=1.0):
    """Returns the feed, the loss, the step and the optimizer."""
    x, y, loss = tf1.network(factor=factor)
    opt = DecayingAdam(warmed_up(V1.train.get_or_create_global_step(), 0.05, 400, 2))
    if scaled:
        scale = package.train.experimental.DynamicLossScale(
            initial_loss_scale=2**15, increment_period=1000, multiplier=2.0
        )
        opt = package.train.experimental.enable_mixed_precision_graph_rewrite(opt, scale)
        tf.identity(scale(), name="loss_scale")
    return {x: X, y: Y}, loss, bert(loss, opt, accumulate), opt


@pytest.mark.parametrize(("package", "accumulate"), covering(1, {"import": shim, "install": V1}, [1, 3]))
def test_bert(package, accumulate):
    """An overflow skips the whole accumulated batch, even after clipping."""
    shim.install()
    factor = V1.placeholder_with_default(1.0, [])
    feed, loss, train, opt = bert_model(package, True, accumulate, factor)
    step = V1.train.get_global_step()
    names = [variable.name for variable in V1.global_variables() if "adam" in variable.name]
    assert "hidden/kernel/adam_m:0" in names
    with tf1.session(V1.ConfigProto()) as session:
        first = session.run(loss, feed)
        for _ in range(20 * accumulate):
            session.run(train, feed)
        assert session.run([step, "loss_scale:0"]) == [20, 2.0**15]
        last = session.run(loss, feed)
        before = session.run(V1.trainable_variables())
        for number in range(accumulate):
            session.run(train, {**feed, factor: np.inf if number == 0 else 1.0})
        assert session.run([step, "loss_scale:0", opt.skipped_steps]) == [20, 2.0**14, 1]
        for old, new in zip(before, session.run(V1.trainable_variables()), strict=True):
            np.testing.assert_array_equal(old, new)
        for _ in range(accumulate):
            session.run(train, feed)
        assert session.run([step, opt.skipped_steps]) == [21, 1]
        assert ("MatMul" in conversion_report(session, train, feed).converted) == converts
    assert last < 0.6 * first


UNDER_V1 = """
import numpy as np
import tensorflow as tf
tf.compat.v1.disable_v2_behavior()
import test_v1_callers as callers
import tf1
import tfmixed.compat.v1 as shim
from tf1 import V1

names, losses = [], []
for scaled in (False, True):
    with tf.Graph().as_default():
        feed, loss, train, opt = callers.bert_model(shim, scaled, 3)
        names.append({variable.name for variable in V1.global_variables() if "tfmixed" not in variable.name})
        config = V1.ConfigProto()
        config.graph_options.rewrite_options.auto_mixed_precision = 2  # off: the arithmetic is that of float32
        with tf1.session(config) as session:
            for _ in range(30):
                session.run(train, feed)
            losses.append(session.run(loss, feed))
            assert session.run(V1.train.get_global_step()) == 10
assert names[0] == names[1], names[0] ^ names[1]
np.testing.assert_allclose(*losses, rtol=1e-3)
"""


def test_bert_under_the_behavior_of_tensorflow_1():
    """Variables created in two conditionals have the names of a float32 run, and training is the same."""
    tf1.script(UNDER_V1)


def test_bert_enables_the_rewrite_for_evaluation():
    """With an unused optimizer and scale."""
    x, y, loss = tf1.network()
    shim.train.experimental.enable_mixed_precision_graph_rewrite(
        DecayingAdam(learning_rate=0.0), shim.train.experimental.FixedLossScale(1)
    )
    with tf1.session() as session:
        assert ("MatMul" in conversion_report(session, loss, {x: X, y: Y}).converted) == converts


# Like its VNet: gradients of the unwrapped optimizer for summaries.


def test_vnet():
    """Two uses of one optimizer in a graph, with 3D convolutions and a `ConfigProto` that enables the rewrite."""
    volume = V1.placeholder(tf.float32, [None, 4, 4, 4, 1])
    kernels = [V1.get_variable(f"kernel{n}", [3, 3, 3, *shape]) for n, shape in enumerate([(1, 4), (4, 4), (4, 1)])]
    flow = volume
    for kernel in kernels:
        flow = tf.nn.relu(tf.nn.conv3d(flow, kernel, [1] * 5, "SAME")) if kernel is not kernels[-1] else flow
    flow = tf.nn.conv3d(flow, kernels[-1], [1] * 5, "SAME")
    loss = tf.reduce_mean(tf.square(flow - 0.5 * volume))
    opt = V1.train.AdamOptimizer(0.02)
    norms = [tf.norm(gradient) for gradient, _ in opt.compute_gradients(loss)]
    opt = shim.train.experimental.enable_mixed_precision_graph_rewrite(opt, "dynamic")
    train = opt.minimize(loss, global_step=V1.train.get_or_create_global_step())
    config = V1.ConfigProto()
    config.graph_options.rewrite_options.auto_mixed_precision = 1
    data = {volume: np.random.default_rng(0).normal(size=(8, 4, 4, 4, 1))}
    with tf1.session(config) as session:
        first = session.run(loss, data)
        for _ in range(30):
            session.run([train, norms], data)
        assert session.run([loss, opt.skipped_steps], data)[0] < 0.7 * first
        converted = conversion_report(session, train, data).converted
        assert any(name.startswith("Conv3D") for name in converted) == converts


# Like its UNet and NCF: managers of tf.contrib, and the environment variable.


def ncf():
    """Returns the loss and feed of a small recommender with embeddings, their product and a network."""
    users, items = V1.placeholder(tf.int32, [None]), V1.placeholder(tf.int32, [None])
    labels = V1.placeholder(tf.float32, [None, 1])
    tables = [V1.get_variable(name, [20, 8], initializer=V1.random_normal_initializer(0, 0.1, 1)) for name in "abcd"]
    user, item, deep_user, deep_item = (
        tf.nn.embedding_lookup(table, ids) for table, ids in zip(tables, (users, items) * 2, strict=True)
    )
    deep = tf.nn.relu(tf1.dense(tf.concat([deep_user, deep_item], 1), 16, "mlp"))
    logits = tf1.dense(tf.concat([user * item, deep], 1), 1, "out")
    loss = V1.losses.sigmoid_cross_entropy(labels, logits)
    random = np.random.default_rng(0)
    pairs = random.integers(0, 20, (256, 2))
    liked = ((pairs.sum(1) % 3) == 0).astype("float32")[:, None]
    return loss, {users: pairs[:, 0], items: pairs[:, 1], labels: liked}


@pytest.mark.parametrize("how", ["environment", "fixed", "exponential"])
def test_ncf_and_unet(how, monkeypatch):
    """With sparse gradients of embeddings."""
    if how == "environment":
        monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION", "1")
    shim.install()
    loss, feed = ncf()
    opt = V1.train.AdamOptimizer(0.01, beta1=0.9, beta2=0.999, epsilon=1e-8)
    if how != "environment":
        managers = tf.contrib.mixed_precision
        manager = managers.FixedLossScaleManager(1000)
        if how == "exponential":
            manager = managers.ExponentialUpdateLossScaleManager(
                init_loss_scale=2**15, incr_every_n_steps=10, decr_every_n_nan_or_inf=2, incr_ratio=2, decr_ratio=0.5
            )
        opt = managers.LossScaleOptimizer(opt, manager)
        V1.summary.scalar("loss_scale", manager.get_loss_scale())
    train = opt.minimize(loss)
    with tf1.session() as session:
        first = session.run(loss, feed)
        for _ in range(60):
            session.run(train, feed)
        assert session.run(loss, feed) < 0.7 * first
        scale = session.run("tfmixed/loss_scale:0")
    assert scale == {"environment": 2.0**15, "fixed": 1000.0, "exponential": 2.0**21}[how]


# Like Mozilla's DeepSpeech: averaged gradients of several towers, and one step.


def test_deepspeech():
    """Two towers share variables. If one overflows, neither is applied."""
    batches = [(V1.placeholder(tf.float32, [None, 8]), V1.placeholder(tf.int32, [None])) for _ in range(2)]
    opt = V1.train.AdamOptimizer(0.05, beta1=0.9, beta2=0.999, epsilon=1e-8)
    opt = shim.train.experimental.enable_mixed_precision_graph_rewrite(opt)
    towers, losses = [], []
    with V1.variable_scope(V1.get_variable_scope()):
        for number, (x, y) in enumerate(batches):
            with V1.device("/cpu:0"), V1.name_scope(f"tower_{number}"):
                logits = tf1.dense(tf.nn.relu(tf1.dense(x, 16, "hidden")), 3, "logits")
                losses.append(tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)))
                V1.get_variable_scope().reuse_variables()
                towers.append(opt.compute_gradients(losses[-1]))
    averaged = [
        (tf.reduce_mean(tf.concat([tf.expand_dims(gradient, 0) for gradient, _ in pairs], 0), 0), pairs[0][1])
        for pairs in zip(*towers, strict=True)
    ]
    with V1.variable_scope(V1.get_variable_scope(), reuse=False):
        step = V1.train.get_or_create_global_step()
        train = opt.apply_gradients(averaged, global_step=step)
    halves = [{batches[n][0]: X[n::2], batches[n][1]: Y[n::2]} for n in range(2)]
    feed = halves[0] | halves[1]
    with tf1.session() as session:
        first = sum(session.run(losses, feed))
        for _ in range(20):
            session.run(train, feed)
        assert sum(session.run(losses, feed)) < 0.6 * first
        for bad in range(2):
            session.run(train, {**feed, batches[bad][0]: X[bad::2] * np.inf})
        assert session.run([step, opt.skipped_steps, opt.loss_scale]) == [20, 2, 2.0**13]
        assert np.isfinite(session.run(losses, feed)).all()
        assert ("MatMul" in conversion_report(session, train, feed).converted) == converts
