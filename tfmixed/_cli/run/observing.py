"""How a run is looked at: the callback that logs in `fit`, and a look at an optimizer at the end of a loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras

from tfmixed._cli.run.ledger import Entry, Ledger
from tfmixed._cli.run.saying import say
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._core.scaler_state import ScalerState
from tfmixed.callbacks import LossScaleLogger
from tfmixed.records import run_log


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
        self._is_full = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        with self._unless_full():
            super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        with self._unless_full():
            if not self._running and self._is_chief and self._optimizer is not None and not self._is_full:
                self.path = self._ledger.log_of(self._optimizer)
            super().on_epoch_begin(epoch, logs)
            if self._optimizer is not None and self.path is not None:
                self._ledger.entry(self._optimizer).log = self.path

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self.every is not None:
            with self._unless_full():
                super().on_train_batch_end(batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        with self._unless_full():
            super().on_epoch_end(epoch, dict(logs or {}))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        with self._unless_full():
            super().on_train_end(logs)

    @contextlib.contextmanager
    def _unless_full(self) -> Iterator[None]:
        """Ends the log, and not the script, where nothing more can be written."""
        try:
            yield
        except OSError as error:
            say(f"the log ends here: {error}")
            self._is_full = True
            with contextlib.suppress(OSError):
                run_log.release(self.path)
            self.path = self.tensorboard = self._writer = None

    def break_off(self) -> None:
        """Collects what a `fit` that was interrupted leaves."""
        if self._running:
            with contextlib.suppress(Exception):
                self._collect()
            with contextlib.suppress(OSError):
                run_log.release(self.path)


class Once(keras.callbacks.Callback):
    """Has a model whose layers `fit` built in its first batch take another look at itself."""

    def __init__(self) -> None:
        super().__init__()
        self._done = False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._done:
            self._done = True
            self.model.make_train_function()


class Remains(ScalerBase):
    """What an optimizer that scales knows of its steps, without its weights: it outlives the optimizer.

    Args:
        optimizer: One that is built.
    """

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        self.rule, self.max_consecutive_skips = optimizer.rule, optimizer.max_consecutive_skips
        self._scaling, self._paths = optimizer._state(), optimizer._paths
        self.kind = type(optimizer.inner_optimizer).__name__

    def _state(self) -> ScalerState:
        return self._scaling


class Count:
    """The step count of an optimizer of Keras, and its scale if it has one: they outlive the optimizer.

    Args:
        optimizer: Not one of ours.
    """

    def __init__(self, optimizer: Any) -> None:
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self.iterations = optimizer.iterations
        if not isinstance(self.iterations, keras.Variable):  # gradients are accumulated: several batches count once
            self.iterations = (optimizer.inner_optimizer if scales else optimizer)._iterations
        self.scale = optimizer.dynamic_scale if scales and optimizer.built else None


def with_data(function: Callable[[Any], Any], ledger: Ledger) -> Callable[[Any], Any]:
    """Returns a training function of TensorFlow's trainer that does not count a step when its data has ended.

    In the call that finds the end of a dataset of unknown size, TensorFlow runs what does not depend on data. An
    optimizer that does not check gradients then advances its `iterations`.
    """
    import tensorflow

    @functools.wraps(function)
    def counted(iterator: Any) -> Any:
        before = ledger.counts()
        try:
            return function(iterator)
        except (StopIteration, tensorflow.errors.OutOfRangeError):
            ledger.discount(before)
            raise

    return counted


def remains(optimizer: Any) -> Any:
    """Returns what numbers and log can be read from when a script has dropped an optimizer; None while there is none.

    Small: a script that trains many models does not keep them all.
    """
    if isinstance(optimizer, LossScaleOptimizer):
        return Remains(optimizer) if optimizer.built else None
    return optimizer if isinstance(optimizer, ScalerBase) else Count(optimizer)


def numbers(known: Any) -> tuple[int, int | None, float | None] | None:
    """Returns steps, skipped ones and the scale, as far as what `remains` returned knows them; None: nobody does."""
    if known is None:
        return None
    if isinstance(known, ScalerBase):
        if getattr(known, "_scaling", known) is None:  # never used, and not to be made for this
            return None
        return int(known.attempted_steps), int(known.skipped_steps), float(known.measured()["loss_scale"])
    scale = None if known.scale is None else float(known.scale.numpy())
    return int(known.iterations.numpy()), None, scale


def skips(entry: Entry) -> str | None:
    """Returns a warning if most steps of an optimizer or scaler in this run were skipped; None otherwise."""
    if not isinstance(entry.source, ScalerBase) or entry.skipped is None:
        return None
    steps, skipped, _ = entry.before or (0, 0, None)
    try:
        return entry.source._skip_warning(steps, skipped)
    except (RuntimeError, ValueError):  # as in `numbers`
        return None


def write_log(known: Any, path: Path, step: int, scale: float | None) -> None:
    """Writes the log of what stepped without `fit`, from the changes that the device remembers.

    Args:
        known: What `remains` returned.
        path: The log.
        step: The first step.
        scale: The scale then; None: the rule's first.
    """
    # The whole ring, of which the script may have drained some.
    changes = [each for each in known._buffered_events() if each.step >= step]
    begin = run_log.describe(None, known)
    run_log.continue_at(path, step, ())  # a last line that was not written to its end goes
    start = float(known.rule.start().scale) if scale is None else scale
    kind = getattr(known, "kind", begin.optimizer)
    first = dataclasses.replace(begin, step=step, loss_scale=start, optimizer=kind)
    last = run_log.progress(begin.step - 1, None, run_log.numbers(known), {})
    run_log.append(path, [first, *changes, last])
