"""Fused updates, and what the host does around them."""

from __future__ import annotations

import gc
import logging
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from backend import made_up
from thorough import thorough

from tfmixed import LossScaleOptimizer
from tfmixed._core.control_flow import cond

pytestmark = made_up
slow = pytest.mark.slow

KERAS_OPTIMIZERS = {
    name: kind
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type) and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", "OptimizerMap")
}


def several():
    by_name = {"a": keras.optimizers.Adam(), "b": keras.optimizers.SGD()}
    return keras.optimizers.MultiOptimizer(lambda variable: by_name[variable.name])


if hasattr(keras.optimizers, "MultiOptimizer"):  # from Keras 3.15 on
    KERAS_OPTIMIZERS["MultiOptimizer"] = several


class Own(keras.constraints.Constraint):
    """Constraint with a function. Keras 3.14 does not take a plain one."""

    def __init__(self, function):
        self.function = function

    def __call__(self, weight):
        return self.function(weight)


def variables(shape=(3, 4)):
    random = np.random.default_rng(0)
    return [keras.Variable(random.normal(size=shape).astype("float32"), name=name) for name in "ab"]


def gradients(scale, shape=(3, 4), steps=6):
    """Yields gradients with an overflow in the third step, in one value of the second variable."""
    random = np.random.default_rng(1)
    for step in range(steps):
        pair = [random.normal(size=shape).astype("float32") * scale for _ in range(2)]
        pair[1][0, 0] *= np.inf if step == 2 else 1
        yield [tf.constant(values) for values in pair]


def trained(inner, fuse="auto", shape=(3, 4), compiled=True, **arguments):
    weights = variables(shape)
    optimizer = LossScaleOptimizer(inner, 1024, fuse=fuse)
    optimizer.build(weights)
    step = tf.function(lambda grads: optimizer.apply(grads, weights), autograph=False, **arguments)
    for grads in gradients(1024, shape):
        (step if compiled else lambda grads: optimizer.apply(grads, weights))(grads)
    return optimizer, [weight.numpy() for weight in weights]


BOTH = [
    pytest.param(
        make,
        compiled,
        id=f"{name}-{mode}",
        marks=() if f"{name}-{mode}" in ("Adam-graph", "SGD-eager") else slow if compiled else thorough,
    )
    for name, make in KERAS_OPTIMIZERS.items()
    for mode, compiled in {"graph": True, "eager": False}.items()
]


@pytest.mark.parametrize(("make", "compiled"), BOTH)
def test_every_keras_optimizer_gives_the_same_fused(make, compiled):
    """Up to rounding, with an overflow in one step."""
    runs = [trained(make(), fuse, compiled=compiled) for fuse in (True, False)]
    assert [bool(optimizer.fused) for optimizer, _ in runs] == [True, False]
    assert [int(optimizer.skipped_steps) for optimizer, _ in runs] == [1, 1]
    for ours, theirs in zip(runs[0][0].variables, runs[1][0].variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6, err_msg=ours.path)
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-6)


OPTIONS = [
    {"global_clipnorm": 0.5},
    {"weight_decay": 0.1},
    {"clipnorm": 0.5},
    {"clipvalue": 0.1},
    {"use_ema": True, "ema_momentum": 0.5},
    {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)},
    {"gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=next(iter(options)), marks=slow if number else ())
        for number, options in enumerate(OPTIONS)
    ],
)
@pytest.mark.filterwarnings("ignore:`fuse=True` has no effect")
def test_an_update_is_that_of_the_inner_optimizer_without_the_bad_step(options, fuse):
    """Fused or not, with the decay, clipping, averages, schedules and constraints of Keras."""
    _, ours = trained(keras.optimizers.Adam(**{"learning_rate": 0.1, **options}), fuse)
    inner, weights = keras.optimizers.Adam(**{"learning_rate": 0.1, **options}), variables()
    inner.build(weights)
    for step, grads in enumerate(gradients(1)):
        if step != 2:
            inner.apply(grads, weights)
    np.testing.assert_allclose(ours, [weight.numpy() for weight in weights], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", [True, False])
def test_constraints_and_averages_are_kept(fuse):
    """The update does not write them itself."""
    weight = keras.Variable([[1.0, -1.0]])
    weight.constraint = keras.constraints.NonNeg()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5), 2, fuse=fuse)
    optimizer.build([weight])
    optimizer.apply([tf.constant([[1.0, 4.0]])], [weight])
    np.testing.assert_array_equal(weight.numpy(), [[0.5, 0.0]])
    average = next(variable for variable in optimizer.inner_optimizer.variables if "average" in variable.path)
    np.testing.assert_array_equal(average.numpy(), [[0.5, -3.0]])
    assert int(optimizer.iterations) == 1


