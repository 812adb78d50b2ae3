"""Selects few of many combinations for the default tests. `make test-all` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

thorough = pytest.mark.thorough


def few(names: Iterable[str], values: Mapping[str, Any]) -> list[Any]:
    """Returns all values as test parameters. Those not in `names` are marked as `thorough`."""
    names = set(names)
    return [pytest.param(value, id=name, marks=() if name in names else thorough) for name, value in values.items()]


def covering(strength: int, *parameters: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    """Returns all combinations of values as test parameters. Most are marked as `thorough`.

    The unmarked ones contain each combination of `strength` values at least once: each value for 1, each pair of values
    of two parameters for 2. Faults that need three values at once are rare (Kuhn, Wallace and Gallo 2004, "Software
    fault interactions and implications for software testing").

    Args:
        strength: The number of values that are combined.
        *parameters: The values of each parameter, as a mapping from names if their text is not a good test id.
    """
    named = [
        parameter if isinstance(parameter, Mapping) else {str(value): value for value in parameter}
        for parameter in parameters
    ]
    combinations = list(itertools.product(*named))
    kept = _cover(combinations, lambda names: set(itertools.combinations(enumerate(names), strength)))
    return [
        pytest.param(
            *(values[name] for values, name in zip(named, names, strict=True)),
            id="-".join(names),
            marks=() if names in kept else thorough,
        )
        for names in combinations
    ]


def mostly_slow(default: Iterable[str], *parameters: Mapping[str, Any]) -> list[Any]:
    """Returns all combinations of values by name: those in `default`, slow ones with each value, and thorough ones."""
    return [
        pytest.param(*param.values, id=param.id, marks=() if param.id in default else [pytest.mark.slow, *param.marks])
        for param in covering(1, *parameters)
    ]


def _cover(candidates: Sequence[Any], items: Callable[[Any], set[Any]]) -> list[Any]:
    """Returns few candidates that together contain all items (greedy set cover)."""
    missing, kept = set().union(*map(items, candidates)), []
    while missing:
        kept.append(max(candidates, key=lambda candidate: len(items(candidate) & missing)))
        missing -= items(kept[-1])
    return kept
