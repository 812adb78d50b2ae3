"""Callback that logs the loss scale."""

from __future__ import annotations

import dataclasses
import os
import weakref
from pathlib import Path
from typing import Any, get_args

import keras

from tfmixed._core import replica_sync
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import user_warnings
from tfmixed.callbacks import run_log
from tfmixed.callbacks.deferred_logs import DeferredLogs
from tfmixed.callbacks.gradient_ranges import checked_tensorboard
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import Change, Record, ScaleChange, log_file
from tfmixed.scaling import validation


class LossScaleLogger(keras.callbacks.Callback):
    """Logs every change of the loss scale with its exact step, and adds the scale to the metrics.

    `logs` gains `loss_scale`, `skipped_steps` and `gradient_norm`, so the progress bar, `History`, `CSVLogger` and
    `TensorBoard` show them: list this callback before those. Changes are recorded on the device by the step that makes
    them, and collected at the end of each epoch, so logging needs no synchronization.

    On TensorFlow, the `logs` of a batch contain scalars that are read from the device when another callback uses them,
    or keeps them until the next batch, as the progress bar does. On other backends they are numbers, on JAX only at the
    steps of `every`, since reading the optimizer there makes Keras copy all variables between trainer and model.

    A skipped step that does not change the scale counts in `skipped_steps`, and has no line in the log. Several loggers
    of one optimizer each log every change since the `fit` in which they start. With several workers, only the chief
    writes and prints.

    If the optimizer is not a `tfmixed.LossScaleOptimizer`, the callback warns once and does nothing. To log a
    `GradScaler` instead, see `watch`.

    Args:
        path: A file of JSON lines: a description at the start of a run, one for each change, and one at the end of each
            epoch. `records.read_log` reads them. Lines of steps that a restored run repeats are replaced, others are
            kept. If another run is writing the file, or may have written the lines to replace, a new file with a
            number is used (`loss_scale-2.jsonl`), with a warning, and `path` is set to it. Defaults to None, which
            writes no file.
        tensorboard: A TensorBoard log directory for `loss_scale` at the exact step of each change, and all three
            scalars at the end of each epoch. Requires TensorFlow and the tensorboard package. Defaults to None.
        every: Collect changes every `every` steps within an epoch, too. This reads from the device. If the process is
            killed, changes not yet collected are lost. Defaults to None.
        verbose: 1 prints one line for each change, between the progress bars of the epochs, and 0 prints nothing.
            Defaults to 1.

    Raises:
        ValueError: If `every` or `verbose` is out of range.
        ImportError: If `tensorboard` is set and the package is not installed.
        LossScaleExhausted: During training, if every step is skipped; see `LossScaleOptimizer.raise_if_exhausted`.

    Example:
    >>> logger = LossScaleLogger("runs/mine/loss_scale.jsonl")
    >>> # model.fit(x, y, callbacks=[logger])
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        every: int | None = None,
        verbose: int = 1,
    ) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.tensorboard = checked_tensorboard(tensorboard)
        self.every = None if every is None else validation.count("every", every, 1)
        self.verbose = validation.count("verbose", verbose, 0)
        # Lets Keras call this callback from another thread, without waiting for the device. Not if the callback
        # itself writes optimizer variables, and not where each step waits for the device anyway.
        self._backend = keras.backend.backend()
        self.async_safe = every is None and self._backend != "torch"
        self._deferred: weakref.ref[DeferredLogs] | None = None
        self._writer: Any = None
        self._running = False
        self._pending: list[Change] = []
        self._epoch = 0
        self._collected_at = 0
        self._watched: ScalerBase | None = None

    def watch(self, scaler: ScalerBase) -> LossScaleLogger:
        """Logs a `GradScaler` instead of the optimizer of the model, and returns the callback.

        A custom training loop calls `on_train_begin`, `on_epoch_begin(epoch)`, `on_train_batch_end(batch, logs)`,
        `on_epoch_end(epoch, logs)` and `on_train_end`, itself or by a `keras.callbacks.CallbackList`.

        Args:
            scaler: The `tfmixed.GradScaler`.

        Raises:
            TypeError: If `scaler` does not scale losses.

        Example:
        >>> logger = LossScaleLogger(verbose=0).watch(tfmixed.GradScaler())
        >>> logger.on_epoch_begin(0)
        >>> logs = {}
        >>> logger.on_epoch_end(0, logs)
        >>> logs["loss_scale"]
        65536.0
        """
        if not isinstance(scaler, ScalerBase):
            raise TypeError(f"`scaler` must be a tfmixed.GradScaler. Received: scaler={scaler!r}")
        self._watched = scaler
        return self

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = self._optimizer
        if optimizer is None:
            user_warnings.warn(f"LossScaleLogger logs nothing: {_why_not(self.model.optimizer)}")
            return
        self._running = False
        if self.tensorboard is not None and self._is_chief:
            import tensorflow

            self._writer = tensorflow.summary.create_file_writer(os.fspath(self.tensorboard))

    @property
    def _optimizer(self) -> ScalerBase | None:
        if self._watched is not None:
            return self._watched
        # Read every time: on JAX, `self.model` updates the optimizer with the values of the trainer.
        optimizer = self.model.optimizer
        return optimizer if isinstance(optimizer, ScalerBase) else None

    @property
    def _is_chief(self) -> bool:
        return replica_sync.is_chief(self._watched or self.model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._collected_at = epoch, 0
        if not self._running and self._optimizer is not None:
            # Not in `on_train_begin`, where a later callback may still restore the optimizer.
            self._collect()
            self._running = True
            self._optimizer._begin_run()
        self._print_pending()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._read_kept()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        is_due = self.every is not None and batch + 1 - self._collected_at >= self.every
        if self._backend == "jax" and not is_due:
            return
        optimizer = self._optimizer
        if optimizer is None:
            return
        if logs is not None and self._backend != "tensorflow":
            logs.update(run_log.measurements(optimizer))
        elif logs is not None and self._watched is not None:  # a custom loop need not tell when its next step begins
            logs.update(optimizer.measured())
        elif logs is not None:
            deferred = DeferredLogs(optimizer)
            logs.update(deferred.scalars())
            self._deferred = weakref.ref(deferred)
        if is_due:
            self._collected_at = batch + 1
            self._collect(logs)

    def _read_kept(self) -> None:
        """Reads the last batch's logs before the next step, if a callback kept them."""
        deferred = None if self._deferred is None else self._deferred()
        self._deferred = None
        if deferred is not None:
            deferred.read()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        optimizer = self._optimizer
        if optimizer is None:
            return
        self._read_kept()
        self._collect(logs)
        numbers = run_log.measurements(optimizer)
        if logs is not None:
            logs.update(numbers)
        step = int(optimizer.attempted_steps)
        self._write_scalars(numbers, step)
        if self._is_chief:
            log_file.append(self.path, [run_log.progress(step - 1, epoch, numbers, logs or {})])

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._optimizer is None:
            return
        self._collect(logs)
        self._close()
        if self._watched is not None:  # an optimizer ends its run itself
            self._watched._end_run()

    def _close(self) -> None:
        self._print_pending()
        log_file.release(self.path)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _collect(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        # Changes found before the first epoch belong to an earlier run.
        epoch = self._epoch if self._running else None
        drained = optimizer._drain(self, starts=not self._running)
        changes = [dataclasses.replace(change, epoch=epoch) for change in drained]
        if self._is_chief:
            self._write(changes, optimizer)
        if self._running:
            try:
                optimizer.raise_if_exhausted((logs or {}).get("loss"))
            except LossScaleExhausted:
                self._close()  # `fit` ends here, without `on_train_end`
                raise

    def _write(self, changes: list[Change], optimizer: ScalerBase) -> None:
        if self.path is not None and not self._running:
            step = int(optimizer.attempted_steps)
            kinds = get_args(Record)
            self.path, changes = run_log.begin(self.path, step, kinds, changes, optimizer, loop=self._watched)
        self._pending += changes
        log_file.append(self.path, changes)
        if self.path is not None and not self._running:
            log_file.append(self.path, [run_log.describe(getattr(self, "model", None), optimizer)])
        for change in changes:
            if isinstance(change, ScaleChange):
                self._write_scalars({"loss_scale": change.new_scale}, change.step)

    def _write_scalars(self, numbers: dict[str, float], step: int) -> None:
        if self._writer is None:
            return
        import tensorflow

        with self._writer.as_default():
            for name, number in numbers.items():
                tensorflow.summary.scalar(name, number, step=step)

    def _print_pending(self) -> None:
        if self.verbose:
            for change in self._pending:
                print(change)
        self._pending = []


def _why_not(optimizer: Any) -> str:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return (
            "the optimizer is the LossScaleOptimizer of Keras, with which Keras wraps optimizers under mixed_float16. "
            "Compile with `tfmixed.LossScaleOptimizer(inner_optimizer)`, or convert this one with "
            "`tfmixed.LossScaleOptimizer.from_keras(model.optimizer)`."
        )
    return (
        f"the optimizer, {type(optimizer).__name__}, does not scale the loss. Wrap it: "
        "`tfmixed.LossScaleOptimizer(optimizer)`."
    )
