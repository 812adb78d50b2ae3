from __future__ import annotations

import functools

import pytest
import tensorflow as tf
from replicas import KINDS, PLACES, STEPS, Trainer, bad_values, check

STRATEGIES = {
    "none": lambda: None,
    "one_device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "mirrored_2": lambda: mirrored(2),
    # TensorFlow's collectives, the default on CPUs, take groups of one size only in one process.
    "mirrored_4": lambda: mirrored(4, tf.distribute.ReductionToOneDevice()),
}


def mirrored(count, operations=None):
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(count)], operations)


@functools.cache
def trainer(strategy):
    """One for all tests: a run resets it, and costs no tracing."""
    return Trainer(STRATEGIES[strategy]())


@pytest.mark.parametrize("when", STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["first", "last", "all"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["fit", "loop"])
def test_an_overflow_anywhere_skips_just_that_step_everywhere(how, strategy, place, kind, when):
    """Weights are finite, bit-identical on all replicas, and those of a run without the bad batches (K3)."""
    run = trainer(strategy)
    bad = bad_values(STEPS[when], PLACES[place], KINDS[kind], run.replicas)
    outcome = getattr(run, how)(bad)
    check(outcome, STEPS[when])
    outcome.assert_same_weights(getattr(run, how)(bad, drop=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_an_overflow_a_run_is_that_of_the_bare_optimizer(strategy):
    """To the bit: the scale is a power of two."""
    outcome = trainer(strategy).fit({})
    check(outcome, [])
    outcome.assert_same_weights(Trainer(STRATEGIES[strategy](), rule=None).fit({}))
