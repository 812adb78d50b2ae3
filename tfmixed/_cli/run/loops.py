"""Training steps that a script writes itself: scaled where that can be done, refused where they would not be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import keras
import wrapt

from tfmixed._cli.run.policies import Policies
from tfmixed._cli.run.saying import caller, is_within, place, refuse, say
from tfmixed._cli.run.training import Training
from tfmixed._cli.run.wrapping import around
from tfmixed._utils import layer_tree
from tfmixed.formats import HALF

_Plain = Callable[..., Any]
_ADVICE = (
    "under float16 its gradients would be those of a loss that nobody scales. --policy mixed_bfloat16 needs no loss "
    "scale; or scale it in the script, with tfmixed.LossScaleOptimizer or tfmixed.GradScaler"
)
_MIXED = (
    "one apply cannot tell them apart. Scale every loss of the step with scale_loss, and pass what it returns to "
    "tape.gradient, or none"
)


class Loops:
    """Stands around optimizers and tapes.

    A step that a model's `train_step` takes with a tape, for an optimizer that became a scaling one in `compile`, is
    scaled there: the tape starts from the scale instead of from 1, and returns gradients that are unscaled again.

    Args:
        policies: Know the layers that compute in float16.
        training: Knows the optimizers that are ours.
    """

    def __init__(self, policies: Policies, training: Training) -> None:
        self.policies, self.training = policies, training
        self._judged: weakref.WeakSet[Any] = weakref.WeakSet()
        self._by_script: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._scaled_by_script = False
        self._said = False

    def install(self) -> None:
        """Stands around the methods of Keras's optimizers, of `tf.GradientTape` and of PyTorch's optimizers."""
        around(keras.layers.Layer, "__init__", self._layer)
        around(keras.optimizers.LossScaleOptimizer, "__init__", self._scaler)
        for name in ("Optimizer", "MultiOptimizer"):
            if hasattr(keras.optimizers, name):  # the second from Keras 3.15 on
                around(getattr(keras.optimizers, name), "apply", self._apply, traced=True)
        wrapt.when_imported("tfmixed.grad_scaler")(
            lambda module: around(module.GradScaler, "__init__", self._grad_scaler)
        )
        if keras.backend.backend() == "tensorflow":
            import tensorflow

            around(tensorflow.GradientTape, "gradient", self._gradient, traced=True)
        elif keras.backend.backend() == "torch":
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            register_optimizer_step_pre_hook(self._torch_step)

    def _layer(self, plain: _Plain, layer: Any, *arguments: Any, **named: Any) -> None:
        plain(layer, *arguments, **named)
        self.policies.saw(layer, named.get("dtype"))

    def _scaler(self, plain: _Plain, scaler: Any, inner: Any, *arguments: Any, **named: Any) -> None:
        plain(scaler, inner, *arguments, **named)
        self._judged.add(inner)
        self.training.ledger.entry(scaler)

    def _grad_scaler(self, plain: _Plain, scaler: Any, *arguments: Any, **named: Any) -> None:
        plain(scaler, *arguments, **named)
        if scaler.is_enabled():
            self._scaled_by_script = True
            self.training.ledger.keep(scaler)

    def _apply(self, plain: _Plain, optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if optimizer not in self._judged and optimizer not in self.training.left_alone:
            self._judge(optimizer, trainable_variables)
        return plain(optimizer, grads, trainable_variables)

    def _judge(self, optimizer: Any, variables: Any) -> None:
        """Lets an optimizer that does not scale take its first step, or refuses it."""
        self._judged.add(optimizer)
        if any(optimizer in getattr(each, "optimizers", ()) for each in list(self._judged)):
            return  # a part of a `MultiOptimizer`, which takes its step as a whole
        known = optimizer._trainable_variables if variables is None else variables
        if not self._scaled_by_script and self._is_float16(known):
            refuse(f"{place()} takes a step of its own with {type(optimizer).__name__}: {_ADVICE}")
        if self._scaled_by_script:
            return
        if isinstance(optimizer, keras.optimizers.Optimizer):
            self.training.ledger.keep(optimizer)
        if self.training.running:
            return
        if keras.config.dtype_policy().compute_dtype in HALF and not self._said:
            self._said = True
            say(f"{place()} trains in a loop of its own: the policy holds, float32 islands and the log are for `fit`")

    def _is_float16(self, variables: Iterable[Any]) -> bool:
        wanted = _identities(variables)
        known = (each for each in self.policies.float16_layers if each.built and layer_tree.graph_of(each) is None)
        float16 = (each for each in known if each.compute_dtype == "float16")  # not a custom layer that promotes
        return any(not wanted.isdisjoint(_identities(layer.trainable_variables)) for layer in float16)

    def _gradient(self, plain: _Plain, tape: Any, target: Any, sources: Any, *rest: Any, **named: Any) -> Any:
        is_plain = not self.training.models or caller("tensorflow").startswith("keras.")
        optimizer = None if is_plain else self._owner(sources)
        if optimizer is None:
            return plain(tape, target, sources, *rest, **named)
        if self._scales_itself(optimizer, target, sources):
            return plain(tape, target, sources, *rest, **named)
        named |= dict(zip(("output_gradients", "unconnected_gradients"), rest, strict=False))
        named["output_gradients"] = _scaled_seeds(optimizer, target, named.get("output_gradients"))
        grads = plain(tape, target, sources, **named)
        optimizer._calls.scale("loss scaled", [])
        return optimizer.get_unscaled_gradients(grads)

    def _scales_itself(self, optimizer: Any, target: Any, sources: Any) -> bool:
        """Returns whether the script scales the loss of this optimizer; refuses a script that does so in part."""
        scaled = bool(optimizer._calls.has_scaled(keras.tree.flatten(target)))
        known = self._by_script.get(optimizer, scaled)
        if _identities(keras.tree.flatten(sources)).isdisjoint(_identities(self._variables(optimizer))):
            return known  # the gradient of an intermediate value, such as in a gradient penalty
        if known != scaled:
            refuse(f"{place()} takes gradients of a loss that scale_loss returned, and of another one: {_MIXED}")
        self._by_script[optimizer] = scaled
        return scaled

    def _variables(self, optimizer: Any) -> list[Any]:
        models = [each for each in self.training.models if each.optimizer is optimizer]
        return [variable for model in models for variable in model.trainable_variables]

    def _owner(self, sources: Any) -> Any:
        """Returns the optimizer, ours, of the model that trains or whose variables these are; None without one."""
        wanted = _identities(keras.tree.flatten(sources))
        trains = self.training.running[-1:]  # whatever it differentiates by: gradients may be passed on
        models = (each for each in self.training.models if not wanted.isdisjoint(_identities(each.trainable_variables)))
        model = next(iter(trains or models), None)
        return model.optimizer if model is not None and self.training.is_ours(model.optimizer) else None

    def _torch_step(self, optimizer: Any, _arguments: Any, _named: Any) -> None:
        if optimizer not in self._judged and not is_within("torch.amp.grad_scaler"):
            self._judge(optimizer, [each for group in optimizer.param_groups for each in group["params"]])


def _identities(variables: Iterable[Any]) -> set[int]:
    """Returns what tells variables from others, whether they are Keras's or those of its backend."""
    variables = list(variables)
    return {*map(id, variables), *(id(each.value) for each in variables if isinstance(each, keras.Variable))}


def _scaled_seeds(optimizer: Any, target: Any, seeds: Any) -> Any:
    """Returns the gradients that backpropagation starts from, ones unless given, times the scale."""
    import tensorflow as tf

    targets = tf.nest.flatten(target)
    given = [None] * len(targets) if seeds is None else tf.nest.flatten(seeds)
    scale = optimizer.loss_scale
    seeds = [
        tf.cast(scale * (tf.ones_like(each, tf.float32) if seed is None else tf.cast(seed, tf.float32)), each.dtype)
        for each, seed in zip(targets, given, strict=True)
    ]
    return tf.nest.pack_sequence_as(target, seeds)
