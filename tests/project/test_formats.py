from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tfmixed.formats import FORMATS


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_numbers_are_numpys(name):
    """The table agrees with numpy's own."""
    info, ours = np.finfo(name), FORMATS[name]
    assert (ours.max, ours.smallest_normal, ours.smallest_subnormal, ours.epsilon) == (
        info.max,
        info.smallest_normal,
        info.smallest_subnormal,
        info.eps,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_ml_dtypes(name):
    """All three formats, and their halves and neighbours in their own arithmetic."""
    info, ours, kind = ml_dtypes.finfo(name), FORMATS[name], np.dtype(name).type
    assert (ours.name, ours.max, ours.epsilon) == (name, float(info.max), float(info.eps))
    assert kind(1 + ours.epsilon) > kind(1) == kind(1 + ours.epsilon / 2)
    assert kind(ours.smallest_subnormal) > 0 == kind(ours.smallest_subnormal / 2)


def test_bfloat16_is_float32_with_seven_bits():
    """Range of float32, precision of 8 bits."""
    ours = FORMATS["bfloat16"]
    assert ours.smallest_normal == FORMATS["float32"].smallest_normal
    assert ours.epsilon == 2.0**-7
    assert ours.max == (2 - 2.0**-7) * 2.0**127


def test_float16_overflows_and_underflows_at_the_edges():
    """One step beyond the largest number is inf, half of the smallest is 0."""
    ours = FORMATS["float16"]
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(ours.max + 16))
    assert np.float16(ours.smallest_subnormal / 2) == 0 < np.float16(ours.smallest_subnormal)
