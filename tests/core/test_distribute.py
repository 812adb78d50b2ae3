from __future__ import annotations

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from backend import made_up
from replicas import KINDS, PLACES, STEPS, Trainer, bad_values, check, mirrored
from thorough import covering, few

from tfmixed import LogMaxScale, LossScaleOptimizer, scaling

# The tests plant many overflows.
pytestmark = [pytest.mark.filterwarnings("ignore:.* were skipped:UserWarning")]
slow = pytest.mark.slow

STRATEGIES = {
    "none": lambda: None,
    "one_device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    # The only strategy of the tests with TensorFlow's collectives.
    "mirrored_2": functools.cache(lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])),
    "mirrored_4": lambda: mirrored(4),
}


@functools.cache
def trainer(strategy):
    """Returns a trainer for all tests, so that its functions are traced once."""
    return Trainer(STRATEGIES[strategy]())


@functools.cache
def without(how, strategy, when):
    """Returns the outcome of a run without the bad steps."""
    run = trainer(strategy)
    return getattr(run, how)(bad_values(STEPS[when], [0], np.nan, run.replicas), drop=True)


def check_skips(how, strategy, place, kind, when):
    run = trainer(strategy)
    outcome = getattr(run, how)(bad_values(STEPS[when], PLACES[place], KINDS[kind], run.replicas))
    check(outcome, STEPS[when])
    outcome.assert_same_weights(without(how, strategy, when))


def test_an_overflow_on_one_replica_is_skipped_on_all():
    """Weights are finite, identical on all replicas, and those of a run without the bad batches (K3)."""
    check_skips("loop", "mirrored_2", "last", "nan", "twenty")


PATTERNS = covering(1, ["fit", "loop"], list(STRATEGIES), ["first", "last", "all"], list(KINDS), list(STEPS))


@slow
@pytest.mark.parametrize(("how", "strategy", "place", "kind", "when"), PATTERNS)
def test_an_overflow_anywhere_is_skipped_everywhere(how, strategy, place, kind, when):
    """The same in `fit` and custom loops, under each strategy."""
    check_skips(how, strategy, place, kind, when)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_an_overflow_a_run_is_that_of_the_inner_optimizer(strategy):
    """The scale is a power of two, so only the order of multiplications may differ."""
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


@pytest.mark.thorough
@pytest.mark.parametrize("make", few(["global_clipnorm", "weight_decay", "ema"], INNER))
def test_inner_optimizers_on_replicas(make):
    """A run is that of the inner optimizer alone, without the bad batches."""
    run, bare = Trainer(mirrored(), make), Trainer(mirrored(), make, rule=None)
    run.fit({}).assert_same_weights(bare.fit({}))
    outcome = run.fit(BAD)
    outcome.assert_sound()
    assert outcome.skipped == 4
    outcome.assert_same_weights(bare.fit(BAD, drop=True))


@slow
@pytest.mark.parametrize("modes", [{"steps_per_execution": 5}, {"run_eagerly": True}], ids=str)
def test_modes_of_fit_on_replicas(modes):
    """Keras's loop over several steps supports ReductionToOneDevice only."""
    run = Trainer(mirrored(), **modes)
    outcome = run.fit(BAD)
    check(outcome, [4, 9, 10, 11])
    outcome.assert_same_weights(run.fit(BAD, drop=True))


@pytest.mark.parametrize("name", BRANCHING)
def test_what_keras_cannot_compile_on_replicas_is_an_error(name):
    """The error names the argument. So do parts of a `MultiOptimizer`."""
    kinds = [BRANCHING[name]]
    if hasattr(keras.optimizers, "MultiOptimizer"):  # from Keras 3.15 on
        kinds += [lambda: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(BRANCHING[name]()))]
    for make in kinds:
        with mirrored().scope():
            weight, optimizer = keras.Variable([1.0]), LossScaleOptimizer(make())
            with pytest.raises(NotImplementedError, match=rf"SGD\({name}=\d\).*run_eagerly"):
                tf.function(optimizer.build)([weight])


@pytest.mark.thorough
@pytest.mark.parametrize("make", few(["gradient_accumulation_steps"], BRANCHING))
def test_what_keras_cannot_compile_on_replicas_works_elsewhere(make):
    """Eagerly and on one device."""
    with pytest.raises(NotImplementedError):
        Trainer(mirrored(), make).fit({})
    one_device = Trainer(tf.distribute.OneDeviceStrategy("CPU:0"), make).fit({})
    one_device.assert_same_weights(Trainer(None, make).fit({}))
    eager = Trainer(mirrored(), make, run_eagerly=True)
    eager.fit({}).assert_same_weights(Trainer(mirrored(), make, rule=None, run_eagerly=True).fit({}))


@slow
def test_keras_still_cannot_compile_them_by_itself():
    """If this fails, the error above can be removed."""
    with pytest.raises(RuntimeError, match="merge_call"):
        Trainer(mirrored(), BRANCHING["gradient_accumulation_steps"], rule=None).fit({})


def test_untested_strategies_are_errors():
    """By name, before the first variable is created."""
    strategy = tf.distribute.experimental.CentralStorageStrategy()
    with strategy.scope(), pytest.raises(NotImplementedError, match="CentralStorageStrategy"):
        LossScaleOptimizer("sgd").build([keras.Variable([1.0])])


