"""Keras optimizer that keeps weights and states in few bits, and updates them in float32 arithmetic."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import keras
import numpy
from keras import ops

from tfmixed._core import arguments, gradients, replica_sync, rounding
from tfmixed._core.compiled_steps import CompiledSteps
from tfmixed._core.fused_update import WORTH_COMPILING, Call, Fusion, check_fuse, obstacle
from tfmixed._core.hyperparameters import DelegatedHyperparameters
from tfmixed._core.inner_optimizer import LOW_BITS, is_known, python_state
from tfmixed._core.low_precision_storage import Blocks, Float32View, Initial, Rounded, Split, Update
from tfmixed._core.variables import outside_of_graphs
from tfmixed._utils import temporary_state, user_warnings
from tfmixed._utils.patching import do_not_convert
from tfmixed.formats import STATES, WEIGHTS
from tfmixed.scaling import validation

# Smaller variables keep float32 states, which cost little: the limit of bitsandbytes.
_SMALL = 4096
# Elements of the variables that are updated by one compiled function, or by one call of PyTorch's fused operations.
_CHUNK = 2**22
# Dtypes that the collective operations by which workers share initial values do not take (TensorFlow 2.21).
_NOT_BROADCAST = ("bfloat16", "int16", "uint8")
# Streams of random bits of one variable.
_STREAMS = 64
# From the streams of random bits of one seed to those of the next: odd, so that all seeds below 2**32 differ.
_SEED = 0x85EBCA6B


@keras.saving.register_keras_serializable(package="tfmixed")
class LowPrecisionOptimizer(DelegatedHyperparameters, keras.optimizers.Optimizer):
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
            from outside keep these bits, at most half a bfloat16 step. `"nearest"` discards
            updates below half the distance to the next number (bfloat16 and float16). Defaults to `"stochastic"`.
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
    >>> optimizer.inner_optimizer.name
    'adam_w'
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
        self.__dict__["inner_optimizer"] = _checked(arguments.inner_from(inner_optimizer), states)
        self.weights, self.states, self.seed = weights, states, validation.count("seed", seed, 0)
        self.fuse, self.fused = check_fuse(fuse), Fusion(False, "no step was taken yet")
        self._update, self._created, self._compiled_steps = Update(), _Created(), CompiledSteps()
        self._unscale = functools.partial(_unscaled, None, math.inf)
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

    def build(self, variables: Sequence[Any]) -> None:
        """Creates all optimizer variables for the given trainable variables.

        Raises:
            ValueError: If a variable's dtype does not suit `weights`.
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
        view.constraint, view.like, view.storage = variable.constraint, variable, Rounded(variable)
        if keras.backend.standardize_dtype(variable.dtype) == "bfloat16" and self.weights == "stochastic":
            view.storage = Rounded(variable, is_random=True)
        elif keras.backend.standardize_dtype(variable.dtype) == "bfloat16" and self.weights == "split":
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
        layout = getattr(like, "_layout", None) if tuple(shape) == tuple(like.shape) else None
        with contextlib.ExitStack() as stack:
            if keras.backend.backend() == "tensorflow":
                own = like.value if isinstance(like, keras.Variable) else like
                stack.enter_context(self._distribution_strategy.extended.colocate_vars_with(own))
            return self.add_variable(shape, initializer, dtype, layout=layout, name=name.replace(":", "_"))

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
            self._unscale = functools.partial(_unscaled, scale, largest)
            if self.gradient_accumulation_steps or self._is_clipping() or replica_sync.current_strategy() is not None:
                grads, self._unscale = (
                    self._unscale(grads),
                    functools.partial(_unscaled, None, math.inf),
                )  # they are summed or clipped first
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
            self._take_step(view, self._unscale([gradient])[0], learning_rate)
            return
        scale, largest = (*self._unscale.args, None, math.inf)[:2]
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
                    type(inner)._parallel_update_step(inner, self._unscale(grads[start:end]), views, learning_rate)
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

    @property
    def variables(self) -> list[keras.Variable]:
        """Variables that hold the state, in the forms in which it is stored."""
        stored = [[v] if not isinstance(v, Float32View) else v.storage.variables for v in self._plain_variables()]
        return [*itertools.chain(*stored), *self._created.low_bits]

    def _plain_variables(self) -> list[keras.Variable]:
        """Returns the variables of an inner optimizer that is not wrapped, in its order: views, or real ones."""
        return self._created.variables or self.inner_optimizer.variables

    def saved_variables(self) -> dict[str, keras.Variable]:
        """Returns variables as a file holds them, by name.

        They are those of the inner optimizer in float32, numbered as by Keras, from which every form can be restored
        exactly. With `weights="split"`, the rest of the weights follows.
        """
        numbered = {str(number): variable for number, variable in enumerate(self._plain_variables())}
        return numbered | {f"{LOW_BITS}{index}": part for index, part in enumerate(self._created.low_bits)}

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables of `saved_variables`."""
        for name, variable in self.saved_variables().items():
            store[name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` of an optimizer with any `weights` and `states` wrote, or Keras's own."""
        saved, known = set(store.keys()), self.saved_variables()
        if {name for name in saved | set(known) if LOW_BITS not in name} - (saved & set(known)):
            user_warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}. It has {len(known)} variables, and the file "
                f"has {len(saved)}. Build it first with `optimizer.build(model.trainable_variables)`."
            )
            return
        for name, variable in known.items():
            variable.assign(store[name] if name in saved else numpy.zeros(variable.shape, "int16"))

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Sets all variables to values in the order of `variables`.

        Raises:
            ValueError: If their number or a shape is not that of `variables`. Nothing is set then.
        """
        variables, values = self.variables, list(weights)
        shapes = [[tuple(numpy.shape(value)) for value in found] for found in (variables, values)]
        if not self.built or shapes[0] != shapes[1]:
            raise ValueError(
                "`weights` must have a value of the same shape for each of `variables` of a built optimizer. "
                f"Received: shapes {shapes[1]}, expected {shapes[0]}"
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def to_keras(self, variables: Sequence[Any]) -> keras.optimizers.Optimizer:
        """Copies the weights into `variables` and returns a Keras optimizer for them that continues this one.

        Args:
            variables: Trainable variables of any dtype, in the order and shapes of those that this optimizer was built
                with, such as those of the same model in float32. `weights="split"` gives all bits of float32 weights.

        Raises:
            ValueError: If this optimizer is not built, or `variables` have other shapes. Nothing is written then.
        """
        inner, variables = self.inner_optimizer, list(variables)
        if not self.built:
            raise ValueError("`to_keras` needs a built optimizer. Call `optimizer.build(trainable_variables)` first.")
        _check_shapes(variables, self._trainable_variables)
        new = type(inner).from_config(inner.get_config())
        new.build(variables)
        _copy([*self._created.views, *self._plain_variables()], [*variables, *new.variables])
        return new

    @classmethod
    def from_keras(cls, optimizer: keras.optimizers.Optimizer, variables: Sequence[Any], **kwargs: Any) -> Self:
        """Copies weights into `variables` and returns an optimizer for them that continues a Keras optimizer.

        Args:
            optimizer: Built optimizer, not wrapped.
            variables: Trainable variables in the order and shapes of those that it was built with.
            **kwargs: Arguments of the constructor.

        Raises:
            ValueError: If `optimizer` is not built or wraps another one, or `variables` have other shapes. Nothing is
                written then.
        """
        if not optimizer.built or hasattr(optimizer, "inner_optimizer"):
            raise ValueError(
                "`optimizer` must be a built Keras optimizer. Pass the `inner_optimizer` of one that scales the loss. "
                f"Received: a {type(optimizer).__name__}, built={optimizer.built}"
            )
        variables = list(variables)
        _check_shapes(variables, optimizer._trainable_variables)
        new = cls(type(optimizer).from_config(optimizer.get_config()), **kwargs)
        new.build(variables)
        _copy([*optimizer._trainable_variables, *optimizer.variables], [*new._created.views, *new._plain_variables()])
        return new

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        own = {"weights": self.weights, "states": self.states, "seed": self.seed, "fuse": self.fuse}
        return {"name": self.name, "inner_optimizer": inner, **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        """Returns an optimizer from its configuration."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(inner, **{key: value for key, value in config.items() if key != "inner_optimizer"})


