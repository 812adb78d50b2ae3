"""Keras optimizer that keeps weights and states in few bits, and updates them in float32 arithmetic."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras
from keras import ops

from tfmixed._core import arguments, gradients, replica_sync
from tfmixed._core.compiled_steps import CompiledSteps
from tfmixed._core.fused_update import WORTH_COMPILING, Call, Fusion, check_fuse, obstacle
from tfmixed._core.inner_optimizer import is_known, python_state
from tfmixed._core.low_precision_files import LowPrecisionFiles
from tfmixed._core.low_precision_storage import Float32View, Update
from tfmixed._core.low_precision_variables import Created, checked_inner
from tfmixed._utils import temporary_state
from tfmixed._utils.patching import do_not_convert
from tfmixed.formats import STATES, WEIGHTS
from tfmixed.scaling import validation

# On PyTorch, elements of the variables that are updated by one call of its fused operations.
_CHUNK = 2**22
# Scale of gradients that are not scaled, and its largest value.
_UNSCALED = None, math.inf


@keras.saving.register_keras_serializable(package="tfmixed")
class LowPrecisionOptimizer(LowPrecisionFiles):
    """An optimizer that keeps bfloat16 weights and optimizer states, and updates them in float32 arithmetic.

    Keras computes updates in the dtype of each variable. In bfloat16 Adam's `beta_2` of 0.999 becomes 1, and an update
    below half the distance to the next number changes nothing. Here the inner optimizer's own step sees float32
    weights, states and gradients, one variable at a time. Its results are rounded when they are stored. Float32
    variables, such as those of `mixed_bfloat16`, keep their dtype, and only the states shrink.

    Bytes of a weight, its gradient and Adam's two states: 16 in float32 and under `mixed_bfloat16`, 8 in bfloat16, 6
    with `states="int8"`, 2 more with `weights="split"`.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer` that is not built yet, or its name. It belongs to this object
            from then on. A `MultiOptimizer` cannot be wrapped; wrap its members.
        weights: Rounding of half-precision weights. `"stochastic"` rounds up or down at random, so that small updates
            survive in expectation (bfloat16). `"split"` keeps the other 16 bits of float32 weights in a second
            variable: the weights take the same values as in float32, bit for bit (bfloat16). Weights that are assigned
            from outside keep these bits, at most half a bfloat16 step. `"nearest"` discards updates below half the
            distance to the next number (bfloat16 and float16). Defaults to `"stochastic"`.
        states: Form of optimizer states that have the shape of their variable: `"float32"`, `"bfloat16"` with
            stochastic rounding, or `"int8"`, 8-bit codes in blocks of 256; see `tfmixed._core.rounding`. Float32 in any
            case: states of variables below 4,096 elements and in other shapes, states that start as copies of weights,
            averages of weights, accumulated gradients; instead of 8-bit states also those of embeddings, by the
            variable's path. Defaults to `"bfloat16"`.
        seed: Seed of the stochastic rounding, which depends on it, the step and the position alone: it is the same on
            all replicas and after a restart. Defaults to 0.
        fuse: The same as in `LossScaleOptimizer`. Defaults to `"auto"`.
        name: Name of the optimizer.

    Raises:
        ValueError: If an argument is out of range, or the inner optimizer is built, or subtracts states that must not
            be rounded (`RMSprop(centered=True)` with other states than float32).
        TypeError: If `inner_optimizer` is not an optimizer, or overrides `apply`.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015 (stochastic rounding); Zamirai et al.,
    "Revisiting BFloat16 Training", 2020 (bfloat16 weights); Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", 2022 (8-bit states).

    Example:
    >>> optimizer = LowPrecisionOptimizer(keras.optimizers.AdamW(1e-3), states="int8")
    >>> type(optimizer.inner_optimizer).__name__, optimizer.weights, optimizer.states
    ('AdamW', 'stochastic', 'int8')
    """

    # Read where warnings about constants in half precision are given.
    float32_arithmetic = True
    _FIXED = ("weights", "states", "seed")

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        weights: Literal["stochastic", "split", "nearest"] = "stochastic",
        states: Literal["float32", "bfloat16", "int8"] = "bfloat16",
        *,
        seed: int = 0,
        fuse: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        for argument, value, known in (("weights", weights, WEIGHTS), ("states", states, STATES)):
            if value not in known:
                raise ValueError(f"`{argument}` must be one of {', '.join(known)}. Received: {argument}={value!r}")
        super().__init__(learning_rate=0.0, name=name)
        # Not tracked by TensorFlow: checkpoints hold variables as they are stored, and not their views.
        self.__dict__["inner_optimizer"] = checked_inner(arguments.inner_from(inner_optimizer), states)
        self.weights, self.states, self.seed = weights, states, validation.count("seed", seed, 0)
        self.fuse, self.fused = check_fuse(fuse), Fusion(False, "no step was taken yet")
        self._update, self._created, self._compiled_steps = Update(), Created(), CompiledSteps()
        self._scale: tuple[Any, float] = _UNSCALED
        # The inner optimizer's own code calls these, on views instead of variables.
        vars(self.inner_optimizer).update(
            add_variable_from_reference=self._add_state,
            update_step=self._step,
            assign=lambda variable, value: variable.assign(value),
            assign_add=lambda variable, value: variable.assign_add(value),
            assign_sub=lambda variable, value: variable.assign_sub(value),
            _var_key=self._var_key,
            # Keras saves it beside this object, which holds all that it has.
            save_own_variables=lambda _: None,
            load_own_variables=lambda _: None,
        )
        if hasattr(self.inner_optimizer, "_parallel_update_step"):
            vars(self.inner_optimizer)["_parallel_update_step"] = self._parallel_step
        self._delegate()

    @do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Updates variables by their gradients.

        Args:
            grads: One gradient for each variable: a tensor, `tf.IndexedSlices` or None.
            trainable_variables: The variables. Defaults to those that the optimizer was built with.

        Raises:
            ValueError: If all gradients are None, their number is not that of the variables, or a variable is not one
                that the optimizer was built with.
        """
        grads = list(grads)
        if grads:
            self.apply_scaled(grads, self._variables_of(grads, trainable_variables))

    def apply_scaled(
        self, grads: Sequence[Any], variables: Sequence[Any], scale: Any = None, largest: float = math.inf
    ) -> None:
        """Does what `apply` does with gradients of a loss times `scale`, which is at most `largest`."""
        self._indices(variables)
        self.fused = self._fusion(variables)
        with keras.name_scope(self.name, caller=self), _no_grad():
            grads, variables = self._filter_empty_gradients(grads, variables)
            grads, variables = self._overwrite_variables_directly_with_gradients(grads, variables)
            self._scale = scale, largest
            if self.gradient_accumulation_steps or self._is_clipping() or replica_sync.current_strategy() is not None:
                # They are summed or clipped before a step takes them.
                grads, self._scale = _unscaled(*self._scale, grads), _UNSCALED
            if grads:
                self._backend_apply_gradients(grads, variables)
                self._constrain(self._views_of(variables))
        self._iterations.assign_add(1)

    def _fusion(self, variables: Sequence[Any]) -> Fusion:
        """Decides whether steps are compiled."""
        large = [variable for variable in variables if self._is_large(variable)]
        if not large:
            return Fusion(False, "XLA is not faster on variables this small" if self.fuse else "fuse=False")
        reason = obstacle(Call(self._step, self, variables, (), (), has_sparse=False))
        if not reason and not is_known(self, ()):
            reason = "a user's own code is not compiled"
        if not reason:
            self._compiled_steps.begin(*python_state(self))
        return Fusion(not reason, reason or f"{len(large)} of {len(variables)} variables, the large ones")

    def _is_large(self, variable: Any) -> bool:
        return self.fuse is True or (self.fuse == "auto" and math.prod(variable.shape) >= WORTH_COMPILING)

    def _is_clipping(self) -> bool:
        inner = self.inner_optimizer
        return any(bool(limit) for limit in (inner.clipnorm, inner.global_clipnorm, inner.clipvalue))

    def _constrain(self, views: Sequence[Float32View]) -> None:
        constrained = [view for view in views if view.constraint is not None]
        with self._update.collect():
            for view in constrained:
                view.assign(view.constraint(view))
                view.store(-1 - self._iterations)  # other random bits than those of the update

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Sequence[Any]) -> None:
        frequency = self.ema_overwrite_frequency if self.use_ema and keras.backend.backend() == "jax" else None
        with contextlib.ExitStack() as stack:
            if frequency:  # Keras's own code for JAX would assign the averages to rounded variables
                temporary_state.put(stack, self.inner_optimizer, "ema_overwrite_frequency", None)
            super()._backend_apply_gradients(grads, trainable_variables)
        if frequency:
            is_due = (self.iterations + 1) % frequency == 0
            for view, average in self._averages():
                view.assign(ops.where(is_due, average.value, view.value))

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        return self.inner_optimizer._clip_gradients(grads)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Does nothing: a step decays float32 weights."""

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        # The inner optimizer's own code calls `_step` for each variable, under a strategy on each device.
        self.inner_optimizer._backend_update_step(grads, trainable_variables, learning_rate)

    def _step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Takes the place of the inner optimizer's `update_step`."""
        index = self._get_variable_index(variable)
        view = self._created.views[index]
        if not (self.fused and self._is_large(view)):
            self._take_step(view, _unscaled(*self._scale, [gradient])[0], learning_rate)
            return
        scale, largest = self._scale
        rows = gradient.indices if gradients.is_sparse(gradient) else None
        given = {"values": gradients.values_of(gradient), "rows": rows, "scale": scale}
        given |= {"rate": ops.convert_to_tensor(learning_rate), "stream": ops.convert_to_tensor(view.stream, "int32")}
        names = [name for name, tensor in given.items() if tensor is not None]

        def step(*tensors: Any) -> None:
            inputs = dict(zip(names, tensors, strict=True))
            values = inputs["values"]
            dense = type(gradient)(values, inputs["rows"], view.shape) if "rows" in inputs else values
            self._update.stream = inputs["stream"]
            try:
                self._take_step(view, _unscaled(inputs.get("scale"), largest, [dense])[0], inputs["rate"])
            finally:
                self._update.stream = None

        self._compiled_steps.run((index, *names), step, *(given[name] for name in names))

    def _take_step(self, view: Float32View, gradient: Any, learning_rate: Any) -> None:
        with self._updating([view]):
            type(self.inner_optimizer).update_step(self.inner_optimizer, gradient, view, learning_rate)

    def _parallel_step(self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        """Takes the place of `_parallel_update_step` of Keras's optimizers on PyTorch, which update all variables."""
        inner, start, size = self.inner_optimizer, 0, 0
        for end, variable in enumerate(variables, 1):
            size += math.prod(variable.shape)
            # What an optimizer holds for all variables must change once in a step.
            if end == len(variables) or (size >= _CHUNK and not self._created.shares_state):
                views = self._views_of(variables[start:end])
                with self._updating(views):
                    unscaled = _unscaled(*self._scale, grads[start:end])
                    type(inner)._parallel_update_step(inner, unscaled, views, learning_rate)
                start, size = end, 0

    @contextlib.contextmanager
    def _updating(self, views: Sequence[Float32View]) -> Iterator[None]:
        """Decays float32 views of variables, and stores what the caller makes of them and of their states."""
        with self._update.collect() as changed:
            self._decay(views)
            yield
            for view in tuple(changed):
                view.store(self._iterations)

    def _views_of(self, variables: Sequence[Any]) -> list[Float32View]:
        return [self._created.views[self._get_variable_index(variable)] for variable in variables]

    def _decay(self, views: Sequence[Float32View]) -> None:
        inner = self.inner_optimizer
        is_own = type(inner)._apply_weight_decay is not keras.optimizers.Optimizer._apply_weight_decay
        if is_own or keras.backend.backend() != "tensorflow":
            inner._apply_weight_decay(views)
        elif inner.weight_decay is not None:  # Keras's method for TensorFlow needs variables of TensorFlow
            for view in filter(inner._use_weight_decay, views):
                view.assign_sub(view * inner.weight_decay * ops.cast(inner.learning_rate, view.dtype))


def _unscaled(scale: Any, largest: float, grads: Sequence[Any]) -> list[Any]:
    """Returns gradients in float32 at least, divided by a scale unless it is None."""
    if scale is not None:
        return gradients.unscale_all(grads, [False] * len(grads), scale, largest)
    return [gradient if gradient is None else gradients.with_values(gradient, gradients.widened) for gradient in grads]


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
