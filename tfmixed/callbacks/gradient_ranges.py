"""Callback that measures gradients during training."""

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
from tfmixed.callbacks import run_log
from tfmixed.records import GradientRange, RangesRecord, log_file
from tfmixed.scaling import validation


class GradientRanges(keras.callbacks.Callback):
    """Measures the gradients of the next batch every `every` steps, like `tfmixed.measure_gradients`.

    The measured batch is trained on afterwards as usual. Measuring takes the time of about three steps, five with a
    half `precision`; other steps are not slowed down. The attribute `last` is the last snapshot, a
    `tfmixed.ranges.GradientRanges`, or None before the first one.

    Args:
        path: A file of JSON lines, one for each snapshot: preferably that of `LossScaleLogger`, so that `tfmixed
            report` finds everything in one log. Snapshots that a restored run repeats are replaced. If the file belongs
            to another run, a new one with a number is used, as by `LossScaleLogger`. Defaults to None, which
            writes no file.
        every: The number of attempted steps from one snapshot to the next; the first is that of the first step.
            Defaults to 1000.
        precision: The same as in `measure_gradients`. Defaults to `"float32"`.
        tensorboard: A TensorBoard log directory, in which the run `gradients` appears. It has a histogram of the log2
            magnitudes of each gradient, and these scalars over all gradients: the largest and smallest magnitude, the
            share that float16 flushes to 0 without a scale, and the largest scale without an overflow. Requires
            TensorFlow and the tensorboard package. Defaults to None.
        verbose: 1 prints a summary of each snapshot, and 0 prints nothing. Defaults to 0.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If `tensorboard` is set and the package is not installed.
        NotImplementedError: If `fit` runs on several workers, since all of them would have to stop.

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
        self._train_function: _ObservedTrainFunction | None = None
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
                "GradientRanges measures in one process, not on several workers. Call `measure_gradients` on one "
                "worker before or after `fit`."
            )
        self._probe = Probe(model, self.precision)
        self._begun = False
        self._train_function = _ObservedTrainFunction.of(model)
        self._train_function.callbacks.append(self)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch
        optimizer = self.model.optimizer
        if isinstance(optimizer, ScalerBase):
            self._step = int(optimizer.attempted_steps)
        else:  # `iterations` also counts the execution in which a dataset of unknown size ended
            steps = int(optimizer.iterations)
            self._step = min(self._step, steps) if self._begun else steps
        if not self._begun:  # not in `on_train_begin`, where a later callback may still restore the optimizer
            self._due = self._step
            self._begun = True
            if self.path is not None:
                scaler = optimizer if isinstance(optimizer, ScalerBase) else None
                self.path, _ = run_log.begin(self.path, self._step, (RangesRecord,), scaler=scaler)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._train_function is not None:
            self._train_function.remove(self)
        log_file.release(self.path)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _measure(self, batch: Any, state: Any) -> None:
        assert self._probe is not None
        self._probe.measure(batch, state)
        self._due = self._step + self.every
        record = self._probe.record(self._step, self._epoch)
        self.last = ranges.GradientRanges(record)
        log_file.append(self.path, [record])
        if self.tensorboard is not None:
            self._write(self.last, self.tensorboard)
        if self.verbose:
            print(f"step {self._step}: {self.last.verdict()}")

    def _write(self, snapshot: ranges.GradientRanges, folder: str | os.PathLike[str]) -> None:
        import tensorflow
        from tensorboard.plugins.histogram import metadata  # type: ignore[import-untyped]  # ships no types

        if self._writer is None:
            # A separate folder, since TensorBoard follows only the newest file of a folder.
            self._writer = tensorflow.summary.create_file_writer(str(Path(folder) / "gradients"))
        kind = metadata.create_summary_metadata(display_name=None, description="log2 of nonzero magnitudes")
        with self._writer.as_default(snapshot.record.step):
            for gradient in snapshot:
                tensorflow.summary.write(
                    f"gradients/{gradient.kind}/{gradient.name}", _buckets(gradient), metadata=kind
                )
            for name, value in _scalars(snapshot).items():
                tensorflow.summary.scalar(f"gradients/{name}", value)
        self._writer.flush()


class _ObservedTrainFunction:
    """Stands in for `train_function` of a model, and passes the batches that are due to callbacks first.

    Args:
        model: The model. A callback cannot be asked for it during a step: on JAX, reading `callback.model` takes the
            variables away from the step.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model, self.original = model, model.train_function
        self.callbacks: list[GradientRanges] = []
        # Every `fit` calls this first, so callbacks of an interrupted `fit` are dropped.
        vars(model)["make_train_function"] = self._make_train_function
        model.train_function = self

    @classmethod
    def of(cls, model: keras.Model) -> _ObservedTrainFunction:
        """Returns the current one of a model, or a new one."""
        return model.train_function if isinstance(model.train_function, cls) else cls(model)

    def remove(self, callback: GradientRanges) -> None:
        if callback in self.callbacks:
            self.callbacks.remove(callback)
        if not self.callbacks and self.model.train_function is self:
            self._restore()

    def _make_train_function(self, force: bool = False) -> Any:
        self.callbacks.clear()
        self._restore()
        return self.model.make_train_function(force)

    def _restore(self) -> None:
        vars(self.model).pop("make_train_function", None)
        self.model.train_function = self.original

    def __call__(self, *args: Any) -> Any:
        *state, batches = args  # JAX passes the variables, too
        steps = self.model.steps_per_execution
        steps = steps if isinstance(steps, int) else 1  # "auto": Keras decides
        due = [callback for callback in self.callbacks if callback._step >= callback._due]
        taken = list(itertools.islice(batches, steps)) if due else []
        for callback in due if taken else ():
            callback._measure(self._local(taken[0]), state[0] if state else None)
        result = self.original(*state, _as_iterator(taken, batches) if taken else batches)
        for callback in self.callbacks:
            callback._step += len(taken) if due else steps
        return result

    def _local(self, batch: Any) -> Any:
        if keras.backend.backend() != "tensorflow":
            return batch
        return self.model.distribute_strategy.experimental_local_results(batch)[0]


