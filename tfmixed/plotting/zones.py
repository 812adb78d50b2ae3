"""Where float16 loses what: its four zones, and how many values of a histogram fall into each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from tfmixed._probe.rounding_model import Octaves, limits, losses
from tfmixed.plotting.style import Style
from tfmixed.records import GradientRange

KINDS = {"activation": "activation gradients", "weight": "weight gradients"}
ZONES = ("zero", "subnormal", "normal", "overflow")
NAMES = {"zero": "becomes 0", "subnormal": "subnormal", "normal": "normal", "overflow": "overflow"}
SHORT = {"zero": "0", "subnormal": "sub", "normal": "normal", "overflow": "inf"}
# log2 of the largest that becomes 0, of the smallest that keeps its precision, and of the smallest that becomes inf.
LIMITS = tuple(map(math.log2, limits()))


def pooled(ranges: Iterable[GradientRange]) -> dict[int, tuple[int, int, int, int]]:
    """Returns the octaves of all of them together."""
    found: defaultdict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for each in ranges:
        for octave, counts in each.octaves.items():
            found[octave].append(counts)
    sums = {octave: [*map(sum, zip(*found[octave], strict=True))] for octave in sorted(found)}
    return {octave: (each[0], each[1], each[2], each[3]) for octave, each in sums.items()}


def shares(octaves: Octaves, scale: float) -> dict[str, float]:
    """Returns which share of a histogram's values falls into each zone of float16, once multiplied by `scale`."""
    lost = losses(octaves, scale)
    counts = lost.zero, lost.subnormal, lost.nonzeros - lost.zero - lost.subnormal - lost.overflow, lost.overflow
    return dict(zip(ZONES, map(lost.share, counts), strict=True))


def quantile(octaves: Octaves, share: float) -> float | None:
    """Returns log2 of the magnitude that this share of the values stays below; None where there are none."""
    left = share * sum(map(sum, octaves.values()))
    for octave in sorted(octaves):
        count = sum(octaves[octave])
        if count and left <= count:
            return octave + left / count
        left -= count
    return None


def shade(axes: Axes, style: Style, names: Mapping[str, str] = NAMES) -> None:
    """Paints the zones of float16 behind a picture whose x axis is log2 of magnitudes, and names them above it."""
    low, high = axes.get_xlim()
    edges = [low, *LIMITS, high]
    for zone, (left, right) in zip(ZONES, pairwise(edges), strict=True):
        left, right = max(left, low), min(right, high)
        if left < right:
            axes.axvspan(left, right, color=style.zones[zone], zorder=0, linewidth=0)
            axes.text((left + right) / 2, 1.01, names[zone], transform=axes.get_xaxis_transform(), **_LABEL)
    axes.set_xlim(low, high)


_LABEL: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}
