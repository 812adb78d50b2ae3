"""What gradients that were measured say, in numbers."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tfmixed import records
from tfmixed._probe.rounding_model import (
    POWERS,
    TOLERANCE,
    Losses,
    format_of,
    held_in_half,
    losses,
    percent,
    power_below,
)
from tfmixed._utils import atomic_write, rich_text
from tfmixed.ranges import advice, tables
from tfmixed.records import GradientRange, RangesRecord, short
from tfmixed.scaling import validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Suggestion(float):
    """A loss scale, and what it saves.

    Args:
        before: What is lost at scale 1.
        after: What is lost at this scale.
        precision: The half-precision format.
    """

    before: Losses
    after: Losses
    precision: str

    def __new__(cls, scale: float, before: Losses, after: Losses, precision: str) -> Suggestion:
        made = super().__new__(cls, scale)
        made.before, made.after, made.precision = before, after, precision
        return made

    def __getnewargs__(self) -> Any:
        return float(self), self.before, self.after, self.precision

    @property
    def explanation(self) -> str:
        """What it saves and what it cannot, as a sentence."""
        sentence = (
            f"At {short(self)}, {self.precision} flushes {self._share('zero')} of all values other than 0 to 0, and "
            f"holds {self._share('subnormal')} with less than its full precision."
        )
        return f"{sentence} Overflow: {self._share('overflow')}." if self.before.overflow else sentence

    def _share(self, count: str) -> str:
        before, after = (percent(each.share(getattr(each, count))) for each in (self.before, self.after))
        return f"{after} ({before} at scale 1)"


@dataclass(frozen=True)
class GradientRanges:
    """The magnitudes of a model's gradients, and what they say. Prints as a table; iterates over its `GradientRange`s.

    Only gradients that the model holds in half precision count for its advice, or all of them in a model that has
    none yet. Those that are rounding noise do not. `tfmixed.measure_gradients` makes one.

    Args:
        record: What was measured.

    Example:
    >>> octaves = {-30: (9, 0, 0, 0), -29: (1, 0, 0, 0)}
    >>> tiny = GradientRange("dense/kernel", "weight", "dense", "float16", 0, 0, 2.0**-29, 2.0**-30, octaves)
    >>> ranges = GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "model", [tiny]))
    >>> ranges.underflow(1.0)
    1.0
    >>> ranges.verdict()
    'any scale from 2^6 to 2^44 works.'
    """

    record: RangesRecord

    def __iter__(self) -> Iterator[GradientRange]:
        return iter(self.record.ranges)

    def __len__(self) -> int:
        return len(self.record.ranges)

    @property
    def half(self) -> list[GradientRange]:
        """Those that count: held in half precision when the model trains, all of them where none is; no noise."""
        return held_in_half(self.record)

    def losses(self, scale: float = 1.0, precision: str = "float16", layer: str | None = None) -> Losses:
        """Returns what half precision loses at a scale: counts over all gradients held in it, or over those of a layer.

        Rounding noise does not count.

        Raises:
            ValueError: The scale is not above 0, there is no such format, or no such layer.
        """
        scale = validation.scale("scale", scale)
        chosen = self.half if layer is None else [each for each in self if each.layer == layer]
        if not chosen and layer is not None:
            raise ValueError(f"layer must be one of {sorted({each.layer for each in self})}, received {layer!r}")
        return sum((losses(each.octaves, scale, precision) for each in chosen if not each.noise), Losses())

    def underflow(self, scale: float = 1.0, precision: str = "float16") -> float:
        """Returns the share, 0 to 1, of all values other than 0 that are flushed to 0 at a scale."""
        lost = self.losses(scale, precision)
        return lost.share(lost.zero)

    def working_scales(self, precision: str = "float16", tolerance: float = TOLERANCE) -> tuple[float, float] | None:
        """Returns the smallest and the largest power of two that work; None where no single one does.

        A scale works where no value overflows, and of no gradient more than `tolerance`, a share, is flushed to 0.
        """
        tolerance = validation.number("tolerance", tolerance, least=0.0, most=1.0)
        low, high = advice.lowest(self.half, precision, tolerance), advice.highest(self.half, precision)
        return (low, high) if low <= high else None

    def best_scales(self, precision: str = "float16") -> tuple[float, float]:
        """Returns the smallest and the largest power of two at which nothing overflows and the least is lost.

        The least: fewest values flushed to 0, then fewest subnormal ones. That is so at the largest scale without an
        overflow; the smallest is the first at which the same is lost.
        """
        high = advice.highest(self.half, precision)
        powers = range(POWERS[0], round(math.log2(high)) + 1)
        least = self._lost(high, precision)
        found = bisect.bisect_left(powers, True, key=lambda power: self._lost(2.0**power, precision) <= least)
        return 2.0 ** powers[found], high

    def suggest_constant_scale(self, headroom: float = 2.0, precision: str = "float16") -> Suggestion:
        """Returns the largest power of two with which the largest gradient stays below the format's maximum.

        Args:
            headroom: How many times larger than the largest that was measured a gradient may become later on.
            precision: `"float16"` or `"bfloat16"`.

        Returns:
            A float that also tells what it saves: `before` and `after` (`Losses`), and an `explanation`.

        Raises:
            ValueError: `headroom` is below 1, all gradients are 0, or some are not finite.
        """
        headroom = validation.number("headroom", headroom, least=1.0)
        bad = [each.name for each in self.half if each.nonfinite]
        if bad:
            raise ValueError(f"gradients must be finite to choose a scale from them, received inf or NaN in {bad}")
        largest = max((each.largest for each in self.half), default=0.0)
        if not largest:
            raise ValueError("gradients must not all be 0 to choose a scale from them: measure on other batches")
        scale = power_below(format_of(precision).max / (headroom * largest))
        return Suggestion(scale, self.losses(1.0, precision), self.losses(scale, precision), precision)

    def verdict(self, precision: str = "float16", tolerance: float = TOLERANCE) -> str:
        """Returns which scale to choose, as a sentence; `tolerance` is that of `working_scales`."""
        tolerance = validation.number("tolerance", tolerance, least=0.0, most=1.0)
        return advice.verdict(self.record, precision, tolerance)

    def _lost(self, scale: float, precision: str) -> tuple[int, int]:
        lost = self.losses(scale, precision)
        return lost.zero, lost.subnormal

    def plot(self, scale: float | None = None) -> Figure:
        """Draws the histogram of all magnitudes, before and after scaling, over the zones of float16.

        Args:
            scale: The loss scale; None for the suggested one.

        Returns:
            A matplotlib figure.
        """
        from tfmixed import plotting

        return plotting.plot_ranges(self.record, self.suggest_constant_scale() if scale is None else scale)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one line of JSON, as in the log of a run. The file appears whole or not at all."""
        atomic_write.write_text(path, records.to_line(self.record) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradientRanges:
        """Returns what `save` wrote; of the log of a run, the last ranges in it.

        Raises:
            ValueError: It holds none.
        """
        found = [each for each in records.read_log(Path(path)) if isinstance(each, RangesRecord)]
        if not found:
            raise ValueError(f"path must be a file of GradientRanges.save or a log with ranges, received {str(path)!r}")
        return cls(found[-1])

    def __rich__(self) -> Group:
        return self.explained()

    def explained(self, headroom: float = 2.0) -> Group:
        """Returns the table and what follows from it, for rich to print.

        Args:
            headroom: As in `suggest_constant_scale`.
        """
        record = self.record
        told = [f"{len(self)} gradients of {record.model}, {record.batches} batches in {record.precision}"]
        if noise := [f"`{each.name}`" for each in self if each.noise]:
            told.append(f"Rounding noise, which decides nothing: {', '.join(noise)}")
        told.append(f"float16: {self.verdict()}")
        if (scale := self.suggested(headroom)) is not None:
            told.append(scale.explanation)
        told.append(f"bfloat16: {self.verdict('bfloat16')}")
        return Group(self.table(), *map(Text, told))

    def suggested(self, headroom: float = 2.0) -> Suggestion | None:
        """Returns what `suggest_constant_scale` does; None where gradients are not finite, or all 0."""
        known = not any(each.nonfinite for each in self.half) and any(each.nonzeros for each in self.half)
        return self.suggest_constant_scale(headroom) if known else None

    def as_dict(self, headroom: float = 2.0) -> dict[str, Any]:
        """Returns the answers, and the counts that they come from, for JSON.

        Args:
            headroom: As in `suggest_constant_scale`.
        """
        scale = self.suggested(headroom)
        return {
            "verdict": self.verdict(),
            "verdict_bfloat16": self.verdict("bfloat16"),
            "working_scales": self.working_scales() if scale is not None else None,
            "suggested_scale": scale,
            "losses_at_1": asdict(self.losses()),
            "losses_at_suggested": None if scale is None else asdict(scale.after),
            "measured": json.loads(records.to_line(self.record)),
        }

    def __str__(self) -> str:
        return rich_text.text(self)

    def table(self, precision: str = "float16") -> Table:
        """Returns a table of each gradient: its magnitudes, what is lost at scale 1, and which scales suit it alone.

        "to 0", "subnormal" and "overflow" are shares of the values other than 0. Those that the model holds in float32
        say so instead, and those that are rounding noise.
        """
        return tables.table(self.record, precision)

    def beside(self, other: GradientRanges) -> Table:
        """Returns a table of these gradients and the same ones measured in another precision: what really was lost.

        Raises:
            ValueError: The other one is of another model.
        """
        return tables.beside(self.record, other.record)
