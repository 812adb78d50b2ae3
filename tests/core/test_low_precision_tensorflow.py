"""`LowPrecisionOptimizer` on replicas and workers, with sparse gradients, TensorFlow's checkpoints and `GradScaler`."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import workers
from replicas import mirrored
from test_low_precision import FORMS, KINDS, WEIGHTS, assert_same, moved, numbers, train, variables
from thorough import few

from tfmixed import GradScaler, LossScaleOptimizer, LowPrecisionOptimizer, scaling

slow = pytest.mark.slow


def on_replicas(optimizer, steps, constraint=None):
    """Trains on two replicas with different gradients, and returns the strategy and all variables."""
    strategy = mirrored()
    with strategy.scope():
        own, optimizer = variables(), optimizer()
        own[0].constraint = constraint
        optimizer.build(own)

    @tf.function
    def step(seed):
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            seeds = tf.stack([seed, replica])
            grads = [tf.random.stateless_normal(variable.shape, seeds) for variable in own]
            if isinstance(optimizer, LossScaleOptimizer):
                grads = [gradient * optimizer.loss_scale for gradient in grads]
                is_bad = tf.logical_and(tf.equal(seed, 1), tf.equal(replica, 1))
                grads[0] = tf.where(is_bad, np.nan, grads[0])
            optimizer.apply([tf.cast(gradient, "bfloat16") for gradient in grads], own)

        strategy.run(replica_step)

    if isinstance(optimizer, LossScaleOptimizer):
        optimizer.scale_loss(0.0)
    for number in range(steps):
        step(tf.constant(number))
    return strategy, own, optimizer


@pytest.mark.parametrize(("weights", "states"), FORMS)
@pytest.mark.parametrize("outer", [False, pytest.param(True, marks=slow)])
def test_replicas_draw_the_same_noise(weights, states, outer):
    """All copies of weights and states are equal, bit for bit, also with a constraint and a skipped step."""

    def optimizer():
        made = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states)
        return LossScaleOptimizer(made, 16) if outer else made

    strategy, own, made = on_replicas(optimizer, 3, keras.constraints.NonNeg())
    assert int(made.iterations.numpy()) == (2 if outer else 3)
    assert min(moved(own)) > 0.1
    for variable in [*own, *getattr(made, "inner_optimizer", made).variables, *made.variables]:
        if variable.name == "gradient_norm":
            continue
        copies = [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]
        for copy in copies[1:]:
            assert copies[0].tobytes() == copy.tobytes(), variable.path


@slow
def test_split_weights_on_replicas_are_those_of_float32():
    """Gradients are summed in float32, as Keras sums those of float32 weights."""
    _, _, ours = on_replicas(lambda: LowPrecisionOptimizer(keras.optimizers.Adam(0.01), "split", "float32"), 3)
    strategy = mirrored()
    with strategy.scope():
        wide, plain = variables("float32"), keras.optimizers.Adam(0.01)
        plain.build(wide)

    @tf.function
    def step(seed):
        def replica_step():
            seeds = tf.stack([seed, tf.distribute.get_replica_context().replica_id_in_sync_group])
            grads = [tf.cast(tf.random.stateless_normal(variable.shape, seeds), "bfloat16") for variable in wide]
            plain.apply([tf.cast(gradient, "float32") for gradient in grads], wide)

        strategy.run(replica_step)

    for number in range(3):
        step(tf.constant(number))
    views = ours._created.views
    for view, variable in zip(views, wide, strict=True):
        np.testing.assert_array_equal(view.value.numpy(), variable.numpy())


@slow
def test_workers_take_the_same_steps(tmp_path):
    """In two processes, with float32 states. TensorFlow cannot create others there, which is said."""
    first, second = workers.run(2, "low_precision_worker.py", folder=tmp_path)
    assert first["iterations"] == second["iterations"] == 4
    for ours, theirs in zip(first["values"], second["values"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all("several workers" in message for message in first["refusals"])


# Sparse gradients.


def sparse_step(optimizer, weights):
    optimizer.build(weights)
    rows, shape = tf.constant([3, 5, 3]), tf.constant([70, 64])

    @tf.function
    def step(values):
        optimizer.apply([tf.IndexedSlices(tf.cast(values, weights[0].dtype), rows, shape)], weights)

    return step


@pytest.mark.parametrize(
    "kind",
    few(["SGD", "Adam"], {name: kind for name, kind in KINDS.items() if name not in ("Muon", "ScheduleFreeAdamW")}),
)
def test_sparse_gradients(kind):
    """`tf.IndexedSlices`, with a row twice: the weights are those of Keras's optimizer in float32."""
    shapes = {"embeddings": (70, 64)}
    own, wide = variables("bfloat16", shapes), variables("float32", shapes)
    arguments = {"momentum": 0.9} if kind is keras.optimizers.SGD else {}
    ours, plain = (
        LowPrecisionOptimizer(kind(0.01, **arguments), "split", "float32", fuse=False),
        kind(0.01, **arguments),
    )
    for optimizer, weights in ((ours, own), (plain, wide)):
        step = sparse_step(optimizer, weights)
        for number in range(3):
            step(tf.random.stateless_normal((3, 64), (number, 0), dtype=tf.bfloat16))
    # Scatters and sums add the two gradients of a row in another order.
    np.testing.assert_allclose(ours._created.views[0].value.numpy(), wide[0].numpy(), rtol=1e-5, atol=1e-6)
    changed = numbers(wide)[0] != numbers(variables("float32", shapes))[0]
    assert changed[[3, 5]].any()


