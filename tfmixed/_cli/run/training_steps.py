"""Training steps that a script writes itself: scaled if possible, and refused under float16 otherwise."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NoReturn

import keras

from tfmixed._cli.run.messages import is_called_from, place, refuse, say
from tfmixed._core import gradients
from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._utils.patching import around, do_not_convert
from tfmixed.formats import HALF

_Method = Callable[..., Any]
# Of the start of gradients of intermediate values, which may be in float16.
_LARGEST_FACTOR = 2.0**15
_SCALING_MODULES = ("tfmixed._core.", "keras.src.optimizers.loss_scale_optimizer", "torch.amp.grad_scaler")


class TrainFunction:
    """Training function of a model. Tapes are scaled only while it runs or is traced.

    Args:
        model: The model, whose training function Keras has made.
    """

    current: ClassVar[TrainFunction | None] = None

    def __init__(self, model: keras.Model) -> None:
        self._function, self.model = model.train_function, weakref.ref(model)
        self.scaled_by: dict[int, Literal["step", "tape"]] = {}  # by identity of the optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        previous, TrainFunction.current = TrainFunction.current, self
        self.scaled_by.clear()
        try:
            return self._function(*args, **kwargs)
        finally:
            TrainFunction.current = previous


class RunOptimizer(LossScaleOptimizer):
    """The scaling optimizer that models get in place of the script's own.

    In a training function, either the step scales all its losses itself, or all its tapes are scaled.
    """

    _applying = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls.warn = _refuse_unscaled

    @property
    def is_applying(self) -> bool:
        """True while this optimizer applies gradients, with the inner optimizer."""
        return self._applying > 0

    @do_not_convert
    def scale_loss(self, loss: Any) -> Any:
        self._set_scaled_by("step")
        return super().scale_loss(loss)

    @do_not_convert
    def get_scaled_loss(self, loss: Any) -> Any:
        self._set_scaled_by("step")
        return super().get_scaled_loss(loss)

    def _set_scaled_by(self, source: Literal["step", "tape"]) -> None:
        function = TrainFunction.current
        if function is not None and function.scaled_by.setdefault(id(self), source) != source:
            _refuse_mixture()

    def scales_tape(self, target: Any, is_of_variables: bool) -> bool:
        """Returns whether gradients of `target` must start from the scale, since the step does not scale its losses.

        Args:
            target: Tensor to differentiate, or a nested structure of tensors.
            is_of_variables: Whether the gradients are those of trainable variables.
        """
        function = TrainFunction.current
        is_by_step = function is not None and function.scaled_by.get(id(self)) == "step"
        if is_by_step and is_of_variables and not self._calls.has_scaled(keras.tree.flatten(target)):
            _refuse_mixture()
        return not is_by_step

    @do_not_convert
    def gradient(self, compute: Callable[[Any], Any], is_of_variables: bool) -> Any:
        """Returns unscaled gradients that are computed from a scaled start.

        Args:
            compute: Function that returns gradients for a factor of the loss.
            is_of_variables: Whether the gradients are those of trainable variables, and not of intermediate values.
        """
        if is_of_variables:
            self._set_scaled_by("tape")
            return self.get_unscaled_gradients(compute(super().get_scaled_loss(1.0)))
        factor = keras.ops.minimum(self.loss_scale, _LARGEST_FACTOR)
        return keras.tree.map_structure(
            lambda value: gradients.unscale(value, factor, _LARGEST_FACTOR), compute(factor)
        )

    @do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        with self._apply_inner():
            super().apply(grads, trainable_variables)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        with self._apply_inner():
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    @contextlib.contextmanager
    def _apply_inner(self) -> Iterator[None]:
        # Not by thread: replicas apply in threads of their own.
        self._applying += 1
        try:
            yield
        finally:
            self._applying -= 1


def _refuse_unscaled(_: str) -> NoReturn:
    refuse(
        f"{place()} applies gradients of a loss that was not scaled. Call model.optimizer.scale_loss(loss) "
        "before they are computed, or use --policy mixed_bfloat16, which needs no loss scale"
    )


def _refuse_mixture() -> NoReturn:
    refuse(
        f"{place()} computes gradients of a loss that was not scaled, in a training step that scales a loss. Call "
        "scale_loss for every loss, and differentiate what it returns, or for none"
    )


class ScaledModels:
    """Models whose optimizer is a `RunOptimizer`, and the optimizers that `compile` has received."""

    def __init__(self) -> None:
        self.compiled: weakref.WeakSet[Any] = weakref.WeakSet()
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scalers: weakref.WeakKeyDictionary[Any, weakref.ref[RunOptimizer]] = weakref.WeakKeyDictionary()

    def scale(self, model: Any, optimizer: Any, rule: Any) -> None:
        """Gives a model the scaling optimizer around `optimizer`."""
        scaler = self.scaler_of(optimizer) or RunOptimizer(optimizer, rule)
        self._scalers[optimizer] = weakref.ref(scaler)
        self._models.add(model)
        # Not with Keras's `__setattr__`: TensorFlow's part of it would add the optimizer to checkpoints.
        object.__setattr__(model, "optimizer", scaler)

    def scaler_of(self, optimizer: Any) -> RunOptimizer | None:
        """Returns the scaling optimizer around an optimizer that `compile` has received."""
        reference = self._scalers.get(optimizer)
        return None if reference is None else reference()

    def find(self, sources: Iterable[Any]) -> tuple[RunOptimizer | None, bool]:
        """Returns the optimizer for gradients of these variables or values, and whether they are its variables."""
        wanted = _identities(sources)
        current: Any = None if TrainFunction.current is None else TrainFunction.current.model()
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
        """Refuses an optimizer that does not scale under a float16 policy. One not compiled is checked once."""
        scaler = self.models.scaler_of(optimizer)
        if scaler is not None and not scaler.is_applying:
            refuse(
                f"{place()} applies gradients with the optimizer that compile has received, without its loss scale. "
                "Use model.optimizer in its place"
            )
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

        if TrainFunction.current is not None and _are_real(target, sources):
            optimizer, is_of_variables = self.models.find(keras.tree.flatten(sources))
            if optimizer is not None and optimizer.scales_tape(target, is_of_variables):
                return optimizer.gradient(compute, is_of_variables)
        return original(tape, target, sources, output_gradients, *args, **kwargs)


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


def _are_real(*values: Any) -> bool:
    tensors = keras.tree.flatten(values)
    return all("float" in str(getattr(tensor, "dtype", None)) for tensor in tensors)
