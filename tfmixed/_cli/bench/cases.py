"""Benchmark cases: a network under one half-precision policy, trained in all variants with interleaved timing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy
from rich.console import Console
from rich.progress import Progress

from tfmixed import hardware
from tfmixed._cli.bench import networks
from tfmixed._cli.bench.tables import Report, Row
from tfmixed._cli.load_model import load_function
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._utils import temporary_state, timing
from tfmixed.callbacks import LossScaleLogger
from tfmixed.errors import UsageError
from tfmixed.memory.process import used
from tfmixed.scaling import validation

NETWORKS = tuple(networks.BATCHES)
VARIANTS = {
    "float32": "float32",
    "unscaled": "half precision, original optimizer",
    "keras": "half precision, keras.optimizers.LossScaleOptimizer",
    "tfmixed": "half precision, tfmixed.LossScaleOptimizer and LossScaleLogger",
}
_POLICIES = ("auto", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
_MIN_STEPS = 5


def run(
    cases: Sequence[str] = NETWORKS,
    policy: str = "auto",
    *,
    batch: int | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    memory: bool = True,
) -> Report:
    """Trains each case in all `VARIANTS`, and measures time, memory and loss.

    Args:
        cases: Names of built-in networks, or `"module:function"` of a function that returns a compiled `keras.Model`,
            inputs and targets. Defaults to all built-in networks.
        policy: The half-precision policy. `"auto"` selects the fastest on this hardware, or `mixed_bfloat16` if that
            is float32. Defaults to `"auto"`.
        batch: The batch size. `None` uses that of the network, or 32 for a function. Defaults to None.
        rounds: The number of timed epochs of each variant. Defaults to 5.
        seconds: The approximate length of an epoch. Defaults to 1.
        memory: Whether to measure memory, which takes a process for each row. Defaults to True.

    Raises:
        UsageError: If a case is unknown, or its function returns something else.
        ValueError: If an argument is out of range.

    Example:
    >>> report = run(["mlp"])  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    device = hardware.describe().main
    if policy not in _POLICIES:
        raise UsageError(f"`policy` must be one of {', '.join(_POLICIES)}. Received: policy={policy!r}")
    if policy == "auto":
        policy = device.policy if device.policy != "float32" else "mixed_bfloat16"
    validation.count("rounds", rounds, 1)
    validation.number("seconds", seconds, above=0.0)
    if len(set(cases)) < len(cases):
        raise UsageError(f"Networks must be unique. Received: {', '.join(cases)}")
    made = [Case(spec, policy, batch or networks.BATCHES.get(spec, 32)) for spec in cases]
    rows = tuple(_rows(made, rounds, seconds, memory))
    fast = policy.removeprefix("mixed_") in device.fast
    return Report(policy, device.name, _versions(), rows, () if fast else (f"{policy}: {device.reason}",))


