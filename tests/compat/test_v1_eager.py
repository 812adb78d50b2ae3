"""`tfmixed.compat.v1.LossScaleOptimizer` in eager code and in `tf.function`."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from replicas import mirrored

from tfmixed import scaling
from tfmixed.compat.v1 import LossScaleOptimizer
from tfmixed.errors import LossScaleExhausted
from tfmixed.scaling import DynamicScale

V1 = tf.compat.v1
TRACE = "TTTFTTFFTTTT"
RULE = DynamicScale(initial_scale=8.0, growth_interval=2, min_scale=2.0)


@pytest.mark.parametrize("compile_", [tf.function, lambda step: step], ids=["function", "eager"])
def test_in_eager_code_and_its_functions(compile_):
    """Scales follow `simulate`, and overflows are logged."""
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


def test_clipping_in_a_function_does_not_hide_an_overflow():
    """An infinite gradient is clipped, and the step is still skipped."""
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


def test_raise_if_exhausted():
    """Names the variable that overflowed."""
    weight = tf.Variable([1.0], name="bad")
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE, max_consecutive_skips=3)
    for _ in range(3):
        optimizer.raise_if_exhausted()
        optimizer.minimize(lambda: tf.reduce_sum(weight * np.nan), var_list=[weight])
    with pytest.raises(LossScaleExhausted, match=r"bad \(3 times\)"):
        optimizer.raise_if_exhausted()


def test_strategies_are_not_supported():
    """The wrapped optimizer would merge its replicas in a branch."""
    with mirrored().scope():
        weight, optimizer = tf.Variable(1.0), LossScaleOptimizer(V1.train.AdamOptimizer())
        with pytest.raises(NotImplementedError, match=r"GradScaler"):
            optimizer.minimize(lambda: weight * 1.0, var_list=[weight])


def test_object_checkpoint_restores_scale_and_slots(tmp_path):
    """Into an optimizer that has not been used yet."""

    def made():
        weight, optimizer = tf.Variable([1.0]), LossScaleOptimizer(V1.train.MomentumOptimizer(1.0, 0.9), RULE)
        return optimizer, weight, tf.train.Checkpoint(optimizer=optimizer, weight=weight)

    def step(optimizer, weight, factor):
        optimizer.minimize(lambda: tf.reduce_sum(weight * factor), var_list=[weight])

    first, second = made(), made()
    for factor in (1.0, np.inf):
        step(*first[:2], factor)
    second[2].restore(first[2].save(tmp_path / "checkpoint"))
    for optimizer, weight, _ in (first, second):
        step(optimizer, weight, 1.0)
        assert float(optimizer.loss_scale) == 4.0
        assert (int(optimizer.attempted_steps), int(optimizer.skipped_steps)) == (3, 1)
    np.testing.assert_array_equal(second[1].numpy(), first[1].numpy())
