"""What is applied to models as the script compiles and fits them: a scaling optimizer, float32 islands, a log."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tfmixed._cli.run.ledger import Ledger
from tfmixed._cli.run.observing import Logger, Once, with_data
from tfmixed._cli.run.saying import place, refuse, say
from tfmixed._cli.run.wishes import Wish
from tfmixed._cli.run.wrapping import around, bound
from tfmixed._core import replica_sync
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._islands import layer_rewrite
from tfmixed._utils import layer_tree
from tfmixed.callbacks import LossScaleLogger
from tfmixed.formats import HALF
from tfmixed.islands import force_float32
from tfmixed.scaling import ScalingRule

_Plain = Callable[..., Any]


class Training:
    """Stands around `compile`, `fit` and what makes the training function of Keras's models.

    Args:
        wish: What the command line asks for.
        ledger: Where optimizers and logs are noted.
    """

    def __init__(self, wish: Wish, ledger: Ledger) -> None:
        self.wish, self.ledger = wish, ledger
        self.running: list[Any] = []  # models within `fit` or `train_on_batch`, the innermost last
        self.models: weakref.WeakSet[Any] = weakref.WeakSet()  # whose optimizers scale because of us
        self.left_alone: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that the script wants as they are
        self._with_islands: weakref.WeakSet[Any] = weakref.WeakSet()
        self._counting: weakref.WeakSet[Any] = weakref.WeakSet()  # training functions
        self._looked_at: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scalers: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Stands around the methods of `keras.Model`."""
        around(keras.Model, "compile", self._compile)
        around(keras.Model, "make_train_function", self._make_train_function)
        around(keras.Model, "fit", self._fit)
        around(keras.Model, "train_on_batch", self._train_on_batch)
        for kind in (keras.optimizers.LossScaleOptimizer, LossScaleOptimizer):
            around(kind, "build", self._build, traced=True)

    def _compile(self, plain: _Plain, model: Any, *arguments: Any, **named: Any) -> Any:
        given = bound(plain, model, *arguments, **named)
        optimizer = None if given is None else _resolved(given.arguments.get("optimizer", "rmsprop"))
        if given is None or optimizer is None:
            return plain(model, *arguments, **named)
        if not given.arguments.get("auto_scale_loss", True) and self._rule(model) is not None:
            self.left_alone.add(optimizer)
            say(f"{place()} compiles with auto_scale_loss=False: its loss is not scaled, as the script says")
        # What Keras compiles with, it saves: the script's own, so that a file needs nothing of ours.
        given.arguments |= {"optimizer": optimizer, "auto_scale_loss": False}
        # Held meanwhile: compiled again with the same optimizer, a model keeps its scaler.
        before = getattr(model, "optimizer", None)
        result = plain(*given.args, **given.kwargs)
        self._give(model, optimizer)
        del before
        return result

    def _build(self, plain: _Plain, optimizer: Any, *arguments: Any, **named: Any) -> None:
        plain(optimizer, *arguments, **named)
        self.ledger.keep(optimizer)

    def _give(self, model: Any, optimizer: Any) -> None:
        """Gives a model what scales for an optimizer of the script, if there is something to scale."""
        scaler = self._scaler_of(model, optimizer)
        if scaler is not model.optimizer:
            # Not by Keras's own `__setattr__`: TensorFlow's would list it among what a checkpoint holds.
            object.__setattr__(model, "optimizer", scaler)

    def _scaler_of(self, model: Any, optimizer: Any) -> Any:
        rule = self._rule(model)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            self._keep(optimizer)
        elif rule is not None and optimizer not in self.left_alone:
            scaler = self._scalers.get(optimizer, lambda: None)() or LossScaleOptimizer(optimizer, rule)
            self._scalers[optimizer] = weakref.ref(scaler)
            scaler._calls.warn = _refuse_calls
            self.models.add(model)
            return scaler
        return optimizer

    def _rule(self, model: Any) -> ScalingRule | None:
        return self.wish.rule(_compute_dtype(model))

    def is_ours(self, optimizer: Any) -> bool:
        """Returns whether an optimizer scales because of us, and its script does not know."""
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        return scales and self._scalers.get(optimizer.inner_optimizer, lambda: None)() is optimizer

    def _keep(self, optimizer: Any) -> None:
        """Leaves an optimizer that scales already, and says so unless it is ours."""
        if not self.is_ours(optimizer) and optimizer not in self.left_alone:
            self.left_alone.add(optimizer)
            whose = "" if isinstance(optimizer, LossScaleOptimizer) else ", Keras's own, which cannot be logged"
            say(f"{place()} compiles with a LossScaleOptimizer{whose}: the script's own stays")

    def _prepare(self, model: Any) -> None:
        """Does what could not be done in `compile`: a model may have made its float16 layers later."""
        before = model.optimizer
        if before is None:
            return
        self._give(model, before)
        if model.optimizer is not before:
            model.train_function = None
            if before.built:
                model.optimizer.build(model.trainable_variables)
        self.ledger.keep(model.optimizer)

    def _make_train_function(self, plain: _Plain, model: Any, force: bool = False) -> None:
        self._prepare(model)
        if self.wish.islands and model.built and model not in self._looked_at:
            self._looked_at.add(model)
            self._make_islands(model)
        plain(model, force)
        if keras.backend.backend() == "tensorflow" and model.train_function not in self._counting:
            model.train_function = with_data(model.train_function, self.ledger)
            self._counting.add(model.train_function)

    def _make_islands(self, model: Any) -> None:
        if not any(layer.compute_dtype in HALF for layer in model._flatten_layers()):
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made = force_float32(model)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                refuse(f"float32 islands in the model {model.name!r} failed ({why}); --no-islands leaves them out")
        for each in caught:
            say(str(each.message))
        self.ledger.islands += len(made)
        if made:
            self._with_islands.add(model)

    def save(self, plain: _Plain, model: Any, *arguments: Any, **named: Any) -> Any:
        """Saves a model as its script made it: without our islands."""
        with layer_rewrite.without_rewrites(model) if model in self._with_islands else contextlib.nullcontext():
            return plain(model, *arguments, **named)

    def _fit(self, plain: _Plain, model: Any, *arguments: Any, **named: Any) -> Any:
        given = bound(plain, model, *arguments, **named)
        if given is None or not model.compiled:
            return plain(model, *arguments, **named)
        self._prepare(model)
        self._begin(model)
        callbacks = given.arguments.get("callbacks")
        ours = self._callbacks(model, callbacks)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            for each in ours:
                each.set_model(model)
                callbacks.append(each)
        elif ours:
            given.arguments["callbacks"] = [*keras.tree.flatten(callbacks or []), *ours]
        try:
            with self._noted(model):
                return plain(*given.args, **given.kwargs)
        finally:
            for each in ours:
                if isinstance(each, Logger):
                    each.break_off()
            if model.optimizer is not None:
                self.ledger.note(model.optimizer)

    def _callbacks(self, model: Any, callbacks: Any) -> list[keras.callbacks.Callback]:
        """Returns what is to be called besides the script's own callbacks."""
        listed = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
        theirs = [each for each in keras.tree.flatten(listed or []) if isinstance(each, LossScaleLogger)]
        later = [Once()] if self.wish.islands and not model.built else []
        if not isinstance(model.optimizer, LossScaleOptimizer):
            return later
        if theirs:
            entry = self.ledger.entry(model.optimizer)
            entry.log, entry.is_ours = theirs[0].path, isinstance(theirs[0], Logger)
            return later
        # Of several workers one writes for all.
        self.ledger.entry(model.optimizer).is_ours = replica_sync.is_chief(model)
        return [*later, Logger(self.ledger)]

    def _train_on_batch(self, plain: _Plain, model: Any, *arguments: Any, **named: Any) -> Any:
        self._begin(model)
        with self._noted(model):
            return plain(model, *arguments, **named)

    def _begin(self, model: Any) -> None:
        if getattr(model, "optimizer", None) is not None:
            self.ledger.begin(model.optimizer)

    def load(self, plain: _Plain, *arguments: Any, **named: Any) -> Any:
        """Loads a model or its weights: steps that come with them are none of this run's."""
        for optimizer in _optimizers_of(*arguments, *named.values()):
            self.ledger.note(optimizer)
        result = plain(*arguments, **named)
        for optimizer in _optimizers_of(*arguments, *named.values(), result):
            self.ledger.restored(optimizer)
        return result

    @contextlib.contextmanager
    def _noted(self, model: Any) -> Iterator[None]:
        self.running.append(model)
        try:
            yield
        finally:
            self.running.pop()


def _resolved(optimizer: Any) -> Any:
    """Returns what Keras takes `compile`'s argument for; None where that is for Keras to refuse."""
    try:
        return keras.optimizers.get(optimizer)
    except (ValueError, TypeError):
        return None


def _optimizers_of(*values: Any) -> Iterator[Any]:
    """Yields the optimizers of the models among these."""
    for each in values:
        if isinstance(each, keras.Model) and each.optimizer is not None:
            yield each.optimizer


def _compute_dtype(model: Any) -> str:
    """Returns float16 where a model has a layer that computes in it, else the dtype of one of its layers."""
    own = [layer for layer in model._flatten_layers() if not isinstance(layer, keras.layers.InputLayer)]
    # Of a graph only its layers compute: a model that is loaded holds those of its file, under whatever policy it is.
    dtypes = {layer.compute_dtype for layer in own if layer_tree.graph_of(layer) is None} or {model.compute_dtype}
    return "float16" if "float16" in dtypes else str(min(dtypes))


def _refuse_calls(advice: str) -> None:
    refuse(
        f"{place()}: {advice} The optimizer that scales was put into this model for its float16 layers; "
        "--policy mixed_bfloat16 needs none"
    )
