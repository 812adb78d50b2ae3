"""Errors of half-precision gradients, and the rows in which rounding does not explain them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from tfmixed._probe.rounding_model import TOLERANCE, percent, update_lost, weight_format
from tfmixed._utils import rich_text
from tfmixed.formats import FORMATS, HALF
from tfmixed.records import FidelityRecord, GradientError, short

_FACTOR = 1.2  # between errors of the same cause, for many elements
_SPREAD = 7.0  # of that factor for a single element
_LEAST = 0.002  # the largest error that is never wrong
_NOISE = 0.5  # error from rounding alone, from which on the float32 gradient is not a reference


@dataclass(frozen=True)
class GradientFidelity:
    """The error of each gradient in half precision. It prints as a table and iterates over `GradientError`s.

    An error is wrong if it exceeds that from rounding alone, plus one rounding of the result, by more than chance: by
    1.2 + 7 / sqrt(size) times. An error below 0.2 % is never wrong. A gradient is also wrong if more than
    1 % of its values are flushed to 0, or if values are not finite. It is noise if rounding alone changes it by half or
    more. `tfmixed.gradient_fidelity` returns an instance. The gradients with the largest errors, in units of the limit,
    come first.

    Args:
        record: The measured errors.

    Example:
    >>> bias = GradientError("dense/bias", "dense", "bfloat16", 8, 4096, 0.94, 0.002, 0.99, 0.0, 0)
    >>> fidelity = GradientFidelity(FidelityRecord(None, None, 1.0, 1, "model", False, [bias]))
    >>> fidelity.explain(bias)
    'wrong: the sum over 4,096 terms stands in bfloat16'
    """

    record: FidelityRecord

    def __iter__(self) -> Iterator[GradientError]:
        return iter(sorted(self.record.gradients, key=_excess, reverse=True))

    def __len__(self) -> int:
        return len(self.record.gradients)

    @property
    def wrong(self) -> list[GradientError]:
        """The gradients that are wrong, the worst first."""
        return [gradient for gradient in self if _excess(gradient) > 1]

    def explain(self, gradient: GradientError) -> str:
        """Returns `"expected"`, `"noise"` or `"wrong"`, and a reason."""
        scale = short(self.record.scale)
        if gradient.unknown:
            return f"wrong: {gradient.unknown:,} values are not finite in float32 either"
        if gradient.nonfinite:
            return f"wrong: {gradient.nonfinite:,} values overflow at loss scale {scale}; use a smaller one"
        if gradient.rounding >= _NOISE:
            return "noise: rounding alone changes it as much, as where the true gradient is 0"
        if _is_flushed(gradient):
            return f"wrong: {percent(gradient.flushed)} flushed to 0 at loss scale {scale}; use a larger one"
        if _excess(gradient) > 1 and _sums(gradient):
            return f"wrong: the sum over {gradient.terms:,} terms stands in {gradient.dtype}"
        if _excess(gradient) > 1:
            return "wrong: rounding explains less"
        return "expected"

    def table(self, top: int | None = None) -> Table:
        """Returns a table with a row per gradient, the worst first.

        Args:
            top: The largest number of rows. Defaults to None, all.
        """
        names = [Column(heading, overflow="fold") for heading in self.headings[:2]]
        numbers = [Column(heading, justify="right", no_wrap=True) for heading in self.headings[2:]]
        grid = Table(*names, *numbers, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for row in self.rows()[:top]:
            grid.add_row(*map(Text, row))
        return grid

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings of the table. "update lost" is the share of an update that rounding the weights discards."""
        lost = f"update lost, {weight_format(self)}"
        return ("gradient", "explanation", "error", "rounding", "cosine", "to 0", *[lost][: self._knows_updates])

    @property
    def _knows_updates(self) -> bool:
        return any(gradient.updates for gradient in self)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the cells of the table, under `headings`."""
        weights = weight_format(self)
        return [
            (
                gradient.name,
                self.explain(gradient),
                _share(gradient.error),
                _share(gradient.rounding),
                f"{gradient.cosine:.4f}",
                percent(gradient.flushed),
                *[update_lost(gradient, weights)][: self._knows_updates],
            )
            for gradient in self
        ]

    def summary(self) -> str:
        """Returns the counts as a sentence."""
        record = self.record
        batches = "1 batch" if record.batches == 1 else f"{record.batches} batches"
        counts = f"{len(self.wrong)} of {len(self)} gradients are wrong" if self.wrong else "No gradient is wrong"
        return f"{counts}: {record.model}, {batches}, loss scale {short(record.scale)}."

    def advice(self) -> str:
        """Returns the remedy for wrong sums as a sentence, or an empty text if there are none."""
        if not any(_sums(gradient) for gradient in self.wrong):
            return ""
        if self.record.float32_sums:
            return "Give the layers of wrong sums the dtype float32."
        return "Create the model under tfmixed.set_policy, or call tfmixed.force_float32(model), for float32 sums."

    def explained(self, top: int | None = None) -> Group:
        """Returns the table, the summary and the advice for rich to print. `top` is that of `table`."""
        lines = [self.summary(), self.advice()]
        if top is not None and top < len(self):
            lines.insert(0, f"and {len(self) - top} more with smaller errors")
        return Group(self.table(top), *(Text(line) for line in lines if line))

    def __rich__(self) -> Group:
        return self.explained()

    def __str__(self) -> str:
        return rich_text.text(self)

    def _repr_html_(self) -> str:
        console = Console(record=True, width=120, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="white-space: pre">{code}</pre>')

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, with an explanation for each gradient."""
        gradients = [{**asdict(gradient), "explanation": self.explain(gradient)} for gradient in self]
        return {**asdict(self.record), "wrong": len(self.wrong), "advice": self.advice(), "gradients": gradients}

    def to_json(self) -> str:
        """Returns `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)


def _excess(gradient: GradientError) -> float:
    """Returns an error in units of the largest one that rounding explains: above 1 it is wrong."""
    if gradient.nonfinite or gradient.unknown:
        return float("inf")
    if gradient.rounding >= _NOISE:
        return 0.0
    last = max(FORMATS[gradient.dtype].epsilon / 2 if gradient.dtype in FORMATS else 0.0, _LEAST)
    factor = _FACTOR + _SPREAD / max(gradient.size, 1) ** 0.5
    flushed = gradient.flushed / TOLERANCE if _is_flushed(gradient) else 0.0
    return float(max(gradient.error / (factor * gradient.rounding + last), flushed))


def _is_flushed(gradient: GradientError) -> bool:
    # bfloat16 has the exponents of float32: there a zero has another cause.
    return gradient.dtype == "float16" and gradient.flushed > TOLERANCE


def _sums(gradient: GradientError) -> bool:
    """Returns whether a sum in half precision over so many terms may stop growing, and no other cause is known."""
    if gradient.nonfinite or gradient.unknown or _is_flushed(gradient) or gradient.dtype not in HALF:
        return False
    return gradient.terms * FORMATS[gradient.dtype].epsilon >= 0.5


def _share(error: float) -> str:
    return f"{error:.1%}".replace("%", " %") if error < 10 else f"{error:.1e}"
