"""Base class of callbacks that measure gradients during training, on batches that `fit` trains on."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import keras

from tfmixed._core import replica_sync
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._probe.train_step_probe import StepProbe
from tfmixed.callbacks import run_log
from tfmixed.records import Record, log_file
from tfmixed.scaling import validation


class MeasuringCallback(keras.callbacks.Callback):
    """Measures the gradients of the next batch every `every` steps, and trains on that batch afterwards.

    Args:
        path: A file of JSON lines. None writes no file.
        every: The number of attempted steps from one snapshot to the next; the first is that of the first step.
        verbose: 1 prints a summary of each snapshot, and 0 prints nothing.

    Raises:
        ValueError: If an argument is out of range.
        NotImplementedError: If `fit` runs on several workers, since all of them would have to stop.
    """

    kind: type[Record]

    def __init__(self, path: str | os.PathLike[str] | None, every: int, verbose: int) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self.every = validation.count("every", every, 1)
        self.verbose = validation.count("verbose", verbose, 0)
        self._train_function: _ObservedTrainFunction | None = None
        self._probe: Any = None
        self._epoch = 0
        self._step = 0
        self._due = 0
        self._begun = False

    def _new_probe(self) -> StepProbe:
        raise NotImplementedError

    def _snapshot(self) -> tuple[Record, str]:
        """Returns the record of the last measurement, and its summary."""
        raise NotImplementedError

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model = self.model
        if replica_sync.is_multi_worker(model):
            raise NotImplementedError(
                f"{type(self).__name__} measures in one process, not on several workers. Call `measure_gradients` or "
                "`gradient_fidelity` on one worker before or after `fit`."
            )
        self._probe = self._new_probe()
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
                self.path, _ = run_log.begin(self.path, self._step, (self.kind,), scaler=scaler)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._train_function is not None:
            self._train_function.remove(self)
        log_file.release(self.path)

    def _measure(self, batch: Any, state: Any) -> None:
        self._probe.measure(batch, state)
        self._due = self._step + self.every
        record, summary = self._snapshot()
        log_file.append(self.path, [record])
        if self.verbose:
            print(f"step {self._step}: {summary}")


class _ObservedTrainFunction:
    """Stands in for `train_function` of a model, and passes the batches that are due to callbacks first.

    Args:
        model: The model. A callback cannot be asked for it during a step: on JAX, reading `callback.model` takes the
            variables away from the step.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model, self.original = model, model.train_function
        self.callbacks: list[MeasuringCallback] = []
        # Every `fit` calls this first, so callbacks of an interrupted `fit` are dropped.
        vars(model)["make_train_function"] = self._make_train_function
        model.train_function = self

    @classmethod
    def of(cls, model: keras.Model) -> _ObservedTrainFunction:
        """Returns the current one of a model, or a new one."""
        return model.train_function if isinstance(model.train_function, cls) else cls(model)

    def remove(self, callback: MeasuringCallback) -> None:
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
