"""Patches of `keras.Model`: a loss-scaled optimizer, float32 islands and a log."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras

from tfmixed._cli.run.default_policy import DefaultPolicy
from tfmixed._cli.run.messages import place, refuse, say
from tfmixed._cli.run.options import RunOptions
from tfmixed._cli.run.run_summary import RunSummary
from tfmixed._cli.run.training_steps import RunOptimizer, ScaledModels, TrainFunction
from tfmixed._core import optimizer_precision, replica_sync
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._core.low_precision_optimizer import LowPrecisionOptimizer
from tfmixed._islands import layer_rewrite
from tfmixed._utils import layer_tree
from tfmixed._utils.patching import around
from tfmixed.callbacks import LossScaleLogger
from tfmixed.formats import HALF
from tfmixed.islands import force_float32

_Method = Callable[..., Any]


class KerasPatches:
    """Patches of `compile`, `make_train_function` and `fit`, and of `Optimizer.build`.

    Args:
        options: Options of the run.
        policy: The default policy.
        summary: Summary of the run.
        models: Models whose optimizer is a `RunOptimizer`.
    """

    def __init__(self, options: RunOptions, policy: DefaultPolicy, summary: RunSummary, models: ScaledModels) -> None:
        self.options, self.policy, self.summary, self.models = options, policy, summary, models
        self._unscaled: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers compiled with auto_scale_loss=False
        self._planned: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose islands have been decided
        self._with_islands: weakref.WeakSet[Any] = weakref.WeakSet()

    def install(self) -> None:
        """Patches the methods of `keras.Model`, and `build` of its optimizers."""
        around(keras.Model, "compile", self._compile)
        around(keras.Model, "make_train_function", self._make_train_function)
        around(keras.Model, "fit", self._fit)
        around(keras.optimizers.Optimizer, "build", _build)

    def without_islands(self, model: Any) -> AbstractContextManager[None]:
        """Removes the islands from a model while it is saved: a file must not need tfmixed."""
        return layer_rewrite.without_rewrites(model) if model in self._with_islands else contextlib.nullcontext()

    def _compile(self, original: _Method, model: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(original, model, *args, **kwargs)
        optimizer = None if bound is None else _resolve(bound.arguments.get("optimizer", "rmsprop"))
        if bound is None or optimizer is None:
            return original(model, *args, **kwargs)
        if not bound.arguments.get("auto_scale_loss", True) and self._rule(model) is not None:
            self._unscaled.add(optimizer)
            say(f"{place()} compiles with auto_scale_loss=False, so the loss is not scaled")
        # Keras saves the optimizer that `compile` receives. It is the script's own, so files do not need tfmixed.
        bound.arguments |= {"optimizer": optimizer, "auto_scale_loss": False}
        previous = getattr(model, "optimizer", None)  # its scaler must live until `_assign_scaler` finds it
        result = original(*bound.args, **bound.kwargs)
        self.models.compiled.add(optimizer)
        self.policy.report_overrides(model)
        if self.options.low_precision:
            model.optimizer = optimizer = self._wrapped(optimizer)
        self._assign_scaler(model, optimizer)
        del previous
        return result

    def _wrapped(self, optimizer: Any) -> Any:
        """Returns an optimizer in a `LowPrecisionOptimizer`, if that is possible."""
        if isinstance(optimizer, LowPrecisionOptimizer):
            return optimizer
        try:
            return LowPrecisionOptimizer(optimizer, **self.options.low_precision)
        except (TypeError, ValueError) as error:
            say(f"{place()} keeps its optimizer, so --weights has no effect: {error}")
            return optimizer

    def _assign_scaler(self, model: Any, optimizer: Any) -> None:
        """Gives a model a scaling optimizer if its loss is to be scaled and the script does not scale it."""
        rule = self._rule(model)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            if not isinstance(optimizer, RunOptimizer) and optimizer not in self._unscaled:
                self._unscaled.add(optimizer)
                is_own = isinstance(optimizer, LossScaleOptimizer)
                kept = "tfmixed, which is kept" if is_own else "Keras, which is kept without a log"
                say(f"{place()} compiles with the LossScaleOptimizer of {kept}")
        elif rule is not None and optimizer not in self._unscaled:
            self.models.scale(model, optimizer, rule)

    def _rule(self, model: Any) -> Any:
        return self.options.rule_for(_compute_dtype(model))

    def _make_train_function(self, original: _Method, model: Any, force: bool = False) -> None:
        self.summary.has_trained = True
        self._update_scaler(model)
        if isinstance(model.optimizer, LossScaleOptimizer):
            self.summary.begin(model.optimizer)
        if self.options.islands and model.built and model not in self._planned:
            self._planned.add(model)
            self._make_islands(model)
        original(model, force)
        if keras.backend.backend() == "tensorflow" and not isinstance(model.train_function, TrainFunction):
            model.train_function = TrainFunction(model)

    def _update_scaler(self, model: Any) -> None:
        """Repeats what `compile` did, which may not have known the model's layers."""
        optimizer = model.optimizer
        if optimizer is None:
            return
        self._assign_scaler(model, optimizer)
        if model.optimizer is not optimizer:
            model.train_function = None
            if optimizer.built:
                model.optimizer.build(model.trainable_variables)

    def _make_islands(self, model: Any) -> None:
        if not any(layer.compute_dtype in HALF for layer in model._flatten_layers()):
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                forced = force_float32(model)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                refuse(f"float32 islands in the model {model.name!r} failed ({reason}). --no-islands leaves them out")
        for warning in caught:
            say(str(warning.message))
        self.summary.islands += len(forced)
        if forced:
            self._with_islands.add(model)

    def _fit(self, original: _Method, model: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bind(original, model, *args, **kwargs)
        if bound is None or not model.compiled:
            return original(model, *args, **kwargs)
        callbacks = bound.arguments.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callback = self._callback(model, callbacks.callbacks)
            callback.set_model(model)
            callbacks.append(callback)
        else:
            callback = self._callback(model, callbacks)
            bound.arguments["callbacks"] = [*keras.tree.flatten(callbacks or []), callback]
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            callback.close()
            if model.optimizer is not None:
                self.summary.end(model.optimizer)

    def _callback(self, model: Any, callbacks: Any) -> FitCallback:
        self._update_scaler(model)
        is_logged = any(isinstance(callback, LossScaleLogger) for callback in keras.tree.flatten(callbacks or []))
        logs_scale = isinstance(model.optimizer, LossScaleOptimizer) and not is_logged
        needs_islands = self.options.islands and not model.built
        # Keras takes the new islands into its training function when it is made again.
        return FitCallback(
            self.summary, logs_scale, (lambda model: model.make_train_function()) if needs_islands else None
        )


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


def _build(original: _Method, optimizer: Any, variables: Any) -> Any:
    """Reports constants that half-precision variables round away, before the first step of any optimizer."""
    result = original(optimizer, variables)
    optimizer_precision.report(optimizer, variables, lambda message: say(f"{place()} trains, but {message}"))
    return result


def _bind(function: _Method, *args: Any, **kwargs: Any) -> inspect.BoundArguments | None:
    """Returns the arguments by name, or None if they do not fit, which `function` itself reports."""
    try:
        return inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return None


def _resolve(optimizer: Any) -> Any:
    """Returns the optimizer that `compile` makes of its argument, or None if Keras refuses it."""
    try:
        return keras.optimizers.get(optimizer)
    except (ValueError, TypeError):
        return None


def _compute_dtype(model: Any) -> str:
    """Returns float16 if a layer of the model computes in it, else the dtype of one of its layers."""
    layers = [layer for layer in model._flatten_layers() if not isinstance(layer, keras.layers.InputLayer)]
    # Graphs are left out: a model that was loaded keeps the dtypes of its layers, whatever its own policy is.
    dtypes = {layer.compute_dtype for layer in layers if layer_tree.graph_of(layer) is None} or {model.compute_dtype}
    return "float16" if "float16" in dtypes else str(min(dtypes))
