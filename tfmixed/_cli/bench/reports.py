"""What was measured: a row for each network and variant, and a table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from tfmixed._utils import rich_text

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Row:
    """One network in one variant.

    Args:
        network: Its name.
        variant: A key of `VARIANTS`.
        batch: Samples a step.
        ms: Milliseconds a step of an epoch of `fit`, one a round.
        first_step: Seconds of the first epoch, of one step: tracing and compiling.
        steps: How many steps were taken in all, the same for all variants.
        loss: Mean loss over the last round.
        peak: Bytes of memory at the peak of training, above what the process had before the model was made; None where
            nobody measured. Each in a process of its own.
        batch_in_memory: The batch whose peak is `Report.memory`, from the line through two batches. Not trained.
    """

    network: str
    variant: str
    batch: int
    ms: tuple[float, ...]
    first_step: float
    steps: int
    loss: float
    peak: int | None = None
    batch_in_memory: int | None = None

    @property
    def median(self) -> float:
        """Milliseconds a step."""
        return statistics.median(self.ms)


@dataclass(frozen=True)
class Report:
    """What `run` measured. Prints as a table.

    Args:
        policy: The half-precision policy of all variants but float32.
        device: Name of the device that decides.
        versions: Of what ran, by name.
        memory: Bytes that `Row.batch_in_memory` may take.
        rows: For each network all variants.
        warnings: What makes the figures mean less than they seem to.
    """

    policy: str
    device: str
    versions: dict[str, str]
    memory: int
    rows: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()

    def ratio(self, row: Row, variant: str) -> float:
        """Returns how many times faster `row` is than `variant` on the same network."""
        (other,) = (each for each in self.rows if (each.network, each.variant) == (row.network, variant))
        return other.median / row.median

    def as_dict(self) -> dict[str, Any]:
        """Returns it in JSON's types, ratios included."""
        rows = [
            {
                **asdict(row),
                "ms_per_step": row.median,
                "speedup_over_float32": self.ratio(row, "float32"),
                "ratio_to_keras": self.ratio(row, "keras"),
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}

    def times(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Returns the milliseconds of each network and variant, as `plotting.plot_times` takes them."""
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for row in self.rows:
            found.setdefault(row.network, {})[row.variant] = row.ms
        return found

    def __rich__(self) -> Group:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        tables = [self._table(network) for network in self.times()]
        return Group(f"{self.policy} on {self.device}; {versions}", *tables, *(f"! {each}" for each in self.warnings))

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
        headings = ["ms / step", "spread", "x f32", "x Keras", "1st step, s", "loss"]
        if self.memory:
            headings += ["peak MiB", f"batch in {self.memory / GIB:g} GiB"]
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
        yield f"{row.first_step:.1f}"
        yield f"{row.loss:.4f}"
        yield "-" if row.peak is None else f"{row.peak / MIB:,.0f}"
        yield "-" if row.batch_in_memory is None else f"{row.batch_in_memory:,}"

    def __str__(self) -> str:
        return rich_text.text(self, 120)
