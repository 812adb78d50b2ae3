"""Where float16 loses what: its four zones, and how many values of a histogram fall into each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from tfmixed.formats import FORMATS, HALF
from tfmixed.plotting.themes import Style
from tfmixed.records import GradientRange, RangesRecord

ZONES = ("zero", "subnormal", "normal", "overflow")
NAMES = {"zero": "becomes 0", "subnormal": "subnormal", "normal": "normal", "overflow": "overflow"}
SHORT = {"zero": "0", "subnormal": "sub", "normal": "normal", "overflow": "inf"}
FLOAT16 = FORMATS["float16"]
_LEAST = FLOAT16.smallest_subnormal / 2  # itself rounded to 0
# log2 of the largest that becomes 0, of the smallest that keeps its precision, and of the smallest that becomes inf.
LIMITS = tuple(map(math.log2, (_LEAST, FLOAT16.smallest_normal - _LEAST, FLOAT16.max + 2.0**15 * FLOAT16.epsilon / 2)))
Octaves = Mapping[int, tuple[int, int, int, int]]


def half(record: RangesRecord) -> list[GradientRange]:
    """Returns the gradients that are held in half precision when the model trains; all of them where none is."""
    return [each for each in record.ranges if each.dtype in HALF] or list(record.ranges)


def pooled(ranges: Iterable[GradientRange]) -> dict[int, tuple[int, int, int, int]]:
    """Returns the octaves of all of them together."""
    parts: Counter[tuple[int, int]] = Counter()
    for each in ranges:
        for octave, counts in each.octaves.items():
            parts.update({(octave, part): count for part, count in enumerate(counts)})
    octaves = sorted({octave for octave, _ in parts})
    return {each: (parts[each, 0], parts[each, 1], parts[each, 2], parts[each, 3]) for each in octaves}


def shares(octaves: Octaves, scale: float) -> dict[str, float]:
    """Returns which share of a histogram's values falls into each zone of float16, once multiplied by `scale`."""
    count = sum(map(sum, octaves.values()))
    reached = [0.0, *(_below(octaves, index, scale) for index in range(3)), float(count)]
    return {zone: (high - low) / max(count, 1) for zone, (low, high) in zip(ZONES, pairwise(reached), strict=True)}


def _below(octaves: Octaves, index: int, scale: float) -> float:
    """Returns how many values lie below one of the limits, that of 0 included: exactly, where the scale is 2^n."""
    mantissa, exponent = math.frexp(scale)
    if mantissa == 0.5:
        octave = math.floor(LIMITS[index]) - (exponent - 1)
        whole = sum(sum(each) for at, each in octaves.items() if at < octave)
        return whole + sum(octaves.get(octave, ())[: index + 1])  # `GradientRange.octaves`: its parts end at the limits
    limit = LIMITS[index] - math.log2(scale)
    return sum(sum(each) * min(max(limit - at, 0.0), 1.0) for at, each in octaves.items())


def quantile(octaves: Octaves, share: float) -> float | None:
    """Returns log2 of the magnitude that this share of the values stays below; None where there are none."""
    left = share * sum(map(sum, octaves.values()))
    for octave in sorted(octaves):
        count = sum(octaves[octave])
        if count and left <= count:
            return octave + left / count
        left -= count
    return None


def percent(share: float) -> str:
    """Returns a share as people read it: neither 0 nor 100 % stands for what only comes near."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return "< 0.1 %" if share < 0.0005 else "> 99.9 %" if share >= 0.9995 else f"{100 * share:.1f} %"


def shade(axes: Axes, style: Style, scale: float = 1.0, names: Mapping[str, str] = NAMES) -> None:
    """Paints the zones of float16 behind a picture whose x axis is log2 of magnitudes, and names them above it."""
    low, high = axes.get_xlim()
    edges = [low, *(limit - math.log2(scale) for limit in LIMITS), high]
    for zone, (left, right) in zip(ZONES, pairwise(edges), strict=True):
        left, right = max(left, low), min(right, high)
        if left < right:
            axes.axvspan(left, right, color=style.zones[zone], zorder=0, linewidth=0)
            axes.text((left + right) / 2, 1.01, names[zone], transform=axes.get_xaxis_transform(), **_LABEL)
    axes.set_xlim(low, high)


_LABEL: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}
