"""Measured gradient ranges, and the loss scales that follow from them."""

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
    UpdateLoss,
    format_of,
    held_in_half,
    losses,
    percent,
    power_below,
    update_loss,
    weight_format,
)
from tfmixed._utils import atomic_write, rich_text
from tfmixed.ranges import advice, tables
from tfmixed.records import GradientRange, RangesRecord, short
from tfmixed.scaling import validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Suggestion(float):
    """A loss scale with its effect.

    Args:
        before: Losses to half precision at scale 1.
        after: Losses to half precision at this scale.
        precision: The half-precision format.
    """

    before: Losses
    after: Losses
    precision: str

    def __new__(cls, scale: float, before: Losses, after: Losses, precision: str) -> Suggestion:
        suggestion = super().__new__(cls, scale)
        suggestion.before, suggestion.after, suggestion.precision = before, after, precision
        return suggestion

    def __getnewargs__(self) -> Any:
        return float(self), self.before, self.after, self.precision

    @property
    def explanation(self) -> str:
        """The losses at this scale and at scale 1, as a sentence."""
        sentence = (
            f"At {short(self)}, {self.precision} flushes {self._share('zero')} of all nonzero values to 0, and holds "
            f"{self._share('subnormal')} with less than its full precision."
        )
        return f"{sentence} Overflow: {self._share('overflow')}." if self.before.overflow else sentence

    def _share(self, count: str) -> str:
        before, after = (percent(lost.share(getattr(lost, count))) for lost in (self.before, self.after))
        return f"{after} ({before} at scale 1)"


