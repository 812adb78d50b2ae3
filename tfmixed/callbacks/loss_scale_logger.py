"""The callback that logs the loss scale."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

import keras

from tfmixed._core import replica_sync
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import user_warnings
from tfmixed.callbacks.gradient_ranges import checked_tensorboard
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import Change, Record, ScaleChange, run_log
from tfmixed.scaling import validation


class LossScaleLogger(keras.callbacks.Callback):
    """Logs every change of the loss scale with its exact step, and puts the scale beside the metrics.

    `logs` gains `loss_scale`, `skipped_steps` and `gradient_norm`, so that the progress bar, `History`, `CSVLogger` and
    `TensorBoard` show them: list this callback before those. The changes are written on the device in the step that
    makes them; this callback collects them at the end of each epoch, so that watching costs no synchronization. In the
    `logs` of a batch TensorFlow has tensors; where Keras runs callbacks beside the training, they may be those of a
    later step. JAX has them there at the steps of `every` alone: a look at the optimizer makes Keras move all variables
    between trainer and model. A skipped step that leaves the scale as it is (a constant one, one with hysteresis left
    or at its floor) counts in `skipped_steps` and is no line of the log. Each of several loggers of one optimizer logs
    every change, from the `fit` on in which it starts.

    Args:
        path: File of JSON lines: one a change, one at the begin of a run that says what runs where, one at the end of
            each epoch (`records.read_log` reads them). Lines from a run that is repeated, because the optimizer stands
            before them, are replaced; others are kept. While another running training or loop writes that file, or if
            nothing shows that a restored run wrote the lines that it would replace, it is a new one with a number
            (`loss_scale-2.jsonl`), with a warning, and `path` is set to it. None writes no file.
        tensorboard: Log directory for TensorBoard: `loss_scale` at the exact step of each change, and all three
            scalars at the end of each epoch. Needs TensorFlow and the package tensorboard. None writes none.
        every: Collect within the epoch too, each `every` steps. Reads the device. A process that is killed loses what
            it had not collected yet.
        verbose: 1 prints one line a change, between the progress bars of the epochs. 0 prints nothing.

    Raises:
        ValueError: `every` or `verbose` is out of range.
        ImportError: `tensorboard` is asked for and not installed.
        LossScaleExhausted: While training, where it collects; see `LossScaleOptimizer.raise_if_exhausted`.

    Of several workers the chief alone writes and prints. With an optimizer that is no `tfmixed.LossScaleOptimizer` it
    warns once and does nothing. It can `watch` a `GradScaler` instead, in `fit` or in a loop that calls its hooks.

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
        # Keras then dispatches batch ends from another thread, without waiting for the device in this one. Not where
        # this callback itself writes optimizer variables, nor where it reads them after each batch.
        self._backend = keras.backend.backend()
        self.async_safe = every is None and self._backend != "torch"
        self._writer: Any = None
        self._running = False
        self._pending: list[Change] = []
        self._epoch = 0
        self._collected_at = 0
        self._watched: ScalerBase | None = None

    def watch(self, scaler: ScalerBase) -> LossScaleLogger:
        """Makes it log a `GradScaler` instead of the model's optimizer, and returns it.

        A loop without `fit` calls `on_train_begin`, `on_epoch_begin(epoch)`, `on_train_batch_end(batch, logs)`,
        `on_epoch_end(epoch, logs)` and `on_train_end`, or has a `keras.callbacks.CallbackList` call them.

        Raises:
            TypeError: It is nothing that can be watched.

        Example:
        >>> logger = LossScaleLogger(verbose=0).watch(tfmixed.GradScaler())
        >>> logger.on_epoch_begin(0)
        >>> logs = {}
        >>> logger.on_epoch_end(0, logs)
        >>> logs["loss_scale"]
        65536.0
        """
        if not isinstance(scaler, ScalerBase):
            raise TypeError(f"scaler must be a tfmixed.GradScaler, received {scaler!r}")
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
        # Asked for each time: on JAX, `self.model` gives the optimizer the values that the step left in the trainer.
        optimizer = self.model.optimizer
        return optimizer if isinstance(optimizer, ScalerBase) else None

    @property
    def _is_chief(self) -> bool:
        return replica_sync.is_chief(self._watched or self.model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._collected_at = epoch, 0
        if not self._running and self._optimizer is not None:
            # Not in on_train_begin: a callback that restores the optimizer there may come after this one.
            self._collect()
            self._running = True
            self._optimizer._begin_run()
        self._print_pending()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        is_due = self.every is not None and batch + 1 - self._collected_at >= self.every
        if (self._backend == "jax" and not is_due) or self._optimizer is None:
            return
        if logs is not None:
            # Tensors: nobody waits for the device but the progress bar, which does so anyway. Elsewhere Keras has
            # waited already, and its progress bar takes numbers only.
            is_tensorflow = self._backend == "tensorflow"
            logs.update(self._optimizer.measured() if is_tensorflow else run_log.numbers(self._optimizer))
        if is_due:
            self._collected_at = batch + 1
            self._collect(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        optimizer = self._optimizer
        if optimizer is None:
            return
        self._collect(logs)
        numbers = run_log.numbers(optimizer)
        if logs is not None:
            logs.update(numbers)
        step = int(optimizer.attempted_steps)
        self._write_scalars(numbers, step)
        if self._is_chief:
            run_log.append(self.path, [run_log.progress(step - 1, epoch, numbers, logs or {})])

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._optimizer is None:
            return
        self._collect(logs)
        self._close()
        if self._watched is not None:  # an optimizer does so itself
            self._watched._end_run()

    def _close(self) -> None:
        self._print_pending()
        run_log.release(self.path)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _collect(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        # What is found before the first epoch happened in an earlier run.
        epoch = self._epoch if self._running else None
        drained = optimizer._drain(self, starts=not self._running)
        changes = [dataclasses.replace(change, epoch=epoch) for change in drained]
        if self._is_chief:
            self._write(changes, optimizer)
        if self._running:
            try:
                optimizer.raise_if_exhausted((logs or {}).get("loss"))
            except LossScaleExhausted:
                self._close()  # nobody else does: `fit` ends here
                raise

    def _write(self, changes: list[Change], optimizer: ScalerBase) -> None:
        if self.path is not None and not self._running:
            step = int(optimizer.attempted_steps)
            kinds = get_args(Record)
            self.path, changes = run_log.begin(self.path, step, kinds, changes, optimizer, loop=self._watched)
        self._pending += changes
        run_log.append(self.path, changes)
        if not self._running:
            run_log.append(self.path, [run_log.describe(getattr(self, "model", None), optimizer)])
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
            for event in self._pending:
                print(event)
        self._pending = []


def _why_not(optimizer: Any) -> str:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return (
            "the optimizer is Keras's own LossScaleOptimizer, with which Keras wraps any other under mixed_float16. "
            "Compile with `tfmixed.LossScaleOptimizer(inner_optimizer)`, or go on from this one with "
            "`tfmixed.LossScaleOptimizer.from_keras(model.optimizer)`."
        )
    return (
        f"the optimizer is a {type(optimizer).__name__}, which does not scale the loss. Wrap it: "
        "`tfmixed.LossScaleOptimizer(optimizer)`."
    )
