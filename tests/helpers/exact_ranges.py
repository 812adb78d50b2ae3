"""Ranges that numpy counts, to compare those of `tfmixed.ranges` with."""

from __future__ import annotations

import math

import numpy as np

from tfmixed.records import GradientRange


def counted(values, name="layer/kernel", dtype="float16", kind="weight"):
    """Counts values with numpy's arithmetic, without code of the package."""
    values = np.abs(np.asarray(values, "float64"))
    finite = values[np.isfinite(values)]
    nonzero = finite[finite > 0]
    octaves = {}
    for value in nonzero:
        octave = math.floor(math.log2(value))
        octave -= value < 2.0**octave
        mantissa = value / 2.0**octave
        part = 0 if mantissa == 1 else 1 if mantissa < 2 - 2.0**-10 else 2 if mantissa < 2 - 2.0**-11 else 3
        octaves.setdefault(octave, [0, 0, 0, 0])[part] += 1
    return GradientRange(
        name,
        kind,
        name.rpartition("/")[0] or name,
        dtype,
        int((finite == 0).sum()),
        int(values.size - finite.size),
        float(nonzero.max(initial=0)),
        float(nonzero.min()) if nonzero.size else 0.0,
        {int(octave): tuple(parts) for octave, parts in octaves.items()},
    )