def test_large_variables_are_fused_and_small_ones_are_not():
    """By default. `fused` tells the reason."""
    large, _ = trained("adam", shape=(256, 256))
    assert large.fused
    assert "2 of 2" in str(large.fused)
    small, _ = trained("adam")
    assert not small.fused
    assert "12 elements" in str(small.fused)


@pytest.mark.parametrize(
    ("inner", "fused"),
    [
        pytest.param(keras.optimizers.Adam(0.1), 1, id="adam"),
        pytest.param(keras.optimizers.AdamW(0.1, weight_decay=0.1), 1, id="adamw", marks=slow),
        pytest.param(keras.optimizers.Adam(0.1, use_ema=True), 3, id="ema", marks=slow),
        pytest.param(keras.optimizers.Adam(0.1, global_clipnorm=0.5), 3, id="global_clipnorm", marks=slow),
        pytest.param(keras.optimizers.SGD(0.1, momentum=0.5), 3, id="sgd", marks=slow),
    ],
)
def test_small_variables_beside_large_ones(inner, fused):
    """Adam's small ones are left to TensorFlow if variables do not depend on each other. The step is counted once."""
    shapes = [(512, 512), (3,), (4,)]
    weights = [[keras.Variable(np.ones(shape, "float32")) for shape in shapes] for _ in range(2)]
    optimizers = LossScaleOptimizer(inner, 8), type(inner).from_config(inner.get_config())

    def three_steps(optimizer, own, scale):
        optimizer.build(own)
        grads = [tf.fill(shape, scale * (1.0 + index)) for index, shape in enumerate(shapes)]
        step = tf.function(lambda: optimizer.apply(grads, own), autograph=False)
        for _ in range(3):
            step()
        assert int(optimizer.iterations) == 3

    three_steps(optimizers[0], weights[0], 8.0)
    three_steps(optimizers[1], weights[1], 1.0)
    assert f"{fused} of 3" in optimizers[0].fused.reason
    for ours, theirs in zip(optimizers[0].inner_optimizer.variables, optimizers[1].variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, err_msg=ours.path)
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5)


def test_the_reason_why_an_update_is_not_fused(caplog):
    """It is in a property, and once in the debug log."""
    with caplog.at_level(logging.DEBUG, "tfmixed"):
        optimizer = LossScaleOptimizer("sgd", fuse=False)
        assert "no step" in str(optimizer.fused)
        weights = variables()
        for _ in range(2):
            optimizer.apply([tf.ones((3, 4))] * 2, weights)
    assert (bool(optimizer.fused), optimizer.fused.reason) == (False, "fuse=False")
    assert caplog.messages == ["update not fused: fuse=False"]


class Printing(keras.optimizers.SGD):
    """An optimizer of a user that XLA cannot compile."""

    def update_step(self, gradient, variable, learning_rate):
        tf.py_function(lambda: None, [], [])
        super().update_step(gradient, variable, learning_rate)


