"""How a run is looked at: the callback that logs in `fit`, and a look at an optimizer at the end of a loop."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import keras

from tfmixed import runlog
from tfmixed.callbacks import LossScaleLogger
from tfmixed.running.ledger import Ledger
from tfmixed.state import Observable


class Logger(LossScaleLogger):
    """Logs into the run's folder, and leaves the `logs` of the script's own callbacks as they are.

    Args:
        ledger: Gives the log its place when the first epoch begins: until then the script may restore its optimizer.
    """

    def __init__(self, ledger: Ledger) -> None:
        folder, log = ledger.wish.log_dir, ledger.wish.log
        # What it prints would stand in the script's own output.
        super().__init__(tensorboard=folder / "tensorboard" if log.tensorboard else None, every=log.every, verbose=0)
        self._ledger = ledger

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._running and self._is_chief and self._optimizer is not None:
            self.path = self._ledger.log_of(self._optimizer)
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self.every is not None:
            super().on_train_batch_end(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, dict(logs or {}))

    def break_off(self) -> None:
        """Collects what a `fit` that was interrupted leaves."""
        if self._running:
            with contextlib.suppress(Exception):
                self._collect()


class Once(keras.callbacks.Callback):
    """Has a model whose layers `fit` built in its first batch take another look at itself."""

    def __init__(self) -> None:
        super().__init__()
        self._done = False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._done:
            self._done = True
            self.model.make_train_function()


def numbers(optimizer: Any) -> tuple[int, int | None, float | None] | None:
    """Returns steps, skipped ones and the scale, as far as an optimizer or scaler knows them; None: nobody does."""
    try:
        if isinstance(optimizer, Observable):
            if getattr(optimizer, "_scaling", optimizer) is None:  # never used, and not to be made for this
                return None
            steps = int(optimizer.attempted_steps)
            return steps, int(optimizer.skipped_steps), float(optimizer.measured()["loss_scale"])
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and optimizer.built
        scale = float(optimizer.dynamic_scale.numpy()) if scales else None
        return int(optimizer.iterations.numpy()), None, scale
    except (RuntimeError, ValueError):  # JAX has taken the variables of a step that was interrupted
        return None


def write_log(optimizer: Any, path: Path) -> None:
    """Writes the log of what stepped without `fit`, from the changes that the device remembers."""
    changes = optimizer.drain_events()
    begin = runlog.describe(None, optimizer)
    first = dataclasses.replace(begin, step=0, loss_scale=float(optimizer.rule.start().scale))
    last = runlog.progress(begin.step - 1, None, runlog.numbers(optimizer), {})
    runlog.append(path, [first, *changes, last])
