from __future__ import annotations

import numpy as np
import pytest

from tfmixed.formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_arithmetic_rounds_at_the_limits(name):
    """Each limit is where the arithmetic of the dtype itself overflows, underflows or rounds."""
    ours, kind = FORMATS[name], np.dtype(name).type
    assert kind(1 + ours.epsilon) > kind(1) == kind(1 + ours.epsilon / 2)
    assert kind(ours.smallest_subnormal) > 0 == kind(ours.smallest_subnormal / 2)
    assert kind(ours.smallest_normal * (1 + ours.epsilon)) > kind(ours.smallest_normal)
    with np.errstate(over="ignore"):
        assert np.isfinite(kind(ours.max))
        assert np.isinf(kind(ours.max * (1 + ours.epsilon)))


def test_bfloat16_has_the_range_of_float32():
    """It has 8 bits of precision."""
    ours = FORMATS["bfloat16"]
    assert ours.smallest_normal == FORMATS["float32"].smallest_normal
    assert ours.epsilon == 2.0**-7
    assert ours.max == (2 - 2.0**-7) * 2.0**127