class Halved(keras.optimizers.SGD):
    """An optimizer of a user that XLA can compile."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient / 2, variable, learning_rate)


def sparse():
    table = keras.Variable(np.ones((4, 2)))
    optimizer = LossScaleOptimizer("sgd", 2, fuse=True)
    optimizer.apply([tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), tf.constant([4, 2]))], [table])
    return optimizer


def on_one_device():
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        weights = variables()
        optimizer = LossScaleOptimizer("sgd", fuse=True)
        optimizer.build(weights)
    strategy.run(lambda: optimizer.apply([tf.ones((3, 4))] * 2, weights))
    return optimizer


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (lambda: trained("sgd", True, jit_compile=True)[0], "compiled already"),
        (lambda: trained(Printing(), True)[0], "EagerPyFunc"),
        (lambda: trained(keras.optimizers.SGD(gradient_accumulation_steps=2), True)[0], "branches"),
        (sparse, "sparse"),
        (on_one_device, "OneDeviceStrategy"),
        (lambda: trained(Halved(0.1), True, compiled=False)[0], "between eager steps"),
    ],
    ids=["jit_compile", "py_function", "accumulation", "sparse", "strategy", "eager"],
)
def test_an_update_that_cannot_be_fused(train, reason):
    """It is plain, with a warning for `fuse=True`."""
    with pytest.warns(UserWarning, match=f"no effect: .*{reason}"):
        optimizer = train()
    assert not optimizer.fused
    assert int(optimizer.attempted_steps) > int(optimizer.skipped_steps)


def embedded(fuse, compiled):
    """Trains a table with gradients whose rows repeat. The third step overflows."""
    table, optimizer = (
        keras.Variable(np.ones((5, 2), "float32")),
        LossScaleOptimizer(keras.optimizers.Adam(0.1), 4, fuse=fuse),
    )
    optimizer.build([table])

    def step(values):
        optimizer.apply([tf.IndexedSlices(values, tf.constant([1, 3, 1]), tf.constant([5, 2]))], [table])

    step = tf.function(step, autograph=False) if compiled else step
    for value in (1.0, 2.0, np.inf, 3.0):
        step(tf.constant([[4.0, 8.0], [2.0, 1.0], [8.0, value]]))
    assert (bool(optimizer.fused), int(optimizer.skipped_steps)) == (fuse, 1)
    return table.numpy()


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=slow)], ids=["graph", "eager"])
def test_adam_takes_sparse_gradients_fused(compiled):
    """Keras's Adam makes the gradients of embeddings dense, with its own code for rows that repeat."""
    fused, plain = embedded(True, compiled), embedded(False, compiled)
    np.testing.assert_allclose(fused, plain, rtol=1e-5)
    assert (fused[0] == 1.0).all()


def test_a_users_own_optimizer_is_fused_if_it_can_be():
    """XLA is tried first."""
    optimizer, fused = trained(Halved(0.1), True)
    assert optimizer.fused
    _, plain = trained(Halved(0.1), False)
    np.testing.assert_allclose(fused, plain, rtol=1e-6)


def test_a_fused_update_takes_any_of_its_variables():
    """Any subset of them, in any order, with or without a gradient."""
    optimizer, (a, b) = LossScaleOptimizer(keras.optimizers.SGD(1.0), 2, fuse=True), variables()
    optimizer.build([a, b])
    before = a.numpy(), b.numpy()
    two, four = tf.fill((3, 4), 2.0), tf.fill((3, 4), 4.0)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([two, None], [a, b])
    optimizer.apply([four, two], [b, a])
    optimizer.apply([two], [b])
    optimizer.apply([two, two], [a, b])
    np.testing.assert_allclose(before[0] - a.numpy(), np.full((3, 4), 3.0), rtol=1e-6)
    np.testing.assert_allclose(before[1] - b.numpy(), np.full((3, 4), 4.0), rtol=1e-6)


def test_fuse_is_saved_and_checked():
    """Like the other arguments."""
    config = keras.saving.serialize_keras_object(LossScaleOptimizer("sgd", fuse=False))
    assert keras.saving.deserialize_keras_object(config).get_config()["fuse"] is False
    assert "fuse" not in LossScaleOptimizer("sgd").get_config()
    with pytest.raises(ValueError, match="fuse"):
        LossScaleOptimizer("sgd", fuse="yes")


