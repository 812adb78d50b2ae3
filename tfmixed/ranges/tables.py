"""The magnitudes of a model's gradients as tables: of one measurement, and of two side by side."""

from __future__ import annotations

from rich import box
from rich.table import Column, Table
from rich.text import Text

from tfmixed._probe.rounding_model import held_in_half, largest_scale, losses, needed_scale, percent, power_of_two
from tfmixed.records import GradientRange, RangesRecord, short


def table(record: RangesRecord, precision: str) -> Table:
    """Returns a table of each gradient; see `GradientRanges.table`."""
    made = _table("magnitudes", "zeros", "to 0", "sub-\nnormal", "over-\nflow", "scales")
    half = held_in_half(record)
    for each in record.ranges:
        if not any(each is one for one in half):
            made.add_row(*_known(each), "", "", "", "noise" if each.noise else each.dtype)
            continue
        lost = losses(each.octaves, 1.0, precision)
        counts = (percent(lost.share(count)) for count in (lost.zero, lost.subnormal, lost.overflow))
        low, high = needed_scale(each, precision), largest_scale(each, precision)
        made.add_row(*_known(each), *counts, f"{short(low)} .. {short(high)}" if each.nonzeros else "any")
    return made


def beside(record: RangesRecord, other: RangesRecord) -> Table:
    """Returns a table of the same gradients in two precisions; see `GradientRanges.beside`."""
    theirs = {(each.name, each.kind): each for each in other.ranges}
    if set(theirs) != {(each.name, each.kind) for each in record.ranges}:
        raise ValueError(f"other must hold the gradients of the same model, received ranges of {other.model!r}")
    mine, its = record.precision, other.precision
    made = _table(mine, its, f"zeros,\n{mine}", f"zeros,\n{its}", f"inf, NaN,\n{its}")
    for each in record.ranges:
        half = theirs[each.name, each.kind]
        counts = (percent(share_of_zeros(each)), percent(share_of_zeros(half)), f"{half.nonfinite:,}")
        made.add_row(_label(each), span(each), span(half), *counts)
    return made


def share_of_zeros(range_: GradientRange) -> float:
    """Returns the share of a gradient's finite values that are exactly 0."""
    size = range_.nonzeros + range_.zeros
    return range_.zeros / size if size else 0.0


def span(range_: GradientRange) -> str:
    """Returns the smallest and the largest magnitude other than 0, as powers of two below: `2^-31 .. 2^-4`."""
    if not range_.nonzeros:
        return "all 0"
    return f"{power_of_two(range_.smallest)} .. {power_of_two(range_.largest)}"


def _table(*headings: str) -> Table:
    made = Table(Column("gradient", overflow="fold"), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def _known(range_: GradientRange) -> tuple[Text, str, str]:
    return _label(range_), span(range_), percent(share_of_zeros(range_))


def _label(range_: GradientRange) -> Text:
    return Text(range_.name if range_.kind == "weight" else f"{range_.name} (output)")
