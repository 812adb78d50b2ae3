"""Interleaved timing: a slow moment of the machine affects all functions that are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def elapsed(function: Callable[[], object]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Any], rounds: int, timer: Callable[[Any], float] = elapsed
) -> dict[str, list[float]]:
    """Returns the seconds of `rounds` calls of each function.

    Every round calls each function once, and starts with another one than the round before.

    Args:
        functions: The functions to time, by name. Each must wait for its device.
        rounds: The number of calls of each function.
        timer: Returns the seconds of one call of a function. Defaults to `elapsed`.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timer(functions[name]))
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median of each function's times."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}