@slow
def test_a_parameter_server_is_an_error():
    """With real servers, in its own process."""
    code = """
import socket, tensorflow as tf, keras, tfmixed
sockets = [socket.socket() for _ in range(3)]
for socket_ in sockets: socket_.bind(("127.0.0.1", 0))
jobs = {job: [f"127.0.0.1:{socket_.getsockname()[1]}"] for job, socket_ in zip(("chief", "worker", "ps"), sockets)}
for socket_ in sockets: socket_.close()
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
    assert "ParameterServerStrategyV2" in run.stdout, run.stderr[-2000:]


@made_up
def test_apply_outside_of_run_is_an_error():
    """In cross-replica context there is no gradient of one replica."""
    with mirrored().scope():
        weight, optimizer = keras.Variable([1.0]), LossScaleOptimizer("sgd")
        with pytest.raises(RuntimeError, match="replica context"):
            optimizer.apply([tf.ones(1)], [weight])


def on_replicas(make, *variables):
    """Returns an optimizer and variables on two replicas, and a compiled step with a pair of gradients for them."""
    strategy = mirrored()
    with strategy.scope():
        weights = [keras.Variable(value, dtype=dtype, name=name) for name, value, dtype in variables]
        optimizer = make()
        optimizer.build(weights)

    def replica_step(gradients):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([tf.gather(pair, replica) for pair in gradients], weights)

    return optimizer, weights, tf.function(lambda *gradients: strategy.run(replica_step, (gradients,)))


@pytest.mark.filterwarnings("ignore:SGD updates 2 float16 variables")
@made_up
@pytest.mark.parametrize(("dtype", "small", "large"), [("float32", 4e18, 1.2e19), ("float16", 2.0, 4e4)])
def test_the_sum_over_replicas_must_be_finite_too(dtype, small, large):
    """With its norm, which may overflow although that of each replica does not."""
    optimizer, weights, step = on_replicas(
        lambda: LossScaleOptimizer(keras.optimizers.SGD(1e-18), 1), *((name, np.ones(2), dtype) for name in "ab")
    )
    for size, skips in ((large, 1), (small, 0)):
        step(tf.ones((2, 2)), tf.constant([[1.0, size]] * 2))
        assert optimizer._overflow_counts() == {"a": 0, "b": skips}
        for copy in mirrored().experimental_local_results(weights[1].value):
            assert np.isfinite(copy.numpy()).all()
            assert size == small or np.array_equal(copy.numpy(), [1.0, 1.0])


@made_up
def test_gradients_whose_sum_cannot_be_squared_are_an_overflow():
    """The square of 1.5e19 is finite and that of twice as much is not. No moment of Adam becomes infinite."""
    optimizer, _, step = on_replicas(lambda: LossScaleOptimizer("adam", 1), ("w", [0.0], "float32"))
    for size in (1.5e19, 1.0):
        step(tf.fill((2, 1), size))
    assert all(np.isfinite(variable.numpy()).all() for variable in optimizer.variables)
    assert (int(optimizer.skipped_steps), int(optimizer.iterations.numpy())) == (1, 1)


@made_up
def test_the_norm_is_that_of_the_sum_where_replicas_agree():
    """Two gradients of norm 5 add up to one of 10. A rule gets the largest value on any replica."""
    rule = LogMaxScale(initial_scale=4.0, max_scale=2.0**20)
    optimizer, _, step = on_replicas(lambda: LossScaleOptimizer("sgd", rule), ("w", [0.0, 0.0], "float32"))
    step(tf.constant([[12.0, 16.0]] * 2))
    assert float(optimizer.gradient_norm) == pytest.approx(10.0)
    scales, sizes = [float(optimizer.loss_scale)], [[1.0, 0.5], [-4.0, 1.0]]
    for pair in sizes:
        step(tf.constant([[size, 0.0] for size in pair]) * optimizer.loss_scale)
        scales.append(float(optimizer.loss_scale))
    np.testing.assert_allclose(scales, scaling.simulate(rule, "TTT", [4.0, 1.0, 4.0]), rtol=1e-5)


@made_up
def test_sparse_and_missing_gradients_on_replicas():
    """`tf.IndexedSlices` and None pass through the merge."""
    strategy = mirrored()
    with strategy.scope():
        table, unused = keras.Variable(np.ones((3, 2)), name="table"), keras.Variable([1.0], name="unused")
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4)
        optimizer.build([table, unused])

    @tf.function
    def step(bad):
        def replica_step():
            last = tf.distribute.get_replica_context().replica_id_in_sync_group == 1
            values = tf.fill((1, 2), tf.where(tf.logical_and(bad, last), np.inf, 4.0))
            optimizer.apply([tf.IndexedSlices(values, tf.constant([1]), tf.constant([3, 2])), None], [table, unused])

        strategy.run(replica_step)

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        step(tf.constant(False))
    step(tf.constant(True))
    for copy in strategy.experimental_local_results(table.value):
        np.testing.assert_array_equal(copy.numpy(), [[1, 1], [-1, -1], [1, 1]])
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("style", ["Keras 2", pytest.param("Keras 3", marks=slow)])
def test_several_optimizers_in_one_step(style):
    """Weights and norms are those of unscaled steps, and no warning tells of a loss that was not scaled."""
    strategy = mirrored()
    with strategy.scope():
        weights = [keras.Variable([1.0, 1.0]) for _ in range(2)]
        optimizers = [LossScaleOptimizer(keras.optimizers.SGD(0.5), 1024.0) for _ in weights]
        for optimizer, weight in zip(optimizers, weights, strict=True):
            optimizer.build([weight])

    def replica_step():
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

    for step in (lambda: strategy.run(replica_step), tf.function(lambda: strategy.run(replica_step))):
        step()
    for optimizer, weight in zip(optimizers, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), [0.0, 0.0])
        assert float(optimizer.gradient_norm) == pytest.approx(2**0.5)
