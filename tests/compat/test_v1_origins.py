"""Overflows are attributed to steps: gradients are traced from `compute_gradients` to `apply_gradients`."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1
from thorough import thorough

from tfmixed.compat.v1 import DynamicLossScale, LossScaleOptimizer
from tfmixed.scaling import DynamicScale

RULE = DynamicScale(initial_scale=2.0**20)


@pytest.fixture(autouse=True)
def _own_graph():
    with tf.Graph().as_default():
        yield


def scaler(rule=RULE):
    return LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), rule)


def weights(*names):
    """Returns variables with initial value 0, and placeholders for their gradients."""
    made = [V1.get_variable(name, initializer=tf.zeros(2)) for name in names]
    return made, [V1.placeholder(tf.float32, [2]) for _ in names]


def clipped(pairs):
    return [(tf.clip_by_value(gradient, -1.0, 1.0), variable) for gradient, variable in pairs]


def product(variable, factor):
    return tf.reduce_sum(variable * factor)


GOOD, BAD = [1.0, 1.0], [1.0, np.inf]


@pytest.mark.parametrize("shared", ["optimizer", pytest.param("scale", marks=pytest.mark.slow)])
def test_overflow_of_one_loss_does_not_skip_another(shared):
    """As the two networks of a GAN in one session run."""
    both, given = weights("generator", "discriminator")
    scale = DynamicLossScale(2.0**20)
    first = scaler(scale)
    optimizers = (first, first) if shared == "optimizer" else (first, scaler(scale))
    train = [
        optimizer.apply_gradients(clipped(optimizer.compute_gradients(product(weight, factor), [weight])))
        for optimizer, weight, factor in zip(optimizers, both, given, strict=True)
    ]
    with tf1.session() as session:
        for _ in range(30):
            session.run(train, dict(zip(given, (BAD, GOOD), strict=True)))
        np.testing.assert_array_equal(session.run(both), [[0.0, 0.0], [-30.0, -30.0]])
        assert session.run(first.loss_scale) < 2.0**20


@pytest.mark.slow
def test_threads_skip_only_their_own_overflows():
    """Two threads train in one graph."""
    both, given = weights("a", "b")
    optimizer = scaler()
    train = [
        optimizer.apply_gradients(clipped(optimizer.compute_gradients(product(weight, factor), [weight])))
        for weight, factor in zip(both, given, strict=True)
    ]
    with tf1.session() as session:

        def work(number):
            for _ in range(50):
                session.run(train[number], {given[number]: (BAD, GOOD)[number]})

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        np.testing.assert_array_equal(session.run(both), [[0.0, 0.0], [-50.0, -50.0]])


def test_one_optimizer_applies_gradients_computed_by_another():
    """Both skip, and both log the variable that overflowed."""
    both, given = weights("body", "head")
    slow, fast = scaler(), scaler()
    other = V1.get_variable("other", initializer=tf.zeros(2))
    fast.compute_gradients(product(other, given[0]), [other])  # the variables have other indices
    loss = product(both[0], given[0]) + product(both[1], given[1])
    pairs = clipped(slow.compute_gradients(loss, both))
    train = [slow.apply_gradients(pairs[:1]), fast.apply_gradients(pairs[1:])]
    with tf1.session() as session:
        session.run(train, dict(zip(given, (GOOD, BAD), strict=True)))
        np.testing.assert_array_equal(session.run(both), np.zeros((2, 2)))
        assert session.run([slow.skipped_steps, fast.skipped_steps]) == [1, 1]
        for optimizer in (slow, fast):
            state = optimizer._state()
            (event,) = tf1.events(session, state)
            assert (event.reason, event.variable) == ("overflow", "head")


@pytest.mark.slow
def test_gradients_for_a_summary_do_not_skip_a_later_step():
    """They are computed in the same run as the applied ones, and overflow with them."""
    (weight,), (given,) = weights("w")
    optimizer = scaler()
    loss = product(weight, given)
    norms = [tf.norm(gradient) for gradient, _ in optimizer.compute_gradients(loss)]
    train = optimizer.minimize(loss)
    with tf1.session() as session:
        for numbers in (BAD, GOOD, GOOD):
            session.run([train, norms], {given: numbers})
        np.testing.assert_array_equal(session.run(weight), [-2.0, -2.0])
        assert session.run([optimizer.skipped_steps, optimizer.loss_scale]) == [1, 2.0**19]


def test_overflow_of_fetched_gradients():
    """Gradients are fetched, clipped by NumPy, and fed again."""
    (weight,), (given,) = weights("w")
    optimizer = scaler()
    ((gradient, _),) = optimizer.compute_gradients(product(weight, given))
    fed = V1.placeholder(tf.float32, [2])
    train = optimizer.apply_gradients([(fed, weight)])
    with tf1.session() as session:
        for numbers in (BAD, GOOD):
            session.run(train, {fed: np.clip(session.run(gradient, {given: numbers}), -1.0, 1.0)})
        np.testing.assert_array_equal(session.run(weight), [-1.0, -1.0])
        assert session.run(optimizer.skipped_steps) == 1


@pytest.mark.slow
def test_gradients_of_an_imported_graph(tmp_path):
    """Under a scope of its own, where the finding has another name."""
    (weight,), (given,) = weights("w")
    ((gradient, _),) = scaler().compute_gradients(product(weight, given))
    V1.train.export_meta_graph(str(tmp_path / "model.meta"))
    with tf.Graph().as_default() as graph:
        V1.train.import_meta_graph(str(tmp_path / "model.meta"), import_scope="old")
        gradient, given = (graph.get_tensor_by_name(f"old/{tensor.name}") for tensor in (gradient, given))
        optimizer = scaler()
        train = optimizer.apply_gradients([(gradient, V1.trainable_variables()[0])])
        with tf1.session() as session:
            for numbers in (BAD, GOOD):
                session.run(train, {given: numbers})
            np.testing.assert_array_equal(session.run(V1.trainable_variables()), [[-1.0, -1.0]])
            assert session.run(optimizer.skipped_steps) == 1


def test_one_loss_adds_up_over_runs_while_another_is_trained():
    """Steps of one loss keep the pending overflow of the other, with a shared scale."""
    both, given = weights("slow", "quick")
    optimizer = scaler()
    kept = V1.get_variable("kept", initializer=tf.zeros(2), trainable=False)
    ((gradient, _),) = clipped(optimizer.compute_gradients(product(both[0], given[0]), both[:1]))
    add, slow = kept.assign_add(gradient), optimizer.apply_gradients([(kept, both[0])])
    quick = optimizer.minimize(product(both[1], given[1]), var_list=both[1:])
    with tf1.session() as session:
        session.run(add, {given[0]: BAD})
        session.run(quick, {given[1]: GOOD})
        session.run(slow)
        np.testing.assert_array_equal(session.run(both), [[0.0, 0.0], [-1.0, -1.0]])
        names = ("pending_count", "pending_bad")
        assert session.run([optimizer._state().read(name) for name in names]) == [0, 0]


def test_clipping_within_a_function_and_a_branch():
    """Gradients are traced through captured tensors."""
    (weight,), (given,) = weights("w")
    optimizer = scaler()
    pairs = optimizer.compute_gradients(product(weight, given))
    clip = tf.function(lambda gradient: tf.clip_by_value(gradient, -1.0, 1.0))
    pairs = [(clip(gradient), variable) for gradient, variable in pairs]
    now = V1.placeholder_with_default(True, [])
    train = tf.cond(now, lambda: optimizer.apply_gradients(clipped(pairs)), tf.no_op)
    with tf1.session() as session:
        for numbers in (BAD, GOOD):
            session.run(train, {given: numbers})
        np.testing.assert_array_equal(session.run(weight), [-1.0, -1.0])
        session.run(train, {given: BAD, now: False})
        session.run(train, {given: GOOD})
        assert session.run([optimizer.attempted_steps, optimizer.skipped_steps]) == [3, 1]


LOOPS = """
import sys
import numpy as np
import tensorflow as tf
V1 = tf.compat.v1
getattr(V1, sys.argv[1])()
import test_v1_origins as tests

