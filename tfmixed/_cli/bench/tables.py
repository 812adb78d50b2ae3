"""Benchmark results: a row for each network and variant, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from tfmixed._utils import rich_text
from tfmixed.memory.memory_estimate import MIB


@dataclass(frozen=True)
class Row:
    """Result of one network in one variant.

    Args:
        network: The name of the network.
        variant: A key of `VARIANTS`.
        batch: The batch size.
        ms: The milliseconds of a step of `fit`, for each round.
        first_step: The seconds of the first step, with tracing and compilation.
        steps: The number of steps in all, which is the same for all variants.
        loss: The mean loss of the last round.
        peak: The peak memory of training in bytes, above that of the process before the model was made. Measured in a
            separate process. Defaults to None, not measured.
    """

    network: str
    variant: str
    batch: int
    ms: tuple[float, ...]
    first_step: float
    steps: int
    loss: float
    peak: int | None = None

    @property
    def median(self) -> float:
        """Median milliseconds of a step."""
        return statistics.median(self.ms)


@dataclass(frozen=True)
class Report:
    """Result of `run`. Prints as a table for each network.

    Args:
        policy: The half-precision policy of all variants but float32.
        device: The name of the device.
        versions: The versions of the packages, by name.
        rows: The rows of all variants, for each network. Defaults to an empty tuple.
        warnings: Warnings about the result. Defaults to an empty tuple.
    """

    policy: str
    device: str
    versions: dict[str, str]
    rows: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()

    def ratio(self, row: Row, variant: str) -> float:
        """Returns the speedup of `row` over `variant` on the same network."""
        (base,) = (base for base in self.rows if (base.network, base.variant) == (row.network, variant))
        return base.median / row.median

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as plain values, with the speedups."""
        rows = [
            {
                **asdict(row),
                "ms_per_step": row.median,
                "speedup_over_float32": self.ratio(row, "float32"),
                "ratio_to_keras": self.ratio(row, "keras"),
                "ratio_to_unscaled": self.ratio(row, "unscaled"),
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}

    def times(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Returns the milliseconds by network and variant, for `plotting.plot_times`."""
        times: dict[str, dict[str, tuple[float, ...]]] = {}
        for row in self.rows:
            times.setdefault(row.network, {})[row.variant] = row.ms
        return times

    def __rich__(self) -> Group:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        tables = [self._table(network) for network in self.times()]
        return Group(
            f"{self.policy} on {self.device}; {versions}", *tables, *(f"! {warning}" for warning in self.warnings)
        )

    def _table(self, network: str) -> Table:
        rows = [row for row in self.rows if row.network == network]
        table = Table(
            title=f"{network}, batch {rows[0].batch}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
            show_edge=False,
        )
        table.add_column("", no_wrap=True)
        headings = ["ms / step", "spread", "x f32", "x Keras", "x unscaled", "1st step, s", "loss"]
        if any(row.peak is not None for row in rows):
            headings.append("peak MiB")
        for heading in headings:
            table.add_column(heading, justify="right", min_width=7)
        for row in rows:
            table.add_row(row.variant, *list(self._numbers(row))[: len(headings)])
        return table

    def _numbers(self, row: Row) -> Iterator[str]:
        yield f"{row.median:.1f}"
        yield f"{min(row.ms):.0f}-{max(row.ms):.0f}" if row.median >= 10 else f"{min(row.ms):.1f}-{max(row.ms):.1f}"
        yield f"{self.ratio(row, 'float32'):.2f}"
        yield f"{self.ratio(row, 'keras'):.2f}"
        yield f"{self.ratio(row, 'unscaled'):.2f}"
        yield f"{row.first_step:.1f}"
        yield f"{row.loss:.4f}"
        yield "-" if row.peak is None else f"{row.peak / MIB:,.0f}"

    def __str__(self) -> str:
        return rich_text.text(self, 120)