class Case:
    """A network under one half-precision policy.

    Args:
        spec: The name of a built-in network, or `"module:function"`.
        policy: The policy of all variants but float32.
        batch: The batch size.
    """

    def __init__(self, spec: str, policy: str, batch: int) -> None:
        self.spec, self.policy, self.batch = spec, policy, validation.count("batch", batch, 1)
        if spec not in NETWORKS and ":" not in spec:
            names = ", ".join(NETWORKS)
            raise UsageError(
                f"Networks must be among {names}, or given by `--model module:function`. Received: {spec!r}"
            )
        self._function = getattr(networks, spec) if spec in NETWORKS else load_function(spec)

    def make(self, variant: str) -> networks.Problem:
        """Returns the model compiled for a variant, inputs and targets."""
        keras.utils.set_random_seed(0)
        with temporary_state.global_policy("float32" if variant == "float32" else self.policy):
            made = self._function()
        if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], keras.Model) and made[0].compiled):
            raise UsageError(
                f"{self.spec} must return a compiled keras.Model, inputs and targets, as in `return model, x, y`. "
                f"Received: {type(made).__name__}"
            )
        model, x, y = made
        # Replaced without `compile`, which would lose other arguments and wrap the optimizer under mixed_float16.
        model.optimizer = _optimizer(model.optimizer, variant)
        return model, *keras.tree.map_structure(self._array, (x, y))

    def _array(self, values: Any) -> Any:
        if not hasattr(values, "shape") or not len(values):
            name = type(values).__name__
            raise UsageError(f"{self.spec} must return inputs and targets as arrays. Received: {name}")
        return numpy.asarray(values)

    def measure(self, rounds: int, seconds: float, tick: Callable[[], None]) -> list[Row]:
        """Returns a row for each variant, without memory. Calls `tick` after each epoch."""
        problems = {variant: self.make(variant) for variant in VARIANTS}
        if len({id(model) for model, _, _ in problems.values()}) < len(problems):
            raise UsageError(f"{self.spec} must return a new model in each call. Received: the same model")
        runs = {variant: _Training(problem, self.batch, variant, tick) for variant, problem in problems.items()}
        firsts = {variant: training.epoch(1) for variant, training in runs.items()}
        warm = {variant: training.epoch(_MIN_STEPS) for variant, training in runs.items()}
        steps = max(_MIN_STEPS, math.ceil(seconds * _MIN_STEPS / warm["float32"]))
        times = timing.interleaved(runs, rounds, lambda training: training.epoch(steps))
        total = 1 + _MIN_STEPS + rounds * steps
        ms = {variant: tuple(1e3 * taken / steps for taken in times[variant]) for variant in VARIANTS}
        return [
            Row(self.spec, variant, self.batch, ms[variant], firsts[variant], total, runs[variant].loss)
            for variant in VARIANTS
        ]

    def with_memory(self, row: Row, tick: Callable[[], None]) -> Row:
        """Returns `row` with its peak memory, measured in a new process.

        If the process fails, prints a line to standard error and returns the row without it.
        """
        peak = self._peak_in_process(row.variant)
        tick()
        return dataclasses.replace(row, peak=peak)

    def peak(self, variant: str) -> int:
        """Returns the peak memory of three training steps in bytes. Only the first call in a process is correct."""
        before = used()
        _Training(self.make(variant), self.batch, variant).epoch(3)
        return used(peak=True) - before

    def _peak_in_process(self, variant: str) -> Any:
        """Returns the result of `peak` in a new process, or `None` if that fails."""
        code = "import sys; from tfmixed._cli.bench import Case; spec, policy, batch, variant = sys.argv[1:]; "
        code += "print(Case(spec, policy, int(batch)).peak(variant))"
        command = [sys.executable, "-c", code, self.spec, self.policy, str(self.batch), variant]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"memory of {self.spec} not measured: {result.stderr[-500:]}", file=sys.stderr)
            return None
        return int(result.stdout.split()[-1])


class _Training:
    """A model in training. `loss` is the mean loss of the last epoch."""

    def __init__(
        self, problem: networks.Problem, batch: int, variant: str, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.model, *self.data = problem
        self.batch, self.variant, self.tick, self.loss = batch, variant, tick, math.nan

    def epoch(self, steps: int) -> float:
        """Trains for an epoch of `steps` steps and returns its seconds."""
        x, y = keras.tree.map_structure(lambda array: repeated(array, steps * self.batch), self.data)
        watch = _Stopwatch()
        callbacks = [watch, LossScaleLogger(verbose=0)] if self.variant == "tfmixed" else [watch]
        history = self.model.fit(x, y, batch_size=self.batch, shuffle=False, verbose=0, callbacks=callbacks)
        self.loss = float(history.history["loss"][-1])
        self.tick()
        return watch.seconds


class _Stopwatch(keras.callbacks.Callback):
    """Times an epoch, without the end of `fit`, in which TensorFlow may take a second to finish a dataset."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Keras has read the metrics by now, and so has waited for the device.
        self.seconds = time.perf_counter() - self._start


def repeated(values: Any, count: int) -> Any:
    """Returns `count` samples, which repeat the given ones in order."""
    return values[numpy.arange(count) % len(values)]


def _optimizer(inner: keras.optimizers.Optimizer, variant: str) -> keras.optimizers.Optimizer:
    inner = getattr(inner, "inner_optimizer", inner)
    fresh = type(inner).from_config(inner.get_config())
    wrappers = {"keras": keras.optimizers.LossScaleOptimizer, "tfmixed": LossScaleOptimizer}
    return wrappers[variant](fresh) if variant in wrappers else fresh


def _rows(cases: Sequence[Case], rounds: int, seconds: float, memory: bool) -> Iterator[Row]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in cases:
            total = len(VARIANTS) * (2 + rounds + memory)
            tick = functools.partial(progress.advance, progress.add_task(case.spec, total=total))
            for row in case.measure(rounds, seconds, tick):
                yield case.with_memory(row, tick) if memory else row


def _versions() -> dict[str, str]:
    versions = {"keras": keras.__version__, "tfmixed": importlib.metadata.version("tfmixed")}
    backend = keras.backend.backend()
    for name in (backend, "tensorflow-cpu") if backend == "tensorflow" else (backend,):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
