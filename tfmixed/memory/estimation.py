"""`estimate`: the peak memory of training, from counted variables and measured batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

from tfmixed.memory import process
from tfmixed.memory.memory_estimate import GIB, MemoryEstimate, Option
from tfmixed.memory.sizes import Held, Sizes, with_option
from tfmixed.scaling import validation

_LARGEST = 64  # times the batch size, beyond which no batch is trained
_MIXED = "mixed_bfloat16"


def estimate(
    function: str | Callable[[], Any],
    batch: int = 32,
    *,
    policy: str | None = None,
    budget: float | None = None,
    options: bool = True,
) -> MemoryEstimate:
    """Estimates the peak memory of training a model with a batch size.

    Variables are counted. The peak is measured: new processes train for three steps with the batch size and with a
    quarter of it. If memory may be short for the whole batch, half of it is trained, or an eighth, and a line gives the
    peak of the whole. With a budget, larger batches are trained until the peak is a quarter of it, or an eighth of the
    free memory. Two further processes measure mixed precision.

    Args:
        function: A function that takes no arguments and returns a compiled model with inputs and targets, or with a
            dataset, of which the first batch is used. It must be importable; a name is written as `"module:function"`.
        batch: The batch size. Defaults to 32.
        policy: The dtype policy of the model, set by `set_policy`. Defaults to None, which sets none.
        budget: GiB that training may use above the process itself. Defaults to None.
        options: Whether to estimate what other policies and optimizers would save. Defaults to True.

    Raises:
        ValueError: If an argument is out of range, if the function cannot be imported or returns something else, or
            if training fails.

    Example:
    >>> print(tfmixed.memory.estimate("mine:train", 256, budget=8))  # doctest: +SKIP
    """
    spec = function if isinstance(function, str) else _name(function)
    validation.count("batch", batch, 1)
    limit = None if budget is None else int(GIB * validation.number("budget", budget, above=0.0))
    points, first = _measured(spec, policy, batch, limit)
    sizes = _sizes(first)
    name = policy or ("mixed precision" if sizes.copies else "as it is")
    found = [Option(name, points, sizes)]
    if options:
        found += _options(spec, batch, limit, found[0])
    return MemoryEstimate(spec, batch, limit, first["before"], first["data"], tuple(found))


def _options(spec: str, batch: int, limit: int | None, now: Option) -> list[Option]:
    """Returns other ways to train. Low precision shares the activations of mixed precision."""
    found, mixed = [], now
    if not now.sizes.copies:
        points, result = _measured(spec, _MIXED, batch, limit)
        mixed = Option("mixed_bfloat16 or mixed_float16", points, _sizes(result))
        found.append(mixed)
    # An update in float32 arithmetic needs the same temporary values.
    for weights, states in (("split", "bfloat16"), ("stochastic", "bfloat16"), ("stochastic", "int8")):
        sizes = with_option(mixed.sizes, weights, states)
        name = f'bfloat16, LowPrecisionOptimizer(weights="{weights}", states="{states}")'
        found.append(Option(name, mixed.points, sizes, sizes.total - mixed.sizes.total))
    name = "gradient_accumulation_steps=4, each step with a quarter of the batch"
    found.append(Option(name, now.points, now.sizes, now.sizes.gradients, 4))
    return found


def _measured(spec: str, policy: str | None, batch: int, limit: int | None) -> Any:
    """Returns measured batch sizes with their peaks, and the first result."""

    def peak(size: int) -> int:
        return int(process.measure(spec, policy, size, samples)["peak"])

    samples, small = process.STEPS * batch, max(batch // 4, 1)
    first = process.measure(spec, policy, small, samples)
    points, sizes = {small: first["peak"]}, _sizes(first)
    held = sizes.weights + sizes.states  # at any batch size
    expected = {size: held + size * (points[small] - held) / small for size in (batch, batch // 2) if size > small}
    size = next((size for size, bytes_ in expected.items() if bytes_ < _available()), small // 2 or 2)
    points[size] = peak(size)
    enough = 0.0 if limit is None else min(limit, _available() / 2) / 4
    while max(points.values()) < enough and max(points) < _LARGEST * batch:
        size = 4 * max(points)
        points[size] = peak(size)
    return tuple(sorted(points.items())), first


def _available() -> int:
    """Returns the bytes that a process may use before others suffer."""
    return int(psutil.virtual_memory().available)


def _sizes(result: Any) -> Sizes:
    parts = (result["sizes"][name] for name in ("model", "optimizer"))
    return Sizes(*(tuple(Held(**{**held, "shape": tuple(held["shape"])}) for held in part) for part in parts))


def _name(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    if module in (None, "__main__") or not name.isidentifier():
        raise ValueError(f"`function` must be importable: define it at the top of a module. Received: {function!r}")
    return f"{module}:{name}"
