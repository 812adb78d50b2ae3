"""A network under one half-precision policy, trained in each variant by turns."""

from __future__ import annotations

import dataclasses
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy

from tfmixed._cli.bench import memory, networks
from tfmixed._cli.bench.reports import MIB, Row
from tfmixed._cli.load_model import load_function
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._utils import temporary_state
from tfmixed.callbacks import LossScaleLogger
from tfmixed.errors import UsageError
from tfmixed.scaling import validation

VARIANTS = {
    "float32": "float32",
    "unscaled": "half precision, the optimizer as it is",
    "keras": "half precision, keras.optimizers.LossScaleOptimizer",
    "tfmixed": "half precision, tfmixed.LossScaleOptimizer and LossScaleLogger",
}
_FEWEST_STEPS = 5


class Case:
    """A network under one half-precision policy.

    Args:
        spec: A built-in network or `"module:function"`.
        policy: Of all variants but float32.
        batch: Samples a step.
    """

    def __init__(self, spec: str, policy: str, batch: int) -> None:
        self.spec, self.policy, self.batch = spec, policy, validation.count("batch", batch, 1)
        if spec not in networks.BATCHES and ":" not in spec:
            raise UsageError(
                f"networks must be among {', '.join(networks.BATCHES)}, or model=module:function, received {spec!r}"
            )
        self._function = getattr(networks, spec) if spec in networks.BATCHES else load_function(spec)

    def made(self, variant: str) -> networks.Problem:
        """Returns the model, compiled as the variant says, inputs and targets."""
        keras.utils.set_random_seed(0)
        with temporary_state.global_policy("float32" if variant == "float32" else self.policy):
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
            Row(self.spec, variant, self.batch, tuple(times[variant]), firsts[variant], done, losses[variant])
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
        fits = self.batch + int((limit - peaks[0]) / a_sample) if peaks[1] - peaks[0] > 32 * MIB else None
        return dataclasses.replace(row, peak=peaks[0], batch_in_memory=fits)

    def peak(self, variant: str) -> int:
        """Returns the bytes at the peak of a few steps, above what the process holds now. Once a process."""
        before = memory.used(at_peak=False)
        case = self.made(variant)
        self._fitted(case, 3, variant)
        return memory.used(at_peak=True) - before

    def _peak_elsewhere(self, variant: str, batch: int) -> Any:
        """Returns what `peak` returns in a process of its own; None if that fails."""
        arguments = "s, p, b, v = sys.argv[1:]"
        code = f"import sys; from tfmixed._cli.bench import Case; {arguments}; print(Case(s, p, int(b)).peak(v))"
        command = [sys.executable, "-c", code, self.spec, self.policy, str(batch), variant]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"memory of {self.spec} at batch {batch} not measured: {result.stderr[-500:]}", file=sys.stderr)
            return None
        return int(result.stdout.split()[-1])

    def _fitted(self, case: networks.Problem, steps: int, variant: str) -> tuple[float, float]:
        """Returns the seconds of an epoch of so many steps, and its mean loss."""
        model, x, y = case
        x, y = keras.tree.map_structure(lambda each: repeated(each, steps * self.batch), (x, y))
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


def repeated(values: Any, count: int) -> Any:
    """Returns so many samples: the given ones again and again."""
    return values[numpy.arange(count) % len(values)]


def _rotated(items: list[str], by: int) -> list[str]:
    return items[by % len(items) :] + items[: by % len(items)]