def _as_iterator(taken: list[Any], batches: Any) -> Any:
    """Returns batches in the type that the trainer was given, so that it does not retrace."""
    if keras.backend.backend() == "jax":
        return iter(taken)
    if keras.backend.backend() == "torch":
        return taken
    import tensorflow

    if not isinstance(batches, tensorflow.data.Iterator):
        return taken  # of several replicas
    # Unknown shapes stay unknown: with known ones TensorFlow selects other kernels, which round differently.
    return iter(tensorflow.data.Dataset.from_generator(lambda: taken, output_signature=batches.element_spec))


def checked_tensorboard(tensorboard: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """Returns the argument, after a check that TensorBoard is installed.

    Raises:
        ImportError: If the argument is not None and TensorBoard is not installed.
    """
    if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "`tensorboard` requires the package of that name: pip install 'tfmixed[tensorboard]'. "
            f"Received: tensorboard={os.fspath(tensorboard)!r}"
        )
    return tensorboard


def _buckets(gradient: GradientRange) -> Any:
    """Returns left edge, right edge and count of each octave, the format of TensorBoard histograms."""
    import numpy

    rows = [(octave, octave + 1, sum(parts)) for octave, parts in sorted(gradient.octaves.items())]
    return numpy.array(rows, "float64").reshape(-1, 3)


def _scalars(snapshot: ranges.GradientRanges) -> dict[str, float]:
    gradients = [gradient for gradient in snapshot.half if gradient.nonzeros]
    if not gradients:
        return {}
    return {
        "largest": max(gradient.largest for gradient in gradients),
        "smallest": min(gradient.smallest for gradient in gradients),
        "underflow_at_scale_1": snapshot.underflow(),
        "log2_of_largest_scale": math.log2(snapshot.best_scales()[1]),
    }
