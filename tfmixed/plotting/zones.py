"""The four zones of float16, and the shares of a histogram that fall into them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from matplotlib.axes import Axes

from tfmixed._probe.rounding_model import Octaves, limits, losses
from tfmixed.plotting.style import Style
from tfmixed.records import GradientRange

KINDS = {"activation": "activation gradients", "weight": "weight gradients"}
ZONES = ("zero", "subnormal", "normal", "overflow")
NAMES = {"zero": "becomes 0", "subnormal": "subnormal", "normal": "normal", "overflow": "overflow"}
SHORT = {"zero": "0", "subnormal": "sub", "normal": "normal", "overflow": "inf"}
# log2 of the largest magnitude that becomes 0, the smallest that is normal, and the smallest that becomes infinite.
LIMITS = tuple(map(math.log2, limits()))


def pooled(gradients: Iterable[GradientRange]) -> dict[int, tuple[int, int, int, int]]:
    """Returns the sums of the octaves of all gradients, in ascending order."""
    first, second, third, fourth = parts = [Counter[int]() for _ in range(4)]
    for gradient in gradients:
        for octave, counts in gradient.octaves.items():
            for part, count in zip(parts, counts, strict=True):
                part[octave] += count
    return {octave: (first[octave], second[octave], third[octave], fourth[octave]) for octave in sorted(first)}


def shares(octaves: Octaves, scale: float) -> dict[str, float]:
    """Returns the share of the values of a histogram in each zone of float16 after multiplication by `scale`."""
    lost = losses(octaves, scale)
    counts = lost.zero, lost.subnormal, lost.nonzeros - lost.zero - lost.subnormal - lost.overflow, lost.overflow
    return dict(zip(ZONES, map(lost.share, counts), strict=True))


def quantile(octaves: Octaves, share: float) -> float | None:
    """Returns log2 of the magnitude below which this share of the values lies. None without values."""
    left = share * sum(map(sum, octaves.values()))
    for octave in sorted(octaves):
        count = sum(octaves[octave])
        if count and left <= count:
            return octave + left / count
        left -= count
    return None


def shade(axes: Axes, style: Style, names: Mapping[str, str] = NAMES) -> None:
    """Draws the zones of float16 behind a plot whose x axis is log2 of magnitudes, with their names above it."""
    low, high = axes.get_xlim()
    for zone, edges in zip(ZONES, pairwise([low, *LIMITS, high]), strict=True):
        left, right = max(edges[0], low), min(edges[1], high)
        if left < right:
            axes.axvspan(left, right, color=style.zones[zone], zorder=0, linewidth=0)
            middle, transform = (left + right) / 2, axes.get_xaxis_transform()
            axes.text(middle, 1.01, names[zone], transform=transform, ha="center", va="bottom", fontsize=8)
    axes.set_xlim(low, high)
