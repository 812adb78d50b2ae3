"""Training speed and memory: float32, Keras's own mixed precision and tfmixed, side by side in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy
from rich import box
from rich.console import Console, Group
from rich.progress import Progress
from rich.table import Table

from tfmixed import hardware, networks, printed, temporary
from tfmixed import memory as memory_of
from tfmixed.callbacks import LossScaleLogger
from tfmixed.errors import UsageError
from tfmixed.models import function_of
from tfmixed.optimizer import LossScaleOptimizer
from tfmixed.scaling import checks

VARIANTS = {
    "float32": "float32",
    "unscaled": "half precision, the optimizer as it is",
    "keras": "half precision, keras.optimizers.LossScaleOptimizer",
    "tfmixed": "half precision, tfmixed.LossScaleOptimizer and LossScaleLogger",
}
NETWORKS = tuple(networks.BATCHES)
_POLICIES = ("auto", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
_FEWEST_STEPS = 5
_GIB, _MIB = 2**30, 2**20


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
            headings += ["peak MiB", f"batch in {self.memory / _GIB:g} GiB"]
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
        yield "-" if row.peak is None else f"{row.peak / _MIB:,.0f}"
        yield "-" if row.batch_in_memory is None else f"{row.batch_in_memory:,}"

    def __str__(self) -> str:
        return printed.text(self, 120)


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
    _check(policy, rounds, seconds, memory)
    limit = 0.0 if memory is None else memory * _GIB
    if len(set(cases)) < len(cases):
        raise UsageError(f"networks must be given once each, received {', '.join(cases)}")
    every = [Case(spec, policy, batch or networks.BATCHES.get(spec, 32)) for spec in cases]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in every:
            turns = len(VARIANTS) * (1 + rounds + (1 if limit else 0))
            task = progress.add_task(case.name, total=turns)
            tick = functools.partial(progress.advance, task)
            timed = case.timed(rounds, seconds, tick)
            rows += [case.with_memory(row, limit, tick) for row in timed] if limit else timed
    warnings = () if device.fast and policy.removeprefix("mixed_") in device.fast else (f"{policy}: {device.reason}",)
    return Report(policy, device.name, _versions(), int(limit), tuple(rows), warnings)


def _check(policy: str, rounds: int, seconds: float, memory: float | None) -> None:
    if policy not in _POLICIES:
        raise UsageError(f"policy must be one of {', '.join(_POLICIES)}, received {policy!r}")
    checks.count("rounds", rounds, 1)
    checks.number("seconds", seconds, above=0.0)
    if memory is not None:
        checks.number("memory", memory, above=0.0)


class Case:
    """A network under one half-precision policy.

    Args:
        spec: A built-in network or `"module:function"`.
        policy: Of all variants but float32.
        batch: Samples a step.
    """

    def __init__(self, spec: str, policy: str, batch: int) -> None:
        self.spec, self.policy, self.batch = spec, policy, checks.count("batch", batch, 1)
        self.name = spec
        if spec not in networks.BATCHES and ":" not in spec:
            raise UsageError(
                f"networks must be among {', '.join(NETWORKS)}, or model=module:function, received {spec!r}"
            )
        self._function = getattr(networks, spec) if spec in networks.BATCHES else function_of(spec)

    def made(self, variant: str) -> networks.Case:
        """Returns the model, compiled as the variant says, inputs and targets."""
        keras.utils.set_random_seed(0)
        with temporary.global_policy("float32" if variant == "float32" else self.policy):
            made = self._function()
        if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], keras.Model) and made[0].compiled):
            raise UsageError(
                f"{self.spec} must return a compiled keras.Model, inputs and targets, received {type(made).__name__}: "
                "end it with `return model, x, y`"
            )
        model, x, y = made
        # Not compiled again: whatever else it was compiled with stays, and Keras wraps no optimizer by itself.
        model.optimizer = _optimizer(model.optimizer, variant)
        return model, *keras.tree.map_structure(self._array, (x, y))

    def _array(self, values: Any) -> Any:
        if not hasattr(values, "shape") or not len(values):
            raise UsageError(f"{self.spec} must return inputs and targets as arrays, received {type(values).__name__}")
        return numpy.asarray(values)

    def timed(self, rounds: int, seconds: float, tick: Callable[[], None]) -> list[Row]:
        """Returns a row for each variant, without memory. All are trained by turns, so that noise hits all of them."""
        cases = {variant: self.made(variant) for variant in VARIANTS}
        if len({id(model) for model, _, _ in cases.values()}) < len(cases):
            raise UsageError(f"{self.spec} must return a new model each time, received the same one again")
        firsts, steps = {}, _FEWEST_STEPS
        for variant, case in cases.items():
            firsts[variant], _ = self._fitted(case, 1, variant)
            lasting, _ = self._fitted(case, _FEWEST_STEPS, variant)
            steps = max(steps, math.ceil(seconds * _FEWEST_STEPS / lasting)) if variant == "float32" else steps
            tick()
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        losses = {}
        for turn in range(rounds):
            for variant in _rotated(list(VARIANTS), turn):
                lasting, losses[variant] = self._fitted(cases[variant], steps, variant)
                times[variant].append(1e3 * lasting / steps)
                tick()
        done = 1 + _FEWEST_STEPS + rounds * steps
        return [
            Row(self.name, variant, self.batch, tuple(times[variant]), firsts[variant], done, losses[variant])
            for variant in VARIANTS
        ]

    def with_memory(self, row: Row, limit: float, tick: Callable[[], None]) -> Row:
        """Returns `row` with the peak of memory at its batch, and the batch whose peak is `limit` bytes.

        Without both, and a line on standard error, where a process fails: what was timed is not lost.
        """
        with ThreadPoolExecutor(2) as pool:  # of processes: they wait
            peaks = list(pool.map(functools.partial(self._peak_elsewhere, row.variant), (self.batch, 2 * self.batch)))
        tick()
        if None in peaks:
            return row
        a_sample = (peaks[1] - peaks[0]) / self.batch
        # What is not much more than the noise of an allocator is no slope.
        fits = self.batch + int((limit - peaks[0]) / a_sample) if peaks[1] - peaks[0] > 32 * _MIB else None
        return dataclasses.replace(row, peak=peaks[0], batch_in_memory=fits)

    def peak(self, variant: str) -> int:
        """Returns the bytes at the peak of a few steps, above what the process holds now. Once a process."""
        before = memory_of.used(at_peak=False)
        case = self.made(variant)
        self._fitted(case, 3, variant)
        return memory_of.used(at_peak=True) - before

    def _peak_elsewhere(self, variant: str, batch: int) -> Any:
        """Returns what `peak` returns in a process of its own; None if that fails."""
        code = (
            "import sys; from tfmixed.bench import Case; s, p, b, v = sys.argv[1:]; print(Case(s, p, int(b)).peak(v))"
        )
        command = [sys.executable, "-c", code, self.spec, self.policy, str(batch), variant]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"memory of {self.name} at batch {batch} not measured: {result.stderr[-500:]}", file=sys.stderr)
            return None
        return int(result.stdout.split()[-1])

    def _fitted(self, case: networks.Case, steps: int, variant: str) -> tuple[float, float]:
        """Returns the seconds of an epoch of so many steps, and its mean loss."""
        model, x, y = case
        x, y = keras.tree.map_structure(lambda each: _repeated(each, steps * self.batch), (x, y))
        watch = _Watch()
        callbacks = [watch, LossScaleLogger(verbose=0)] if variant == "tfmixed" else [watch]
        history = model.fit(x, y, batch_size=self.batch, shuffle=False, verbose=0, callbacks=callbacks)
        return watch.seconds, float(history.history["loss"][-1])


class _Watch(keras.callbacks.Callback):
    """Times an epoch. What comes after the last is no part of a step: TensorFlow may take a second to end a dataset."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Keras has read the metrics by now, and so waited for the device.
        self.seconds = time.perf_counter() - self._start


def _optimizer(inner: keras.optimizers.Optimizer, variant: str) -> keras.optimizers.Optimizer:
    inner = getattr(inner, "inner_optimizer", inner)
    fresh = type(inner).from_config(inner.get_config())
    wrappers = {"keras": keras.optimizers.LossScaleOptimizer, "tfmixed": LossScaleOptimizer}
    return wrappers[variant](fresh) if variant in wrappers else fresh


def _repeated(values: Any, count: int) -> Any:
    return values[numpy.arange(count) % len(values)]


def _rotated(items: list[str], by: int) -> list[str]:
    return items[by % len(items) :] + items[: by % len(items)]


def _versions() -> dict[str, str]:
    backend = keras.backend.backend()
    found = {"keras": keras.__version__, "tfmixed": importlib.metadata.version("tfmixed")}
    for name in {"tensorflow": ("tensorflow", "tensorflow-cpu"), "jax": ("jax",), "torch": ("torch",)}.get(backend, ()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
