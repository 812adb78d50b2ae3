"""Estimates of the memory of training: by purpose, by option, and the largest batch for a budget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from tfmixed._utils import rich_text
from tfmixed.memory.sizes import Sizes

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Option:
    """A way to train, and its peak memory as a function of the batch size.

    The function is linear between measured peaks, and beyond them.

    Args:
        name: The policy, optimizer or change of the batch.
        points: Measured batch sizes and peaks in bytes, at least two, by batch size.
        sizes: The variables.
        change: Counted bytes that are added to the measured peaks. Defaults to 0.
        parts: The number of parts in which a batch is computed, with accumulated gradients. Defaults to 1.

    Example:
    >>> option = Option("float32", ((8, 300), (16, 400)), Sizes((), ()))
    >>> option.peak(32), option.largest_batch(1000)
    (600, 64)
    """

    name: str
    points: tuple[tuple[int, int], ...]
    sizes: Sizes
    change: int = 0
    parts: int = 1

    def peak(self, batch: int) -> int:
        """Returns the peak in bytes."""
        first, peak, slope = self._segment(batch / self.parts)
        return int(peak + self.change + slope * (batch / self.parts - first))

    def by_batch(self, batch: int) -> int:
        """Returns the part of the peak that is proportional to the batch: activations and their gradients."""
        return int(self._segment(batch / self.parts)[2] * batch / self.parts)

    def largest_batch(self, budget: float) -> int | None:
        """Returns the largest batch size whose peak is within `budget` bytes.

        0 stands for none, and None for a peak that does not grow with the batch.
        """
        if self.points[-1][1] <= self.points[0][1]:
            return None
        low, high = 0, 1
        while self.peak(high) <= budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= budget else (low, middle)
        return low

    def _segment(self, batch: float) -> tuple[int, int, float]:
        """Returns the start of the segment that contains a batch size, its peak, and the bytes a sample."""
        heights = [max(peak for _, peak in self.points[: i + 1]) for i in range(len(self.points))]
        index = sum(start <= batch for start, _ in self.points[1:-1])
        (first, _), (second, _) = self.points[index : index + 2]
        return first, heights[index], (heights[index + 1] - heights[index]) / (second - first)


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of training. It prints as two tables. `tfmixed.memory.estimate` returns an instance.

    All peaks are above the memory of the process before the model was made. On an accelerator, they are bytes of that.

    Args:
        model: `module:function` that returns the model.
        batch: The batch size.
        budget: The bytes for `Option.largest_batch`, or None.
        process: The bytes that the process used before.
        data: The bytes of inputs and targets.
        options: The present way to train, and others.
    """

    model: str
    batch: int
    budget: int | None
    process: int
    data: int
    options: tuple[Option, ...]

    @property
    def peak(self) -> int:
        """The predicted peak in bytes."""
        return self.options[0].peak(self.batch)

    @property
    def largest_batch(self) -> int | None:
        """The largest batch size within the budget. None without a budget, or if memory does not grow."""
        return None if self.budget is None else self.options[0].largest_batch(self.budget)

    def purposes(self) -> dict[str, int]:
        """Returns the bytes by purpose, whose sum is `peak`.

        The last is what remains: temporary values of the update, the framework's own memory, free memory that its
        allocator keeps. It is smaller, or negative, where gradients are not all held at once.
        """
        now = self.options[0]
        counted = {
            "weights": now.sizes.weights,
            "gradients": now.sizes.gradients,
            "optimizer states": now.sizes.states,
            "half-precision copies": now.sizes.copies,
            "activations": now.by_batch(self.batch),
            "data": self.data,
        }
        return {**counted, "temporaries and framework": self.peak - sum(counted.values())}

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, in bytes."""
        options = [
            {
                "name": option.name,
                "peak": option.peak(self.batch),
                "saved": self.peak - option.peak(self.batch),
                "largest_batch": None if self.budget is None else option.largest_batch(self.budget),
                "measured": [list(point) for point in option.points],
            }
            for option in self.options
        ]
        return {
            "model": self.model,
            "batch": self.batch,
            "budget": self.budget,
            "peak": self.peak,
            "largest_batch": self.largest_batch,
            "process": self.process,
            "purposes": self.purposes(),
            "options": options,
        }

    def to_json(self) -> str:
        """Returns `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __rich__(self) -> Group:
        purposes = _table(f"{self.model}, batch {self.batch:,}", "purpose", "MiB")
        for name, size in {**self.purposes(), "peak": self.peak}.items():
            purposes.add_row(name, _mib(size))
        within = [] if self.budget is None else [f"batch in {self.budget / GIB:g} GiB"]
        options = _table("", "option", "peak MiB", "saves MiB", *within)
        for row in self.as_dict()["options"]:
            fits = "any" if row["largest_batch"] is None else f"{row['largest_batch']:,}"
            options.add_row(row["name"], _mib(row["peak"]), _mib(row["saved"]), *(fits for _ in within))
        return Group(
            purposes, options, Text(f"Not counted: {_mib(self.process)} MiB in use before the model was made.")
        )

    def __str__(self) -> str:
        return rich_text.text(self)


def _table(title: str, *headings: str) -> Table:
    numbers = [Column(heading, justify="right", no_wrap=True) for heading in headings[1:]]
    columns = [Column(headings[0], overflow="fold"), *numbers]
    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title or None, title_justify="left")


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"