def within(count):  # accumulates in a loop, and applies in its last iteration
    def iteration(number, added):
        factor = tf.where(tf.equal(number, bad), np.float32(np.inf), 1.0)
        ((gradient, _),) = tests.clipped(optimizer.compute_gradients(tests.product(weight, factor), [weight]))
        added += gradient
        step = lambda: optimizer.apply_gradients([(added, weight)])
        with V1.control_dependencies([tf.cond(tf.equal(number, count - 1), step, tf.no_op)]):
            return number + 1, tf.identity(added)
    return tf.while_loop(lambda number, _: number < count, iteration, [0, tf.zeros(2)])

def after(count):  # accumulates in a loop, and applies after it
    def iteration(number, added):
        factor = tf.where(tf.equal(number, bad), np.float32(np.inf), 1.0)
        ((gradient, _),) = tests.clipped(optimizer.compute_gradients(tests.product(weight, factor), [weight]))
        return number + 1, added + gradient
    _, added = tf.while_loop(lambda number, _: number < count, iteration, [0, tf.zeros(2)])
    return optimizer.apply_gradients([(added, weight)])

for train in (within, after):
    with tf.Graph().as_default():
        (weight,), _ = tests.weights("w")
        optimizer, bad = tests.scaler(), V1.placeholder(tf.int32, [])
        step = train(3)
        with tests.tf1.session() as session:
            for number in (-1, 0, -1, 2, 1, -1):
                session.run(step, {bad: number})
            print(*session.run(weight), *map(int, session.run([optimizer.attempted_steps, optimizer.skipped_steps])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["disable_v2_behavior", pytest.param("disable_eager_execution", marks=thorough)])
def test_gradients_accumulated_in_a_loop(switch):
    """An overflow in an earlier iteration skips the step, inside the loop and after it."""
    assert tf1.script(LOOPS, switch).splitlines() == ["-9.0 -9.0 6 3"] * 2
