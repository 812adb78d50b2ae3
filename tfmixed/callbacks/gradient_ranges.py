"""The callback that measures gradients while a model trains."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from pathlib import Path
from typing import Any

import keras

from tfmixed import ranges
from tfmixed._core import replica_sync
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._probe.train_step_probe import Precision, Probe, checked_precision
from tfmixed.records import GradientRange, RangesRecord, run_log
from tfmixed.scaling import validation


class GradientRanges(keras.callbacks.Callback):
    """Measures, each `every` steps, the gradients of the batch that comes next, as `tfmixed.measure_gradients` does.

    The step that is measured is trained on afterwards as if nothing had happened. It takes the time of about three
    steps more, five with a half `precision`; all others take what they take.

    Args:
        path: File of JSON lines, one a snapshot: best that of `LossScaleLogger`, so that `tfmixed report` finds all in
            one log. Snapshots of a run that is repeated are replaced. While another running training writes that
            file, or if nothing shows that it is the run's own, it is a new one, as in `LossScaleLogger`. None writes
            no file.
        every: Attempted steps from one snapshot to the next; the first is that of the first step.
        precision: As in `measure_gradients`.
        tensorboard: Log directory for TensorBoard, where a run `gradients` appears beside the others: of each gradient
            a histogram of log2 of its magnitudes, and over all of them scalars: the largest, the smallest, the share
            that float16 flushes to 0 without a scale, and the largest scale without an overflow. Needs TensorFlow and
            the package tensorboard.
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
        self.every = validation.count("every", every, 1)
        self.precision = checked_precision(precision)
        self.tensorboard = checked_tensorboard(tensorboard)
        self.verbose = validation.count("verbose", verbose, 0)
        self.last: ranges.GradientRanges | None = None
        self._execution: _Execution | None = None
        self._writer: Any = None
        self._probe: Probe | None = None
        self._epoch = 0
        self._step = 0
        self._due = 0
        self._begun = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model = self.model
        if replica_sync.is_multi_worker(model):
            raise NotImplementedError(
                "GradientRanges measures in one process, received a model on several workers: measure_gradients(model, "
                "data) on one of them before or after `fit` tells the same"
            )
        self._probe = Probe(model, self.precision)
        self._begun = False
        self._execution = _Execution.of(model)
        self._execution.watchers.append(self)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch
        optimizer = self.model.optimizer
        if isinstance(optimizer, ScalerBase):
            self._step = int(optimizer.attempted_steps)
        else:  # which also counts where a dataset of unknown size has ended
            steps = int(optimizer.iterations)
            self._step = min(self._step, steps) if self._begun else steps
        if not self._begun:  # a callback that restores the optimizer may have come after this one
            self._due = self._step
            self._begun = True
            if self.path is not None:
                scaler = optimizer if isinstance(optimizer, ScalerBase) else None
                self.path, _ = run_log.begin(self.path, self._step, (RangesRecord,), scaler=scaler)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._execution is not None:
            self._execution.forget(self)
        run_log.release(self.path)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def due(self) -> bool:
        """Whether the batch that comes next is to be measured."""
        return self._step >= self._due

    def watch(self, batch: Any, state: Any) -> None:
        """Measures a batch that is about to be trained on."""
        assert self._probe is not None
        self._probe.measure(batch, state)
        self._due = self._step + self.every
        record = self._probe.record(self._step, self._epoch)
        self.last = ranges.GradientRanges(record)
        run_log.append(self.path, [record])
        if self.tensorboard is not None:
            self._write(self.last)
        if self.verbose:
            print(f"step {self._step}: {self.last.verdict()}")

    def advance(self, steps: int) -> None:
        """Counts the steps of an execution."""
        self._step += steps

    def _write(self, snapshot: ranges.GradientRanges) -> None:
        import tensorflow
        from tensorboard.plugins.histogram import metadata  # type: ignore[import-untyped]

        if self._writer is None:
            # A folder of its own: TensorBoard reads but the newest file of a folder while it grows.
            folder = Path(os.fspath(self.tensorboard)) / "gradients"  # type: ignore[arg-type]
            self._writer = tensorflow.summary.create_file_writer(str(folder))
        kind = metadata.create_summary_metadata(display_name=None, description="log2 of the magnitudes other than 0")
        with self._writer.as_default(snapshot.record.step):
            for each in snapshot:
                tensorflow.summary.write(f"gradients/{each.kind}/{each.name}", _buckets(each), metadata=kind)
            for name, value in _scalars(snapshot).items():
                tensorflow.summary.scalar(f"gradients/{name}", value)
        self._writer.flush()


class _Execution:
    """Keras's function of one execution, of a step or several, with those who watch the batches that go in.

    Args:
        model: What is trained. Not asked of a callback later on: on JAX that takes the variables away from the step
            that is about to use them.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model, self.function = model, model.train_function
        self.watchers: list[GradientRanges] = []
        # Each `fit` calls this first: then a watcher of an earlier one that was interrupted is gone.
        vars(model)["make_train_function"] = self._made_anew
        model.train_function = self

    @classmethod
    def of(cls, model: keras.Model) -> _Execution:
        """Returns the one that stands in for the model's function now; others may be watching already."""
        return model.train_function if isinstance(model.train_function, cls) else cls(model)

    def forget(self, watcher: GradientRanges) -> None:
        """Ends the watching of one; the last one gives the model its own function back."""
        if watcher in self.watchers:
            self.watchers.remove(watcher)
        if not self.watchers and self.model.train_function is self:
            vars(self.model).pop("make_train_function", None)
            self.model.train_function = self.function

    def _made_anew(self, force: bool = False) -> Any:
        self.watchers.clear()
        vars(self.model).pop("make_train_function", None)
        self.model.train_function = self.function
        return self.model.make_train_function(force)

    def __call__(self, *arguments: Any) -> Any:
        *state, batches = arguments  # JAX hands the variables over too
        each = self.model.steps_per_execution
        steps = each if isinstance(each, int) else 1  # "auto": as many as Keras likes
        due = [watcher for watcher in self.watchers if watcher.due]
        taken = list(itertools.islice(batches, steps)) if due else []
        for watcher in due if taken else ():
            watcher.watch(self._local(taken[0]), state[0] if state else None)
        result = self.function(*state, _as_before(taken, batches) if taken else batches)
        for watcher in self.watchers:
            watcher.advance(len(taken) if due else steps)
        return result

    def _local(self, batch: Any) -> Any:
        if keras.backend.backend() != "tensorflow":
            return batch
        return self.model.distribute_strategy.experimental_local_results(batch)[0]


def _as_before(taken: list[Any], batches: Any) -> Any:
    """Returns the batches that were taken as the trainer takes them, so that it traces nothing anew."""
    if keras.backend.backend() == "jax":
        return iter(taken)
    if keras.backend.backend() == "torch":
        return taken
    import tensorflow

    if not isinstance(batches, tensorflow.data.Iterator):
        return taken  # of several replicas
    # Shapes that are not known stay unknown: with others TensorFlow takes other kernels, and rounds otherwise.
    return iter(tensorflow.data.Dataset.from_generator(lambda: taken, output_signature=batches.element_spec))


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
