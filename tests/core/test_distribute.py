from __future__ import annotations

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from backend import made_up
from replicas import KINDS, PLACES, STEPS, Trainer, bad_values, check
from thorough import covering, few

from tfmixed import LogMaxScale, LossScaleOptimizer, scaling

pytestmark = pytest.mark.filterwarnings("ignore:.* were skipped:UserWarning")  # many overflows are planted

STRATEGIES = {
    "none": lambda: None,
    "one_device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "mirrored_2": lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
    "mirrored_4": lambda: mirrored(4),
}


def mirrored(count):
    # TensorFlow's collectives, the default on CPUs, do not stand several strategies in one process.
    devices = [f"CPU:{index}" for index in range(count)]
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


@functools.cache
def trainer(strategy):
    """One for all tests: a run resets it, and costs no tracing."""
    return Trainer(STRATEGIES[strategy]())


PATTERNS = covering(2, ["fit", "loop"], list(STRATEGIES), ["first", "last", "all"], list(KINDS), list(STEPS))


@pytest.mark.parametrize(("how", "strategy", "place", "kind", "when"), PATTERNS)
def test_an_overflow_anywhere_skips_just_that_step_everywhere(how, strategy, place, kind, when):
    """Weights are finite, bit-identical on all replicas, and those of a run without the bad batches (K3)."""
    run = trainer(strategy)
    bad = bad_values(STEPS[when], PLACES[place], KINDS[kind], run.replicas)
    outcome = getattr(run, how)(bad)
    check(outcome, STEPS[when])
    outcome.assert_same_weights(without(how, strategy, when))


@functools.cache
def without(how, strategy, when):
    """The run without those steps, whatever went wrong in them."""
    run = trainer(strategy)
    return getattr(run, how)(bad_values(STEPS[when], [0], np.nan, run.replicas), drop=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_an_overflow_a_run_is_that_of_the_bare_optimizer(strategy):
    """The scale is a power of two: up to the order in which TensorFlow multiplies factors."""
    outcome = trainer(strategy).fit({})
    check(outcome, [])
    outcome.assert_same_weights(Trainer(STRATEGIES[strategy](), rule=None).fit({}), rtol=1e-5)


INNER = {
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "weight_decay": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
}
BRANCHING = {
    "gradient_accumulation_steps": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=4),
    "ema_overwrite_frequency": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3),
}
BAD = bad_values([4, 9, 10, 11], [1], np.nan, 2)


# The others do what each of these does.
@pytest.mark.parametrize("make", few(["global_clipnorm", "weight_decay", "ema"], INNER))
def test_inner_optimizers_on_replicas(make):
    """Without an overflow the run is the bare optimizer's, with one that of the other batches."""
    run, bare = Trainer(mirrored(2), make), Trainer(mirrored(2), make, rule=None)
    run.fit({}).assert_same_weights(bare.fit({}))
    outcome = run.fit(BAD)
    outcome.assert_sound()
    assert outcome.skipped == 4
    outcome.assert_same_weights(bare.fit(BAD, drop=True))


@pytest.mark.parametrize("modes", [{"steps_per_execution": 5}, {"run_eagerly": True}], ids=str)
def test_modes_of_fit_on_replicas(modes):
    """TensorFlow's collectives cannot stand in the loop of Keras: ReductionToOneDevice can."""
    run = Trainer(mirrored(2), **modes)
    outcome = run.fit(BAD)
    check(outcome, [4, 9, 10, 11])
    outcome.assert_same_weights(run.fit(BAD, drop=True))


@pytest.mark.parametrize("make", few(["gradient_accumulation_steps"], BRANCHING))
def test_what_keras_cannot_compile_on_replicas_is_refused_by_name(make, request):
    """Keras's own message speaks of merge_call; run eagerly it works, as it does on one device."""
    name = request.node.callspec.id
    with pytest.raises(NotImplementedError, match=rf"SGD\({name}=\d\) branches .* Compile .* `run_eagerly=True`"):
        Trainer(mirrored(2), make).fit({})
    one_device = Trainer(tf.distribute.OneDeviceStrategy("CPU:0"), make).fit({})
    one_device.assert_same_weights(Trainer(None, make).fit({}))
    eager = Trainer(mirrored(2), make, run_eagerly=True)
    eager.fit({}).assert_same_weights(Trainer(mirrored(2), make, rule=None, run_eagerly=True).fit({}))


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="from Keras 3.15 on")
def test_parts_of_a_multi_optimizer_are_refused_too():
    """By the part's name."""
    for name, make in BRANCHING.items():
        inner = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(make()))
        with mirrored(2).scope():
            weight = keras.Variable([1.0])
            optimizer = LossScaleOptimizer(inner)
            with pytest.raises(NotImplementedError, match=rf"SGD\({name}=\d\) branches"):
                tf.function(optimizer.build)([weight])


