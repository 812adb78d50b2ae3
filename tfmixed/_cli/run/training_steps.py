"""Training steps that a script writes itself: scaled if possible, and refused under float16 otherwise."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import keras

from tfmixed._cli.run.messages import is_called_from, place, refuse, say
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._utils.patching import around, do_not_convert
from tfmixed.formats import HALF

_Method = Callable[..., Any]
_SCALING_MODULES = ("tfmixed._core.", "keras.src.optimizers.loss_scale_optimizer", "torch.amp.grad_scaler")


class RunOptimizer(LossScaleOptimizer):
    """Scaling optimizer that models get in place of the script's own.

    A training step scales its loss itself, or its tapes return unscaled gradients. The optimizer refuses a mixture, and
    gradients without a scale.
    """

    _scaled_by: Literal["step", "tape"] | None = None
    _is_applied = False

    @do_not_convert
    def scale_loss(self, loss: Any) -> Any:
        self._note_scaling("step")
        return super().scale_loss(loss)

    @do_not_convert
    def get_scaled_loss(self, loss: Any) -> Any:
        self._note_scaling("step")
        return super().get_scaled_loss(loss)

    def _note_scaling(self, source: Literal["step", "tape"]) -> None:
        if not self._is_applied and self._scaled_by not in (None, source):
            refuse(
                f"{place()} scales a loss, but some gradients of this training step are of losses that are not scaled. "
                "Call scale_loss before all gradients are computed, or not at all"
            )
        self._scaled_by, self._is_applied = source, False

    @do_not_convert
    def gradient(self, compute: Callable[[Any], Any], is_of_variables: bool) -> Any:
        """Returns unscaled gradients that are computed from a scaled start, or None if the step scales its loss.

        Args:
            compute: Function that returns gradients for a factor of the loss.
            is_of_variables: Whether they are gradients of variables, and not of values between.
        """
        if self._scaled_by == "step" and not self._is_applied:
            return None
        if is_of_variables:
            self._note_scaling("tape")
            return self.get_unscaled_gradients(compute(super().get_scaled_loss(1.0)))
        scale = self.loss_scale
        return keras.tree.map_structure(lambda value: _divide(value, scale), compute(scale))

    @do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        self._check_scaled()
        super().apply(grads, trainable_variables)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        self._check_scaled()
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _check_scaled(self) -> None:
        if self._scaled_by is None and self.rule.bounds != (1.0, 1.0):
            refuse(
                f"{place()} applies gradients of a loss that was not scaled. Call model.optimizer.scale_loss(loss) "
                "before they are computed, or use --policy mixed_bfloat16, which needs no loss scale"
            )
        self._is_applied = True


class ScaledModels:
    """Models whose optimizer is a `RunOptimizer`."""

    def __init__(self) -> None:
        self.compiled: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that `compile` has received
        self.current: Callable[[], Any] = lambda: None  # the model that trains, by a weak reference
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, model: Any) -> None:
        """Adds a model."""
        self._models.add(model)

    def find(self, sources: Iterable[Any]) -> tuple[RunOptimizer | None, bool]:
        """Returns the optimizer for gradients of these variables or values, and whether they are its variables."""
        wanted = _identities(sources)
        current = self.current()
        models = [current] if current in self._models else []
        for model in (*models, *self._models):
            if isinstance(model.optimizer, RunOptimizer) and not wanted.isdisjoint(
                _identities(model.trainable_variables)
            ):
                return model.optimizer, True
        optimizer = models[0].optimizer if models else None
        return (optimizer if isinstance(optimizer, RunOptimizer) else None), False


class StepPatches:
    """Patches of `tf.GradientTape.gradient` and of the `apply` of Keras's optimizers; a hook of PyTorch's.

    Args:
        models: Models whose optimizer is a `RunOptimizer`.
    """

    def __init__(self, models: ScaledModels) -> None:
        self.models = models
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._has_reported = False

    def install(self) -> None:
        """Patches the methods."""
        around(keras.optimizers.Optimizer, "apply", self._apply, traced=True)
        if keras.backend.backend() == "tensorflow":
            import tensorflow

            around(tensorflow.GradientTape, "gradient", self._gradient, traced=True)
        elif keras.backend.backend() == "torch":
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            register_optimizer_step_pre_hook(lambda optimizer, *_: self._check(optimizer))

    def _apply(self, original: _Method, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self._check(optimizer)
        return original(optimizer, *args, **kwargs)

    def _check(self, optimizer: Any) -> None:
        """Refuses an optimizer that does not scale under a float16 policy. Only its first step is checked."""
        if optimizer in self._checked:
            return
        self._checked.add(optimizer)
        if optimizer in self.models.compiled or is_called_from(*_SCALING_MODULES):
            return
        dtype = keras.config.dtype_policy().compute_dtype
        if dtype == "float16":
            refuse(
                f"{place()} trains with {type(optimizer).__name__} in a custom loop, without a loss scale under "
                "float16. Use --policy mixed_bfloat16, which needs no loss scale, or scale the loss in the script with "
                "tfmixed.LossScaleOptimizer or tfmixed.GradScaler"
            )
        if dtype in HALF and not self._has_reported:
            self._has_reported = True
            say(f"{place()} trains in a custom loop: the policy applies, but float32 islands and log need `fit`")

    def _gradient(
        self,
        original: _Method,
        tape: Any,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def compute(factor: Any) -> Any:
            return original(tape, target, sources, _scale_seeds(target, output_gradients, factor), *args, **kwargs)

        optimizer, is_of_variables = self.models.find(keras.tree.flatten(sources))
        grads = None if optimizer is None else optimizer.gradient(compute, is_of_variables)
        return original(tape, target, sources, output_gradients, *args, **kwargs) if grads is None else grads


def _identities(variables: Iterable[Any]) -> set[int]:
    """Returns the identities of Keras variables and of the backend's variables in them."""
    variables = list(variables)
    return {
        *map(id, variables),
        *(id(variable.value) for variable in variables if isinstance(variable, keras.Variable)),
    }


def _scale_seeds(target: Any, seeds: Any, factor: Any) -> Any:
    """Returns the gradients that backpropagation starts from, ones by default, times a factor."""
    import tensorflow as tf

    targets = tf.nest.flatten(target)
    given = [None] * len(targets) if seeds is None else tf.nest.flatten(seeds)
    scaled = [
        tf.cast(factor * (tf.ones_like(value, tf.float32) if seed is None else tf.cast(seed, tf.float32)), value.dtype)
        for value, seed in zip(targets, given, strict=True)
    ]
    return tf.nest.pack_sequence_as(target, scaled)


def _divide(gradient: Any, scale: Any) -> Any:
    """Returns a gradient divided by the scale, in float32 at least."""
    if gradient is None:
        return None
    return keras.ops.cast(gradient, keras.backend.result_type(gradient.dtype, "float32")) / scale
