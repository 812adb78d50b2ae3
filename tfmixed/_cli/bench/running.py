"""The benchmark: each case in all variants, by turns."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator, Sequence

import keras
from rich.console import Console
from rich.progress import Progress

from tfmixed import hardware
from tfmixed._cli.bench import networks
from tfmixed._cli.bench.cases import VARIANTS, Case
from tfmixed._cli.bench.reports import GIB, Report, Row
from tfmixed.errors import UsageError
from tfmixed.scaling import validation

NETWORKS = tuple(networks.BATCHES)
_POLICIES = ("auto", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


def run(
    cases: Sequence[str] = NETWORKS,
    policy: str = "auto",
    *,
    batch: int | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    memory: float | None = 8.0,
) -> Report:
    """Trains each case in all `VARIANTS` by turns, and measures time, memory and loss.

    Args:
        cases: Names of built-in networks (`networks.BATCHES`), or `"module:function"`: a function that returns a
            compiled `keras.Model`, inputs and targets.
        policy: `"auto"` is what `hardware` recommends here, or `mixed_bfloat16` where that is float32.
        batch: Samples a step; None takes a network's own, and 32 for a function.
        rounds: How often each variant has its turn.
        seconds: How long one turn takes, about.
        memory: GiB for `Row.batch_in_memory`; None measures no memory, which takes two processes for each row.

    Raises:
        UsageError: A case is no network and no such function, or returns something else.
        ValueError: An argument is out of range.

    Example:
    >>> report = run(["mlp"])  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    device = hardware.describe().main
    if policy == "auto":
        policy = device.policy if device.policy != "float32" else "mixed_bfloat16"
    _check(cases, policy, rounds, seconds, memory)
    limit = 0.0 if memory is None else memory * GIB
    every = [Case(spec, policy, batch or networks.BATCHES.get(spec, 32)) for spec in cases]
    rows = tuple(_rows(every, rounds, seconds, limit))
    warnings = () if device.fast and policy.removeprefix("mixed_") in device.fast else (f"{policy}: {device.reason}",)
    return Report(policy, device.name, _versions(), int(limit), rows, warnings)


def _rows(cases: Sequence[Case], rounds: int, seconds: float, limit: float) -> Iterator[Row]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in cases:
            turns = len(VARIANTS) * (1 + rounds + (1 if limit else 0))
            tick = functools.partial(progress.advance, progress.add_task(case.spec, total=turns))
            for row in case.timed(rounds, seconds, tick):
                yield case.with_memory(row, limit, tick) if limit else row


def _check(cases: Sequence[str], policy: str, rounds: int, seconds: float, memory: float | None) -> None:
    if policy not in _POLICIES:
        raise UsageError(f"policy must be one of {', '.join(_POLICIES)}, received {policy!r}")
    validation.count("rounds", rounds, 1)
    validation.number("seconds", seconds, above=0.0)
    if memory is not None:
        validation.number("memory", memory, above=0.0)
    if len(set(cases)) < len(cases):
        raise UsageError(f"networks must be given once each, received {', '.join(cases)}")


def _versions() -> dict[str, str]:
    backend = keras.backend.backend()
    found = {"keras": keras.__version__, "tfmixed": importlib.metadata.version("tfmixed")}
    for name in {"tensorflow": ("tensorflow", "tensorflow-cpu"), "jax": ("jax",), "torch": ("torch",)}.get(backend, ()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