@slow
def test_a_fused_optimizer_is_saved_with_its_model(tmp_path):
    """Without its compiled functions."""
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300, use_bias=False)])
    model.compile(LossScaleOptimizer("adam"), loss="mse")
    x = np.ones((4, 300), "float32")
    model.fit(x, x, verbose=0)
    assert model.optimizer.fused
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for trained_model in (model, again):
        trained_model.fit(x, x, verbose=0)
    np.testing.assert_allclose(model.get_weights(), again.get_weights(), rtol=1e-6)
    tf.train.Checkpoint(optimizer=model.optimizer).write(tmp_path / "checkpoint")


def operations(graph):
    """Returns the types of all operations of a graph and of the functions that it calls."""
    nodes = list(graph.as_graph_def().node)
    for function in graph.as_graph_def().library.function:
        nodes += function.node_def
    return [node.op for node in nodes]


def test_a_branch_stays_one_operation():
    """Lowered to switches, it would cost a tenth of an update of many variables."""
    variable = tf.Variable(1.0)
    function = tf.function(lambda go: cond(go, lambda: (variable.assign_add(1.0), None)[1]), autograph=False)
    kinds = operations(function.get_concrete_function(tf.TensorSpec((), tf.bool)).graph)
    assert "If" in kinds
    for go in (True, False, True):
        function(tf.constant(go))
    assert float(variable) == 3.0


@pytest.mark.parametrize("how", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_a_skipped_branch_returns_zeros(how):
    """Of the given shape, which the graph knows too."""

    def taken(go, x):
        result = cond(go, lambda: x + 1.0, (2,))
        assert result.shape == (2,)
        return result

    function = tf.function(taken, autograph=False, **how)
    for go, expected in ((True, [2.0, 3.0]), (False, [0.0, 0.0])):
        np.testing.assert_array_equal(function(tf.constant(go), tf.constant([1.0, 2.0])), expected)


def test_tracing_logs_no_warning(caplog):
    """TensorFlow would warn of names that begin with an underscore."""
    with caplog.at_level(logging.WARNING, "tensorflow"):
        trained("adam", True)
    assert not caplog.messages


def test_step_and_learning_rate_are_read_once():
    """Keras's own Adam reads both once for each variable."""
    weights = [keras.Variable([1.0]) for _ in range(4)]

    def reads(optimizer):
        optimizer.build(weights)
        step = tf.function(lambda: optimizer.apply([tf.ones(1)] * 4, weights), autograph=False)
        kinds = operations(step.get_concrete_function().graph)
        return kinds.count("ReadVariableOp")

    scaled, bare = reads(LossScaleOptimizer("adam", 1, fuse=False)), reads(keras.optimizers.Adam())
    assert scaled < bare + 10  # it has ten variables of its own


# What the host does around the update.


@pytest.mark.parametrize("missing", [0, 1], ids=["large", "small"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_gradient_may_be_missing_among_large_and_small(missing):
    """Keras warns and trains. An optimizer without any gradient would raise an error."""
    weights = [keras.Variable(np.ones(shape, "float32")) for shape in ((300, 300), (3,))]
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1), 2)
    optimizer.build(weights)
    grads = [tf.fill(weight.shape, 2.0) for weight in weights]
    grads[missing] = None
    optimizer.apply(grads, weights)
    assert [float(np.mean(weight.numpy())) == 1.0 for weight in weights] == [missing == 0, missing == 1]
    assert int(optimizer.iterations) == 1


def constant(rate):
    return keras.optimizers.schedules.PiecewiseConstantDecay([10**6], [rate, rate])


def test_hyperparameters_may_change_between_steps():
    """Compiled functions keep the old values. Numbers of a schedule and of NumPy may change too."""
    changes = [
        lambda inner: setattr(inner, "clipvalue", 1.0),
        lambda inner: setattr(inner, "clipvalue", 0.5),
        lambda inner: setattr(inner, "clipvalue", np.float32(0.25)),
        lambda inner: setattr(inner, "clipvalue", np.float32(0.125)),
        lambda inner: inner._learning_rate.values.__setitem__(0, 2.0),
    ]
    for fuse in (True, False):
        weight = keras.Variable(np.zeros((2, 2), "float32"))
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(constant(1.0)), 2, fuse=fuse)
        optimizer.build([weight])
        for change in changes:
            change(optimizer.inner_optimizer)
            optimizer.apply([tf.fill((2, 2), 8.0)], [weight])
        np.testing.assert_allclose(weight.numpy(), -(1 + 0.5 + 0.25 + 0.125 + 2 * 0.125))


