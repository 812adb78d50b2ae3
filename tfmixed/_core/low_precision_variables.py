"""Variables of a `LowPrecisionOptimizer`: the stored forms of weights and states, and views of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from tfmixed._core import gradients, replica_sync, rounding
from tfmixed._core.hyperparameters import DelegatedHyperparameters
from tfmixed._core.low_precision_storage import Blocks, Float32View, Initial, Rounded, Split, Update
from tfmixed._core.variables import outside_of_graphs, replicated_layout
from tfmixed._utils import temporary_state

# Smaller variables keep float32 states, which cost little: the limit of bitsandbytes.
_SMALL = 4096
# Dtypes that the collective operations by which workers share initial values do not take (TensorFlow 2.21).
_NOT_BROADCAST = ("bfloat16", "int16", "uint8")
# Streams of random bits of one variable.
_STREAMS = 64
# From the streams of random bits of one seed to those of the next: odd, so that all seeds below 2**32 differ.
_SEED = 0x85EBCA6B


class LowPrecisionVariables(DelegatedHyperparameters, keras.optimizers.Optimizer):
    """Mixin that creates the variables of an optimizer for views that its inner optimizer updates."""

    weights: str
    states: str
    seed: int
    _update: Update
    _created: Created

    def build(self, variables: Sequence[Any]) -> None:
        """Creates all optimizer variables for the given trainable variables.

        Raises:
            ValueError: If a variable's dtype does not suit `weights`.
            NotImplementedError: If `states="int8"`, and `keras.distribution` splits a variable between devices.
        """
        if self.built:
            return
        inner, created, variables = self.inner_optimizer, self._created, list(variables)
        replica_sync.check_supported(inner)
        for variable in variables:
            self._check_dtype(variable)
        with outside_of_graphs():
            first, own = len(inner.variables), len(self._variables)
            super().build(variables)  # adds averages of weights and accumulated gradients
            own_variables = self._variables[own:]
            created.views = [
                variable if gradients.holds_gradient(variable) else self._view(variable) for variable in variables
            ]
            with contextlib.ExitStack() as stack:
                for name in ("use_ema", "gradient_accumulation_steps"):
                    temporary_state.put(stack, inner, name, None)
                stack.enter_context(self._update.collect())
                inner.build(created.views)
                states = inner.variables[first:]
                for state in states:
                    if isinstance(state, Float32View):
                        state.storage = self._stored(state)
            self._number_streams([*created.views, *states])
        created.variables = [*inner.variables[:first], *own_variables, *states]
        self._not_stored = [variable for variable in inner.variables if not isinstance(variable, Float32View)]
        created.shares_state = not all(isinstance(state, Float32View) for state in states)

    def _number_streams(self, views: Sequence[Any]) -> None:
        """Gives each view of a variable or state its own stream of random bits, those of one variable in a row."""
        places: dict[int, int] = {}
        for view in views:
            if isinstance(view, Float32View):
                key = id(view.like)
                number = list(places).index(key) if key in places else len(places)
                places[key] = view.place = places.get(key, -1) + 1
                view.stream = self.seed * _SEED + number * _STREAMS

    def _check_dtype(self, variable: Any) -> None:
        if keras.backend.standardize_dtype(variable.dtype) == "float16" and self.weights != "nearest":
            raise ValueError(
                f"`weights={self.weights!r}` needs bfloat16 variables. Create the model under the policy bfloat16 or "
                f'mixed_float16, or pass `weights="nearest"`. Received: {gradients.path(variable)} in float16'
            )

    def _view(self, variable: Any) -> Float32View:
        """Returns the float32 view of a trainable variable."""
        view = Float32View(variable.shape, variable.dtype, gradients.path(variable), self._update)
        is_bfloat16 = keras.backend.standardize_dtype(variable.dtype) == "bfloat16"
        view.constraint, view.like = variable.constraint, variable
        view.storage = Rounded(variable, is_random=is_bfloat16 and self.weights == "stochastic")
        if is_bfloat16 and self.weights == "split":
            view.storage = Split(variable, self._add(variable, f"{view.path.replace('/', '_')}_low_bits", "int16"))
            self._created.low_bits.append(view.storage.variables[1])
        return view

    def _add_state(self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros") -> Float32View:
        """Takes the place of the inner optimizer's `add_variable_from_reference`."""
        path = f"{reference_variable.path.replace('/', '_')}_{name or 'var'}"
        state = Float32View(reference_variable.shape, reference_variable.dtype, path, self._update)
        state.like = reference_variable.like
        state.storage = Initial(state.shape, state.dtype, keras.initializers.get(initializer))
        self.inner_optimizer._track_variable(state)
        return state

    def _stored(self, state: Float32View) -> Rounded | Blocks:
        """Returns the stored form of a new state."""
        values, like = state.value, state.like
        is_copy = state.is_written  # by `build`, as copies of weights are
        state.release()

        def add(dtype: str, values: Any, suffix: str = "") -> keras.Variable:
            return self._add(like, state.name + suffix, dtype, lambda *_, **__: values, values.shape)

        is_small, is_embedding = math.prod(state.shape) < _SMALL, "embedding" in gradients.path(like).lower()
        form = "float32" if is_copy or is_small or (is_embedding and self.states == "int8") else self.states
        if form == "float32" or state.dtype != "float32":
            return Rounded(add(state.dtype, values))
        if form == "bfloat16":
            return Rounded(add("bfloat16", ops.cast(values, "bfloat16")), is_random=True)
        if _is_sharded(like):
            raise NotImplementedError(
                "8-bit states have blocks that do not follow the shards of a weight, so that each device would hold "
                'and gather all of them. Pass `states="bfloat16"`, which are sharded as the weight is. Received: '
                f"states={self.states!r}, {gradients.path(like)} with the layout {like._layout}"
            )
        codes, scales = rounding.to_blocks(values)
        return Blocks(add("uint8", codes, "_codes"), add("float32", scales, "_scales"), state.shape)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> keras.Variable:
        """Adds a float32 variable in the shape of another: an average of weights, or a sum of gradients."""
        is_double = keras.backend.standardize_dtype(reference_variable.dtype) == "float64"
        path = f"{gradients.path(reference_variable).replace('/', '_')}_{name or 'var'}"
        return self._add(reference_variable, path, "float64" if is_double else "float32", initializer)

    def _add(
        self, like: Any, name: str, dtype: str, initializer: Any = "zeros", shape: Sequence[int] | None = None
    ) -> keras.Variable:
        """Adds a variable on the device of another."""
        if dtype in _NOT_BROADCAST and replica_sync.is_multi_worker(self):
            raise NotImplementedError(
                f"TensorFlow cannot create {dtype} variables on several workers. Train under a mixed policy with "
                f'`states="float32"`, or on one worker. Received: weights={self.weights!r}, states={self.states!r}'
            )
        shape = like.shape if shape is None else shape
        layout = getattr(like, "_layout", None) if tuple(shape) == tuple(like.shape) else replicated_layout(shape)
        with contextlib.ExitStack() as stack:
            if keras.backend.backend() == "tensorflow":
                own = like.value if isinstance(like, keras.Variable) else like
                stack.enter_context(self._distribution_strategy.extended.colocate_vars_with(own))
            return self.add_variable(shape, initializer, dtype, layout=layout, name=name.replace(":", "_"))

    def _update_model_variables_moving_average(self, trainable_variables: Sequence[Any]) -> None:
        del trainable_variables
        super()._update_model_variables_moving_average(self._created.views)

    def _overwrite_model_variables_with_average_value(self, trainable_variables: Sequence[Any]) -> None:
        del trainable_variables
        for view, average in self._averages():
            view.assign(average)

    def _averages(self) -> list[tuple[Float32View, keras.Variable]]:
        pairs = zip(self._created.views, self._model_variables_moving_average, strict=True)
        return [(view, average) for view, average in pairs if average is not None]

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def _iterations(self) -> keras.Variable:
        return self.inner_optimizer._iterations

    @_iterations.setter
    def _iterations(self, value: keras.Variable) -> None:
        """Ignores the variable that the base class creates."""

    def _var_key(self, variable: Any) -> Any:
        return super()._var_key(variable.like if isinstance(variable, Float32View) else variable)