# Checkpoints and `GradScaler`.


@pytest.mark.parametrize(("weights", "states"), FORMS)
def test_checkpoints_of_tensorflow(tmp_path, weights, states):
    """A restored run is bit-identical, also if it is restored before the optimizer is built."""
    whole = variables()
    made = train(LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states), whole, 4)
    own = variables()
    first = train(LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states), own, 2)
    path = tf.train.Checkpoint(weights=own, optimizer=first).save(str(tmp_path / "run"))
    for early in (False, True):
        other, second = variables(), LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states)
        if not early:
            second.build(other)
        status = tf.train.Checkpoint(weights=other, optimizer=second).restore(path)
        second.build(other)
        status.assert_consumed()
        assert_same([*own, *first.variables], [*other, *second.variables])
        train(second, other, range(2, 4))
        assert_same([*whole, *made.variables], [*other, *second.variables])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_grad_scaler_skips_its_steps(weights):
    """A skipped step changes nothing, and later ones are as if it had not been."""

    def run(steps):
        own, scaler = variables(), GradScaler(rule=scaling.DynamicScale(initial_scale=16.0))
        optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, "int8")
        optimizer.build(own)
        for number in steps:
            grads = [tf.ones(variable.shape, "bfloat16") * ((number or 0) + 1) for variable in own]
            grads = [tf.cast(scaler.scale(tf.cast(gradient, "float32")), "bfloat16") for gradient in grads]
            if number is None:
                grads[1] = grads[1] * np.inf
            assert bool(scaler.step(optimizer, zip(grads, own, strict=True))) == (number is not None)
            scaler.update()
        return [*own, *optimizer.variables]

    assert_same(run([0, None, 1]), run([0, 1]))


# Memory.


@pytest.mark.thorough
def test_a_compiled_step_is_traced_once_a_form():
    """Further calls add no traces."""
    own, traces = variables(), []
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), states="int8")
    optimizer.build(own)

    @tf.function
    def step(*grads):
        traces.append(1)
        optimizer.apply(grads, own)

    for _ in range(3):
        step(*(tf.ones(variable.shape, "bfloat16") for variable in own))
    assert len(traces) == 1


def apply_to_all(optimizer, own, gradient):
    optimizer.apply([gradient] * len(own), own)


@pytest.mark.parametrize("states", ["bfloat16", pytest.param("int8", marks=slow)])
def test_variables_of_one_shape_share_a_compiled_step(states):
    """It gives what a step that is not compiled gives, with noise of their own."""
    ends = []
    for fuse in (True, False):
        keras.utils.set_random_seed(0)
        own = [keras.Variable(tf.random.normal((80, 64)), dtype="bfloat16", name=name) for name in "abc"]
        optimizer = LowPrecisionOptimizer(keras.optimizers.AdamW(0.01), states=states, fuse=fuse)
        optimizer.build(own)

        step = tf.function(functools.partial(apply_to_all, optimizer, own))
        for number in range(3):
            step(tf.random.stateless_normal((80, 64), (number, 0)))
        assert bool(optimizer.fused) is fuse
        ends.append(numbers(own))
        if fuse:
            assert len(optimizer._compiled_steps._shared) == 1
    for compiled, plain in zip(*ends, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=2**-7, atol=1e-6)
    assert not np.array_equal(ends[0][0], ends[0][1])