def test_keras_still_cannot_compile_them_by_itself():
    """The day this fails, the refusal above can go."""
    with pytest.raises(RuntimeError, match="merge_call"):
        Trainer(mirrored(2), BRANCHING["gradient_accumulation_steps"], rule=None).fit({})


def test_strategies_that_nobody_has_tried_are_refused():
    """By name, before the first variable is made."""
    with (
        tf.distribute.experimental.CentralStorageStrategy().scope(),
        pytest.raises(
            NotImplementedError, match=r"supports OneDeviceStrategy, .* received a CentralStorageStrategy.*bfloat16"
        ),
    ):
        LossScaleOptimizer("sgd").build([keras.Variable([1.0])])


def test_a_parameter_server_is_refused():
    """A real one, in a process of its own."""
    code = """
import socket, tensorflow as tf, keras, tfmixed
sockets = [socket.socket() for _ in range(3)]
for each in sockets: each.bind(("127.0.0.1", 0))
jobs = {job: [f"127.0.0.1:{each.getsockname()[1]}"] for job, each in zip(("chief", "worker", "ps"), sockets)}
for each in sockets: each.close()
servers = [tf.distribute.Server(tf.train.ClusterSpec(jobs), job, 0, protocol="grpc") for job in ("worker", "ps")]
kind = tf.distribute.cluster_resolver.SimpleClusterResolver
resolver = kind(tf.train.ClusterSpec(jobs), task_type="chief", task_id=0, rpc_layer="grpc")
with tf.distribute.ParameterServerStrategy(resolver).scope():
    try:
        tfmixed.LossScaleOptimizer("sgd").build([keras.Variable([1.0])])
    except NotImplementedError as error:
        print(error, flush=True)
import os; os._exit(0)  # the servers never stop by themselves
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert "received a ParameterServerStrategyV2. Train in mixed_bfloat16" in run.stdout, run.stderr[-2000:]


@made_up
def test_apply_outside_of_run_is_refused():
    """In cross-replica context there is no gradient of one replica."""
    with mirrored(2).scope():
        weight, optimizer = keras.Variable([1.0]), LossScaleOptimizer("sgd")
        with pytest.raises(RuntimeError, match=r"in a replica context, .* `strategy\.run`"):
            optimizer.apply([tf.ones(1)], [weight])


@made_up
@pytest.mark.parametrize(
    ("dtype", "size", "skips"), [("float32", 1.2e19, 1), ("float32", 4e18, 0), ("float16", 4e4, 1)]
)
def test_the_sum_over_replicas_must_be_finite_too(dtype, size, skips):
    """With its norm: each replica alone may have what all together may not."""
    strategy = mirrored(2)
    with strategy.scope():
        weights = [keras.Variable(np.ones(2), dtype=dtype, name=name) for name in "ab"]
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1e-18), 1)
        optimizer.build(weights)
    gradients = tf.constant([1.0, 1.0]), tf.constant([1.0, size])
    strategy.run(tf.function(lambda: optimizer.apply(gradients, weights)))
    assert optimizer._overflow_counts() == {"a": 0, "b": skips}
    for copy in strategy.experimental_local_results(weights[1].value):
        assert np.isfinite(copy.numpy()).all()
        assert np.array_equal(copy.numpy(), [1.0, 1.0]) == bool(skips)


@made_up
def test_sparse_and_missing_gradients_on_replicas():
    """Slices and None pass through the joint decision."""
    strategy = mirrored(2)
    with strategy.scope():
        table, unused = keras.Variable(np.ones((3, 2)), name="table"), keras.Variable([1.0], name="unused")
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4)
        optimizer.build([table, unused])

    @tf.function
    def step(bad):
        def of_replica():
            last = tf.distribute.get_replica_context().replica_id_in_sync_group == 1
            values = tf.fill((1, 2), tf.where(tf.logical_and(bad, last), np.inf, 4.0))
            optimizer.apply([tf.IndexedSlices(values, tf.constant([1]), tf.constant([3, 2])), None], [table, unused])

        strategy.run(of_replica)

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        step(tf.constant(False))
    step(tf.constant(True))
    for copy in strategy.experimental_local_results(table.value):
        np.testing.assert_array_equal(copy.numpy(), [[1, 1], [-1, -1], [1, 1]])
    assert int(optimizer.skipped_steps) == 1


@made_up
def test_the_norm_is_that_of_the_sum_where_replicas_agree():
    """Two gradients of norm 5 add up to one of 10."""
    strategy = mirrored(2)
    with strategy.scope():
        weight, optimizer = keras.Variable([0.0, 0.0]), LossScaleOptimizer("sgd", 4)
        optimizer.build([weight])
    strategy.run(tf.function(lambda: optimizer.apply([tf.constant([12.0, 16.0])], [weight])))
    assert float(optimizer.gradient_norm) == pytest.approx(10.0)


@made_up
def test_gradients_whose_sum_cannot_be_squared_poison_nothing():
    """The square of 1.5e19 is finite, that of two of them is not: it is an overflow, and no moment is infinite."""
    strategy = mirrored(2)
    with strategy.scope():
        weight, optimizer = keras.Variable([0.0]), LossScaleOptimizer("adam", 1)
        optimizer.build([weight])
    step = tf.function(lambda size: optimizer.apply([size], [weight]))
    for size in (1.5e19, 1.0):
        strategy.run(step, (tf.constant([size]),))
    assert all(np.isfinite(variable.numpy()).all() for variable in optimizer.variables)
    assert (int(optimizer.skipped_steps), int(optimizer.iterations.numpy())) == (1, 1)


@made_up
def test_a_rule_that_needs_the_maximum_sees_that_of_all_replicas():
    """The largest gradient may be on any of them."""
    strategy, rule = mirrored(2), LogMaxScale(initial_scale=4.0, max_scale=2.0**20)
    with strategy.scope():
        weight = keras.Variable([0.0])
        optimizer = LossScaleOptimizer("sgd", rule)
        optimizer.build([weight])

    @tf.function
    def step(sizes):
        def of_replica():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tf.gather(sizes, [replica]) * optimizer.loss_scale], [weight])

        strategy.run(of_replica)

    scales = []
    for sizes in ([1.0, 2.0], [1.0, 0.5], [-4.0, 1.0]):
        step(tf.constant(sizes))
        scales.append(float(optimizer.loss_scale))
    np.testing.assert_allclose(scales, scaling.simulate(rule, "TTT", [2.0, 1.0, 4.0]), rtol=1e-5)


@pytest.mark.parametrize("style", ["Keras 2", "Keras 3"])
def test_several_optimizers_in_one_step_are_independent(style):
    """Weights and norms are those of unscaled steps, and no warning says that a loss was not scaled."""
    strategy = mirrored(2)
    with strategy.scope():
        weights = [keras.Variable([1.0, 1.0]) for _ in range(3)]
        optimizers = [LossScaleOptimizer(keras.optimizers.SGD(0.5), 1024.0) for _ in weights]
        for optimizer, weight in zip(optimizers, weights, strict=True):
            optimizer.build([weight])

    def of_replica():
        scale = "get_scaled_loss" if style == "Keras 2" else "scale_loss"
        with tf.GradientTape(persistent=True) as tape:
            losses = [
                getattr(optimizer, scale)(tf.reduce_sum(weight.value) / 2)
                for optimizer, weight in zip(optimizers, weights, strict=True)
            ]
        grads = [tape.gradient(loss, [weight.value]) for loss, weight in zip(losses, weights, strict=True)]
        if style == "Keras 2":
            grads = [
                [tf.clip_by_norm(gradient, 10.0) for gradient in optimizer.get_unscaled_gradients(own)]
                for optimizer, own in zip(optimizers, grads, strict=True)
            ]
        for optimizer, own, weight in zip(optimizers, grads, weights, strict=True):
            optimizer.apply_gradients(zip(own, [weight], strict=True))

    for step in (lambda: strategy.run(of_replica), tf.function(lambda: strategy.run(of_replica))):
        step()
    for optimizer, weight in zip(optimizers, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), [0.0, 0.0])
        assert float(optimizer.gradient_norm) == pytest.approx(2**0.5)
