"""The callback that `tfmixed run` adds to `fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfmixed._cli.run.messages import say
from tfmixed._cli.run.run_summary import RunSummary
from tfmixed._core import replica_sync
from tfmixed.callbacks import LossScaleLogger


class FitCallback(keras.callbacks.Callback):
    """Logs the loss scale, without changing the script's `logs` or output.

    Args:
        summary: Summary of the run, which names the log.
        logs_scale: Whether the optimizer scales the loss and the script does not log it.
        after_first_batch: Function to call with the model when `fit` has built it in its first batch, or None.
    """

    def __init__(
        self, summary: RunSummary, logs_scale: bool, after_first_batch: Callable[[Any], None] | None = None
    ) -> None:
        super().__init__()
        self._summary, self._logs_scale, self._after_first_batch = summary, logs_scale, after_first_batch
        self._logger: LossScaleLogger | None = None
        # Keras waits for each batch if a callback needs the end of a batch.
        self.async_safe = after_first_batch is None and summary.options.log.every is None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Callbacks of the script may restore the optimizer in `on_train_begin`.
        if self._logs_scale:
            self._logs_scale = False
            self._open_log()
        self._forward("on_epoch_begin", epoch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._after_first_batch is not None:
            function, self._after_first_batch = self._after_first_batch, None
            function(self.model)
        if self._logger is not None and self._logger.every is not None:
            self._forward("on_train_batch_end", batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._forward("on_epoch_end", epoch, dict(logs or {}))
        if self._logger is not None and self.model is not None:  # JAX: gives the optimizer the values of the step
            self._record.update()

    def close(self) -> None:
        """Writes the rest of the log, also after an interrupted `fit`."""
        with contextlib.suppress(Exception):  # an exception of `fit` must not be hidden
            self._forward("on_train_end")

    def _open_log(self) -> None:
        model, settings, folder = self.model, self._summary.options.log, Path(self._summary.options.folder)
        self._record = self._summary.record(model.optimizer)
        self._record.begin(model.optimizer)
        try:
            path = self._summary.log_path(model.optimizer) if replica_sync.is_chief(model) else None
        except OSError as error:
            say(f"no log: {error}")
            return
        tensorboard = folder / "tensorboard" if settings.tensorboard else None
        self._logger = LossScaleLogger(path, tensorboard, settings.every, verbose=0)
        self._logger.set_model(model)
        self._forward("on_train_begin")

    def _forward(self, hook: str, *arguments: Any) -> None:
        if self._logger is None:
            return
        try:
            getattr(self._logger, hook)(*arguments)
            self._record.log = self._logger.path
        except OSError as error:  # such as a full disk, which must not end the training
            say(f"the log ends here: {error}")
            self._logger = None
