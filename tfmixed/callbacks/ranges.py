"""The callback that measures gradients while a model trains."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfmixed import distribute, ranges, runlog
from tfmixed.probing import Precision, Probe, checked_precision
from tfmixed.records import GradientRange, RangesRecord
from tfmixed.scaling import checks
from tfmixed.state import Observable


class GradientRanges(keras.callbacks.Callback):
    """Measures, each `every` steps, the gradients of the batch that comes next, as `tfmixed.measure_gradients` does.

    The step that is measured is trained on afterwards as if nothing had happened. It takes one and a half steps more
    or so; all others take what they take.

    Args:
        path: File of JSON lines, one a snapshot: best that of `LossScaleLogger`, so that `tfmixed report` finds all in
            one log. Snapshots of a run that is repeated are replaced. None writes no file.
        every: Attempted steps from one snapshot to the next; the first is that of the first step.
        precision: As in `measure_gradients`.
        tensorboard: Log directory for TensorBoard: of each gradient a histogram of log2 of its magnitudes, and over all
            of them scalars: the largest, the smallest, the share that float16 flushes to 0 without a scale, and the
            largest scale without an overflow. Needs TensorFlow and the package tensorboard.
        verbose: 1 prints what each snapshot says. 0 prints nothing.

    `last` is the last snapshot, a `tfmixed.ranges.GradientRanges`; None before the first.

    Raises:
        ValueError: An argument is out of range.
        ImportError: `tensorboard` is asked for and not installed.
        NotImplementedError: `fit` runs on several workers. One that stops to measure alone would stop the others.

    Example:
    >>> watch = GradientRanges("runs/mine/loss_scale.jsonl", every=500)
    >>> # model.fit(x, y, callbacks=[LossScaleLogger("runs/mine/loss_scale.jsonl"), watch])
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        every: int = 1000,
        precision: Precision = "float32",
        tensorboard: str | os.PathLike[str] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.every = checks.count("every", every, 1)
        self.precision = checked_precision(precision)
        self.tensorboard = checked_tensorboard(tensorboard)
        self.verbose = checks.count("verbose", verbose, 0)
        self.last: ranges.GradientRanges | None = None
        self._trained: Any = None
        self._probe: Probe | None = None
        self._epoch = 0
        self._step = 0
        self._due = 0
        self._begun = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model = self.model
        if distribute.works_with_others(model):
            raise NotImplementedError(
                "GradientRanges measures in one process, received a model on several workers: measure_gradients(model, "
                "data) on one of them before or after `fit` tells the same"
            )
        # Not `self.model` later on: on JAX that takes the variables away from the step that is about to use them.
        self._trained = model
        self._probe = Probe(model, self.precision)
        self._begun = False
        # An earlier fit that was interrupted had no chance to take its own away.
        model.train_function = self._measuring(getattr(model.train_function, "measured", model.train_function))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch
        optimizer = self.model.optimizer
        steps = optimizer.attempted_steps if isinstance(optimizer, Observable) else optimizer.iterations
        self._step = int(steps)
        if not self._begun:  # a callback that restores the optimizer may have come after this one
            self._due = self._step
            self._begun = True
            if self.path is not None:
                runlog.continue_at(self.path, self._step, (RangesRecord,))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.model.train_function = getattr(self.model.train_function, "measured", self.model.train_function)

    def _measuring(self, train_function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns Keras's function of one execution, with a look at its first batch when that is due."""

        def measured(*arguments: Any) -> Any:
            *state, batches = arguments  # JAX hands the variables over too
            if self._step < self._due:
                self._step += self._trained.steps_per_execution
                return train_function(*state, batches)
            taken = list(itertools.islice(batches, self._trained.steps_per_execution))
            if taken:
                self._measure(taken[0], *state)
                self._due = self._step + self.every
            self._step += len(taken)
            return train_function(*state, _as_before(taken) if taken else batches)

        measured.measured = train_function  # type: ignore[attr-defined]
        return measured

    def _measure(self, batch: Any, state: Any = None) -> None:
        assert self._probe is not None
        if keras.backend.backend() == "tensorflow":
            batch = self._trained.distribute_strategy.experimental_local_results(batch)[0]
        self._probe.measure(batch, state)
        record = self._probe.record(self._step, self._epoch)
        self.last = ranges.GradientRanges(record)
        if self.path is not None:
            runlog.append(self.path, [record])
        if self.tensorboard is not None:
            _write(self.tensorboard, self.last)
        if self.verbose:
            print(f"step {self._step}: {self.last.verdict()}")


def _as_before(batches: list[Any]) -> Any:
    # Keras's trainers take lists, but for JAX's, which asks for the next one.
    return iter(batches) if keras.backend.backend() == "jax" else batches


def checked_tensorboard(tensorboard: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """Returns the argument, if TensorBoard is there.

    Raises:
        ImportError: It is asked for and not installed.
    """
    if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard needs the package of that name: pip install 'tfmixed[tensorboard]'. "
            f"Received: tensorboard={os.fspath(tensorboard)!r}"
        )
    return tensorboard


def _write(folder: str | os.PathLike[str], snapshot: ranges.GradientRanges) -> None:
    import tensorflow
    from tensorboard.plugins.histogram import metadata  # type: ignore[import-untyped]

    step = snapshot.record.step
    kind = metadata.create_summary_metadata(display_name=None, description="log2 of the magnitudes other than 0")
    writer = tensorflow.summary.create_file_writer(os.fspath(folder), filename_suffix=".ranges")
    with writer.as_default(step):
        for each in snapshot:
            tensorflow.summary.write(f"gradients/{each.kind}/{each.name}", _buckets(each), metadata=kind)
        for name, value in _scalars(snapshot).items():
            tensorflow.summary.scalar(f"gradients/{name}", value)
    writer.close()


def _buckets(range_: GradientRange) -> Any:
    """Returns left edge, right edge and count of each octave, as TensorBoard's histograms have them."""
    import numpy

    rows = [(octave, octave + 1, sum(parts)) for octave, parts in sorted(range_.octaves.items())]
    return numpy.array(rows, "float64").reshape(-1, 3)


def _scalars(snapshot: ranges.GradientRanges) -> dict[str, float]:
    found = [each for each in snapshot.half if each.nonzeros]
    if not found:
        return {}
    return {
        "largest": max(each.largest for each in found),
        "smallest": min(each.smallest for each in found),
        "underflow_at_scale_1": snapshot.underflow(),
        "log2_of_largest_scale": math.log2(snapshot.best_scales()[1]),
    }