@slow
def test_a_schedule_may_be_replaced():
    """Even if the new one gets the id of the old one. Functions compiled for the oldest ones are dropped."""
    weight, first = keras.Variable(np.zeros((2, 2), "float32")), None
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(constant(0.5)), 2, fuse=True)
    optimizer.build([weight])
    for number in range(18):
        optimizer.inner_optimizer.learning_rate = constant(9.0)  # the next object gets its place
        optimizer.inner_optimizer.learning_rate = schedule = constant(2.0**-number)
        first, before = first or weakref.ref(schedule), weight.numpy()
        del schedule
        optimizer.apply([tf.fill((2, 2), 2.0)], [weight])
        np.testing.assert_allclose(before - weight.numpy(), 2.0**-number, rtol=1e-4)
    gc.collect()
    assert first() is None


class Counting(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of a user with its own variable."""

    def __init__(self):
        self.calls = keras.Variable(0.0)

    def __call__(self, step):
        self.calls.assign_add(1.0)
        return self.calls.value * 0.1


@pytest.mark.parametrize("shape", [(3,), (300, 300)], ids=["small", "large"])
def test_variables_of_a_users_schedule_and_constraint_are_written(shape):
    """Fused or not."""

    def drop(weight):
        return weight * keras.random.dropout(keras.ops.ones_like(weight), 0.5, seed=seeds)

    schedule = Counting()
    seeds, weight = keras.random.SeedGenerator(0), keras.Variable(np.ones(shape, "float32"))
    weight.constraint = Own(drop)
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(schedule), 2)
    optimizer.build([weight])
    step = tf.function(lambda: optimizer.apply([tf.fill(shape, 2.0)], [weight]), autograph=False)
    before = seeds.state.numpy().tolist()
    for _ in range(3):
        step()
    assert float(schedule.calls.numpy()) >= 3.0
    assert seeds.state.numpy().tolist() != before


def test_a_users_constraint_is_tried_first():
    """XLA may not be able to compile a constraint or a learning rate of a user."""
    weight = keras.Variable(np.ones((300, 300), "float32"))
    weight.constraint = Own(lambda value: tf.ensure_shape(tf.numpy_function(np.copy, [value], tf.float32), (300, 300)))
    optimizer = LossScaleOptimizer("adam", 2)
    optimizer.build([weight])
    tf.function(lambda: optimizer.apply([tf.ones((300, 300))], [weight]), autograph=False)()
    assert "XLA cannot compile it" in optimizer.fused.reason
    assert float(weight.numpy()[0, 0]) < 1.0


@pytest.mark.parametrize("fuse", ["auto", False])
def test_variables_on_two_devices(fuse):
    """The branch is not one operation, which would run on one device."""
    weights = []
    for device in ("CPU:0", "CPU:1"):
        with tf.device(device):
            weights.append(keras.Variable(np.ones((300, 300), "float32")))
    optimizer = LossScaleOptimizer("sgd", 2, fuse=fuse)
    optimizer.build(weights)
    step = tf.function(lambda x: optimizer.apply([tf.fill((300, 300), x)] * 2, weights), autograph=False)
    for value in (2.0, np.inf, 2.0):
        step(tf.constant(value))
    assert (bool(optimizer.fused), int(optimizer.iterations), int(optimizer.skipped_steps)) == (False, 2, 1)


def test_no_gradient_is_kept_alive():
    """By the function that was compiled with it."""
    weights, optimizer = variables(), LossScaleOptimizer("adam", 1024, fuse=True)
    grads = [tf.ones((3, 4)) for _ in weights]
    references = [weakref.ref(gradient) for gradient in grads]
    optimizer.apply(grads, weights)
    assert optimizer.fused
    del grads
    gc.collect()
    assert [reference() for reference in references] == [None, None]
