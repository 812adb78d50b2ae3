from __future__ import annotations

import fuzz_overflows as fuzz
import keras
import pytest
from thorough import thorough


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=thorough) for first in range(10, 60, 10))])
def test_random_overflows_break_nothing(first):
    """Weights stay finite and equal on all replicas, and scale, counters and log follow the rule, in ten runs."""
    for seed in range(first, first + 10):
        case = fuzz.case(seed)
        run = fuzz.run(case, ours=True)
        assert fuzz.faults(case, run) | fuzz.own_faults(case, run) == set(), f"seed {seed}: {case.rule}"
    keras.backend.clear_session()


@thorough
def test_the_same_overflows_break_keras_own_class():
    """The check finds faults K1 and K3 of the documentation."""
    found = [fuzz.faults(case, fuzz.run(case, ours=False)) for case in map(fuzz.case, range(6))]
    assert "non-finite weights" in set().union(*found)