@dataclass(frozen=True)
class GradientRanges:
    """The magnitudes of a model's gradients. It prints as a table and iterates over its `GradientRange`s.

    Its advice depends on the gradients that the model holds in half precision, or on all gradients if there are none.
    Rounding noise is ignored. `tfmixed.measure_gradients` returns an instance.

    Args:
        record: The measured gradients.

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
        """The gradients held in half precision in training, or all gradients if there are none, without noise."""
        return held_in_half(self.record)

    def losses(self, scale: float = 1.0, precision: str = "float16", layer: str | None = None) -> Losses:
        """Returns the losses to half precision at a scale: counts over all gradients held in it, or in one layer.

        Args:
            scale: The loss scale. Defaults to 1.
            precision: `"float16"` or `"bfloat16"`. Defaults to `"float16"`.
            layer: Path of a layer, whose gradients count in any dtype. Defaults to None.

        Raises:
            ValueError: If the scale is not above 0, or if the format or the layer does not exist.
        """
        scale = validation.scale("scale", scale)
        chosen = self.half if layer is None else [gradient for gradient in self if gradient.layer == layer]
        if not chosen and layer is not None:
            known = sorted({gradient.layer for gradient in self})
            raise ValueError(f"layer must be one of {known}. Received: layer={layer!r}")
        return sum((losses(gradient.octaves, scale, precision) for gradient in chosen if not gradient.noise), Losses())

    def update_loss(self, precision: str | None = None, scale: float = 1.0, name: str | None = None) -> UpdateLoss:
        """Returns what rounding to nearest discards of the optimizer's updates: of all variables, or of one.

        An update is discarded if it is less than half of the distance from the weight to the next number. Stochastic
        rounding keeps it on average.

        Args:
            precision: The format that holds the weights: `"float16"` or `"bfloat16"`. Defaults to None, the one that
                holds them now, and bfloat16 for float32 weights: what would be lost if they were held in it.
            scale: A factor by which all updates are larger, as with another learning rate. Counts are exact if it is a
                power of two; others are rounded up to one. Defaults to 1.
            name: Path of a variable. Defaults to None, all of them.

        Raises:
            ValueError: If the format or the variable does not exist, or if the scale is not above 0.
        """
        scale, precision = validation.scale("scale", scale), precision or weight_format(self)
        names = [gradient.name for gradient in self if gradient.kind == "weight"]
        if name not in (None, *names):
            raise ValueError(f"`name` must be one of {names}. Received: name={name!r}")
        chosen = (gradient for gradient in self if gradient.updates and name in (None, gradient.name))
        return sum((update_loss(gradient, precision, scale) for gradient in chosen), UpdateLoss())

    def underflow(self, scale: float = 1.0, precision: str = "float16") -> float:
        """Returns the share of all nonzero values, 0 to 1, that are flushed to 0 at a scale."""
        lost = self.losses(scale, precision)
        return lost.share(lost.zero)

    def working_scales(self, precision: str = "float16", tolerance: float = TOLERANCE) -> tuple[float, float] | None:
        """Returns the smallest and the largest power of two that work. None if no single scale does.

        A scale works if no value overflows and at most a share of `tolerance` of each gradient is flushed to 0.
        """
        tolerance = validation.number("tolerance", tolerance, least=0.0, most=1.0)
        low, high = advice.lowest(self.half, precision, tolerance), advice.highest(self.half, precision)
        return (low, high) if low <= high else None

    def best_scales(self, precision: str = "float16") -> tuple[float, float]:
        """Returns the smallest and the largest power of two at which no value overflows and the losses are smallest.

        Losses are the number of values flushed to 0, then the number of subnormal values. They are smallest at the
        largest scale without an overflow.
        """
        high = advice.highest(self.half, precision)
        powers = range(POWERS[0], round(math.log2(high)) + 1)
        least = self._lost(high, precision)
        found = bisect.bisect_left(powers, True, key=lambda power: self._lost(2.0**power, precision) <= least)
        return 2.0 ** powers[found], high

    def suggest_constant_scale(self, headroom: float = 2.0, precision: str = "float16") -> Suggestion:
        """Returns the largest power of two with which the largest gradient stays below the format's maximum.

        Args:
            headroom: Factor by which gradients may grow above the largest measured one. Defaults to 2.
            precision: `"float16"` or `"bfloat16"`. Defaults to `"float16"`.

        Returns:
            A float with the attributes `before` and `after` (`Losses`) and `explanation`.

        Raises:
            ValueError: If `headroom` is below 1, if all gradients are 0, or if some are not finite.
        """
        headroom = validation.number("headroom", headroom, least=1.0)
        nonfinite = [gradient.name for gradient in self.half if gradient.nonfinite]
        if nonfinite:
            raise ValueError(f"Gradients must be finite to suggest a scale. Received: inf or NaN in {nonfinite}")
        largest = max((gradient.largest for gradient in self.half), default=0.0)
        if not largest:
            raise ValueError("Gradients must not all be 0 to suggest a scale. Measure on other batches.")
        scale = power_below(format_of(precision).max / (headroom * largest))
        return Suggestion(scale, self.losses(1.0, precision), self.losses(scale, precision), precision)

    def verdict(self, precision: str = "float16", tolerance: float = TOLERANCE) -> str:
        """Returns the scales to choose from as a sentence. `tolerance` is that of `working_scales`."""
        tolerance = validation.number("tolerance", tolerance, least=0.0, most=1.0)
        return advice.advice(self.record, precision, tolerance)

    def _lost(self, scale: float, precision: str) -> tuple[int, int]:
        lost = self.losses(scale, precision)
        return lost.zero, lost.subnormal

    def plot(self, scale: float | None = None) -> Figure:
        """Draws the histogram of all magnitudes, before and after scaling, over the zones of float16.

        Args:
            scale: The loss scale. Defaults to the suggested one.

        Returns:
            A matplotlib figure.
        """
        from tfmixed import plotting

        return plotting.plot_ranges(self.record, self.suggest_constant_scale() if scale is None else scale)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one line of JSON, as in the log of a run. The write is atomic."""
        atomic_write.write_text(path, records.to_line(self.record) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradientRanges:
        """Returns the ranges that `save` wrote, or the last ranges in the log of a run.

        Raises:
            ValueError: If the file holds no ranges.
        """
        found = [record for record in records.read_log(Path(path)) if isinstance(record, RangesRecord)]
        if not found:
            raise ValueError(
                f"path must be a file of GradientRanges.save or a log with ranges. Received: {str(path)!r}"
            )
        return cls(found[-1])

    def __rich__(self) -> Group:
        return self.explained()

    def explained(self, headroom: float = 2.0) -> Group:
        """Returns the table and the advice for rich to print.

        Args:
            headroom: As in `suggest_constant_scale`.
        """
        record = self.record
        gradients = "1 gradient" if len(self) == 1 else f"{len(self)} gradients"
        batches = "1 batch" if record.batches == 1 else f"{record.batches} batches"
        lines = [f"{gradients} of {record.model}, {batches} in {record.precision}"]
        if noise := [f"`{gradient.name}`" for gradient in self if gradient.noise]:
            lines.append(f"Rounding noise, which is ignored: {', '.join(noise)}")
        lines.append(f"float16: {self.verdict()}")
        if (scale := self.suggested(headroom)) is not None:
            lines.append(scale.explanation)
        lines.append(f"bfloat16: {self.verdict('bfloat16')}")
        return Group(self.table(), *map(Text, lines))

    def suggested(self, headroom: float = 2.0) -> Suggestion | None:
        """Returns the result of `suggest_constant_scale`. None if gradients are not finite, or all 0."""
        is_finite = not any(gradient.nonfinite for gradient in self.half)
        has_values = any(gradient.nonzeros for gradient in self.half)
        return self.suggest_constant_scale(headroom) if is_finite and has_values else None

    def as_dict(self, headroom: float = 2.0) -> dict[str, Any]:
        """Returns all results, and the counts on which they are based, for JSON.

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
            "update_lost": asdict(self.update_loss()),
            "measured": json.loads(records.to_line(self.record)),
        }

    def __str__(self) -> str:
        return rich_text.text(self)

    def table(self, precision: str = "float16") -> Table:
        """Returns a table with a row per gradient: magnitudes, losses at scale 1, and the scales that work for it.

        "to 0", "subnormal" and "overflow" are shares of the nonzero values. They are empty for rounding noise and for
        gradients that the model holds in float32. "update lost" is the share of a variable's update that rounding the
        weights discards, see `update_loss`.
        """
        return tables.table(self.record, precision)

    def beside(self, other: GradientRanges) -> Table:
        """Returns a table of these gradients and the same gradients measured in another precision.

        Raises:
            ValueError: If the gradients are of another model.
        """
        return tables.beside(self.record, other.record)
