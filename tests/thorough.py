"""Which of many combinations the suite takes by default: `make test-all` takes all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

thorough = pytest.mark.thorough


def few(names: Iterable[str], values: Mapping[str, Any]) -> list[Any]:
    """Returns all values, by name; those that `names` leaves out are marked as `thorough`."""
    names = set(names)
    return [pytest.param(value, id=name, marks=() if name in names else thorough) for name, value in values.items()]


def covering(strength: int, *parameters: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    """Returns all combinations of values, one of each parameter; most are marked as `thorough`.

    Without the mark are as many as it takes to hold each combination of `strength` values once: 1 for each value, 2
    for each pair of values of two parameters. Faults that take three values at once to show are rare (Kuhn, Wallace
    and Gallo 2004, "Software fault interactions and implications for software testing").

    Args:
        strength: How many values at once.
        *parameters: The values of each, by name if their own text is none.
    """
    named = [each if isinstance(each, Mapping) else {str(value): value for value in each} for each in parameters]
    every = list(itertools.product(*named))
    kept = _cover(every, lambda names: set(itertools.combinations(enumerate(names), strength)))
    return [
        pytest.param(
            *(values[name] for values, name in zip(named, names, strict=True)),
            id="-".join(names),
            marks=() if names in kept else thorough,
        )
        for names in every
    ]


def _cover(every: Sequence[Any], held: Callable[[Any], set[Any]]) -> list[Any]:
    """Returns few of `every` that together hold what all of them do: by turns the first that holds most of the rest."""
    missing, kept = set().union(*map(held, every)), []
    while missing:
        kept.append(max(every, key=lambda each: len(held(each) & missing)))
        missing -= held(kept[-1])
    return kept