def _is_sharded(variable: Any) -> bool:
    """Returns whether `keras.distribution` splits a variable between devices."""
    layout = getattr(variable, "_layout", None)  # of Keras or of JAX
    return layout is not None and not getattr(layout, "backend_layout", layout).is_fully_replicated


@dataclass
class Created:
    """Views and variables that `build` creates."""

    views: list[Any] = field(default_factory=list)  # of trainable variables; those that hold gradients have none
    variables: list[keras.Variable] = field(default_factory=list)  # those of an inner optimizer that is not wrapped
    low_bits: list[keras.Variable] = field(default_factory=list)
    shares_state: bool = False  # the inner optimizer has states for all variables together


def checked_inner(inner: keras.optimizers.Optimizer, states: str) -> keras.optimizers.Optimizer:
    """Returns an inner optimizer that can be wrapped; an error is raised for others."""
    name = type(inner).__name__
    if isinstance(inner, LowPrecisionVariables):
        raise ValueError("`inner_optimizer` must not be a LowPrecisionOptimizer itself. Pass the optimizer inside it.")
    if type(inner).apply is not keras.optimizers.Optimizer.apply:
        raise TypeError(
            "`inner_optimizer` must not override `apply`. Wrap the members of a `MultiOptimizer`, and put a "
            f"`LossScaleOptimizer` outside. Received: a {name}"
        )
    if inner.built:
        raise ValueError(
            "`inner_optimizer` must not be built. Pass a new one, or continue with "
            f"`LowPrecisionOptimizer.from_keras(optimizer, variables)`. Received: a built {name}"
        )
    if inner.loss_scale_factor is not None:
        raise ValueError(
            f"`loss_scale_factor` of the inner optimizer must be None. Wrap this optimizer in "
            f"`LossScaleOptimizer(optimizer, scale)`. Received: {inner.loss_scale_factor}"
        )
    if getattr(inner, "centered", False) and states != "float32":
        raise ValueError(
            f"{name}(centered=True) takes the square root of a difference of two states, which rounding can make "
            f'negative. Pass `states="float32"`. Received: states={states!r}'
        )
    return inner