@dataclass
class _Created:
    """Views and variables that `build` creates."""

    views: list[Any] = field(default_factory=list)  # of trainable variables; those that hold gradients have none
    variables: list[keras.Variable] = field(default_factory=list)  # those of an inner optimizer that is not wrapped
    low_bits: list[keras.Variable] = field(default_factory=list)
    shares_state: bool = False  # the inner optimizer has states for all variables together
    streams: int = 0


def _checked(inner: keras.optimizers.Optimizer, states: str) -> keras.optimizers.Optimizer:
    name = type(inner).__name__
    if isinstance(inner, LowPrecisionOptimizer):
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


def _unscaled(scale: Any, largest: float, grads: Sequence[Any]) -> list[Any]:
    """Returns gradients in float32 at least, divided by a scale unless it is None."""
    if scale is not None:
        return gradients.unscale_all(grads, [False] * len(grads), scale, largest)
    return [gradient if gradient is None else gradients.with_values(gradient, gradients.widened) for gradient in grads]


def _check_shapes(variables: Sequence[Any], like: Sequence[Any]) -> None:
    shapes, expected = ([tuple(variable.shape) for variable in found] for found in (variables, like))
    if shapes != expected:
        raise ValueError(f"`variables` must have the shapes {expected}. Received: {shapes}")


def _copy(values: Sequence[Any], variables: Sequence[Any]) -> None:
    for value, variable in zip(values, variables, strict=True):
        variable.assign(ops.cast(ops.convert_to_tensor(value), variable.dtype))


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
