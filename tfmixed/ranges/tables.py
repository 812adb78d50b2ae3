"""Tables of gradient magnitudes: of one measurement, and of two side by side."""

from __future__ import annotations

from rich import box
from rich.table import Column, Table
from rich.text import Text

from tfmixed._probe.rounding_model import (
    held_in_half,
    largest_scale,
    losses,
    needed_scale,
    percent,
    power_of_two,
    update_lost,
    weight_format,
)
from tfmixed.records import GradientRange, RangesRecord, short


def table(record: RangesRecord, precision: str) -> Table:
    """Returns a table with a row per gradient. See `GradientRanges.table`."""
    weights = weight_format(record.ranges)
    lost = [f"update\nlost,\n{weights}"] if any(gradient.updates for gradient in record.ranges) else []
    grid = _grid("magnitudes", "zeros", "to 0", "sub-\nnormal", "over-\nflow", "scales", *lost)
    half = {id(gradient) for gradient in held_in_half(record)}
    for gradient in record.ranges:
        update = [update_lost(gradient, weights)][: len(lost)]
        known = _label(gradient), span(gradient), percent(share_of_zeros(gradient))
        if id(gradient) not in half:
            grid.add_row(*known, "", "", "", "noise" if gradient.noise else gradient.dtype, *update)
            continue
        shares = losses(gradient.octaves, 1.0, precision).percentages()
        low, high = needed_scale(gradient, precision), largest_scale(gradient, precision)
        grid.add_row(*known, *shares, f"{short(low)} .. {short(high)}" if gradient.nonzeros else "any", *update)
    return grid


def beside(record: RangesRecord, other: RangesRecord) -> Table:
    """Returns a table of the same gradients in two precisions. See `GradientRanges.beside`."""
    theirs = {(gradient.name, gradient.kind): gradient for gradient in other.ranges}
    if theirs.keys() != {(gradient.name, gradient.kind) for gradient in record.ranges}:
        raise ValueError(f"other must hold the gradients of the same model. Received: ranges of {other.model!r}")
    first, second = record.precision, other.precision
    grid = _grid(first, second, f"zeros,\n{first}", f"zeros,\n{second}", f"inf, NaN,\n{second}")
    for gradient in record.ranges:
        half = theirs[gradient.name, gradient.kind]
        zeros = percent(share_of_zeros(gradient)), percent(share_of_zeros(half))
        grid.add_row(_label(gradient), span(gradient), span(half), *zeros, f"{half.nonfinite:,}")
    return grid


def share_of_zeros(gradient: GradientRange) -> float:
    """Returns the share of a gradient's finite values that are exactly 0."""
    size = gradient.nonzeros + gradient.zeros
    return gradient.zeros / size if size else 0.0


def span(gradient: GradientRange) -> str:
    """Returns the smallest and the largest magnitude other than 0, as powers of two below: `2^-31 .. 2^-4`."""
    if not gradient.nonzeros:
        return "all 0"
    return f"{power_of_two(gradient.smallest)} .. {power_of_two(gradient.largest)}"


def _grid(*headings: str) -> Table:
    grid = Table(Column("gradient", overflow="fold"), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _label(gradient: GradientRange) -> Text:
    return Text(gradient.name if gradient.kind == "weight" else f"{gradient.name} (output)")
