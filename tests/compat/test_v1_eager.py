"""The optimizer of `tfmixed.compat.v1` where there is no graph but that of a `tf.function`."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmixed import scaling
from tfmixed.compat.v1 import LossScaleOptimizer
from tfmixed.errors import LossScaleExhausted
from tfmixed.scaling import DynamicScale

V1 = tf.compat.v1
TRACE = "TTTFTTFFTTTT"
RULE = DynamicScale(initial_scale=8.0, growth_interval=2, min_scale=2.0)


@pytest.mark.parametrize("compile_", [tf.function, lambda step: step], ids=["function", "eager"])
def test_in_eager_code_and_its_functions(compile_):
    """One state for all of them, as `simulate` has it, with the events."""
    weight = tf.Variable([1.0, 2.0])
    optimizer = LossScaleOptimizer(V1.train.MomentumOptimizer(1.0, 0.0), RULE)

    @compile_
    def step(given):
        optimizer.minimize(lambda: tf.reduce_sum(weight * given), var_list=[weight])

    scales = []
    for letter in TRACE:
        step(tf.constant([1.0, 1.0 if letter == "T" else np.inf]))
        scales.append(float(optimizer.loss_scale))
    assert scales == scaling.simulate(RULE, TRACE)
    assert int(optimizer.skipped_steps) == TRACE.count("F")
    overflows = [event for event in optimizer.drain_events() if event.reason == "overflow"]
    assert [(event.step, event.new_scale) for event in overflows] == [(3, 8.0), (6, 8.0), (7, 4.0)]
    np.testing.assert_array_equal(weight.numpy(), [-8.0, -7.0])


def test_clipping_in_a_function_hides_nothing():
    """As in a graph."""
    weight = tf.Variable([1.0, 2.0])
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)

    @tf.function
    def step(given):
        pairs = optimizer.compute_gradients(lambda: tf.reduce_sum(weight * given), [weight])
        optimizer.apply_gradients([(tf.clip_by_value(gradient, -1.0, 1.0), variable) for gradient, variable in pairs])

    step(tf.constant([1.0, np.inf]))
    np.testing.assert_array_equal(weight.numpy(), [1.0, 2.0])
    step(tf.constant([3.0, 1.0]))
    np.testing.assert_array_equal(weight.numpy(), [0.0, 1.0])


def test_a_row_of_skips_at_the_floor_is_an_error_where_it_is_asked_for():
    """With the variable's name."""
    weight = tf.Variable([1.0], name="guilty")
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE, max_consecutive_skips=3)
    for _ in range(3):
        optimizer.raise_if_exhausted()
        optimizer.minimize(lambda: tf.reduce_sum(weight * np.nan), var_list=[weight])
    with pytest.raises(LossScaleExhausted, match=r"guilty \(3 times\)"):
        optimizer.raise_if_exhausted()


def test_a_strategy_is_refused_with_what_to_use():
    """The wrapped optimizer would merge its replicas within a branch."""
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        weight, optimizer = tf.Variable(1.0), LossScaleOptimizer(V1.train.AdamOptimizer())
        with pytest.raises(NotImplementedError, match=r"GradScaler"):
            optimizer.minimize(lambda: weight * 1.0, var_list=[weight])


def test_a_checkpoint_of_objects_holds_the_scale_and_the_slots(tmp_path):
    """It restores into an optimizer that has not been used yet."""

    def made():
        weight, optimizer = tf.Variable([1.0]), LossScaleOptimizer(V1.train.MomentumOptimizer(1.0, 0.9), RULE)
        return optimizer, weight, tf.train.Checkpoint(optimizer=optimizer, weight=weight)

    def step(optimizer, weight, factor):
        optimizer.minimize(lambda: tf.reduce_sum(weight * factor), var_list=[weight])

    first, second = made(), made()
    for factor in (1.0, np.inf):
        step(*first[:2], factor)
    second[2].restore(first[2].save(tmp_path / "checkpoint"))
    for each in (first, second):
        step(*each[:2], 1.0)
    (optimizer, weight, _), (other, other_weight, _) = first, second
    assert (float(other.loss_scale), int(other.attempted_steps), int(other.skipped_steps)) == (4.0, 3, 1)
    np.testing.assert_array_equal(other_weight.numpy(), weight.numpy())
    assert float(optimizer.loss_scale) == 4.0
