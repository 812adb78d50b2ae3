"""The Keras optimizer that scales losses, skips non-finite steps and remembers every change of the scale."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
from keras import ops

from tfmixed import arguments, distribute, gradients
from tfmixed.branching import as_it_is, when
from tfmixed.calls import Calls
from tfmixed.fused import Call, Fuser, Fusion
from tfmixed.scaling import ConstantScale, checks
from tfmixed.state import Observable, ScalingState
from tfmixed.verdicts import Judge

# Left out of a saved configuration, so that Keras's own class can read the rest of it.
_MAX_CONSECUTIVE_SKIPS = 100
_EVENT_CAPACITY = 256


@keras.saving.register_keras_serializable(package="tfmixed")
class LossScaleOptimizer(Observable, keras.optimizers.LossScaleOptimizer):
    """An optimizer that scales the loss and applies a step only if every unscaled gradient is finite.

    A drop-in for Keras's class of the same name: `compile` does not wrap it again, and learning rate, schedules,
    `iterations`, clipping, weight decay, EMA and gradient accumulation are the inner optimizer's. A skipped step leaves
    weights, inner state and `iterations` as they are.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`, or the name of one.
        scale: `"dynamic"`, a number (constant), a rule of `tfmixed.scaling`, or None (constant 1.0). Unlike in Keras
            3, a number in second place is a constant scale; as in Keras 2, True and False there stand for `dynamic`.
        initial_scale: Keras's spelling: the first dynamic scale; with `dynamic=False` the constant one.
        dynamic_growth_steps: Keras's spelling of `growth_interval`.
        dynamic: Keras 2's spelling: False makes the scale constant.
        max_consecutive_skips: Steps skipped in a row after which `raise_if_exhausted` raises. None: never.
        fuse: `"auto"` compiles unscaling and the inner optimizer's step into one XLA function where that is possible
            and faster: on TensorFlow, without a strategy, on large variables. True compiles small ones too, False
            nothing. `fused` says what was done, and why. Results differ by rounding.
        event_capacity: How many changes of the scale fit in the ring on the device between two calls of
            `drain_events`. 40 bytes each.
        name: Name of the optimizer.
        **kwargs: Refused, as in Keras: arguments of the base optimizer belong on the inner one. Their defaults are
            accepted, since old files carry them.

    Raises:
        ValueError: An argument is out of range, or two of them say different things.
        TypeError: `inner_optimizer` is no optimizer.

    Source: Micikevicius et al., "Mixed Precision Training", 2017; the rules name theirs.

    Example:
    >>> optimizer = LossScaleOptimizer("adam", scale=1024)
    >>> float(optimizer.scale_loss(2.0))
    2048.0
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        scale: Any = "dynamic",
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        *,
        dynamic: bool | None = None,
        max_consecutive_skips: int | None = _MAX_CONSECUTIVE_SKIPS,
        fuse: bool | Literal["auto"] = "auto",
        event_capacity: int = _EVENT_CAPACITY,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        rule = arguments.rule_from(scale, initial_scale, dynamic_growth_steps, dynamic)
        super().__init__(
            arguments.inner_from(inner_optimizer),
            initial_scale=float(rule.start().scale),
            dynamic_growth_steps=getattr(rule, "growth_interval", None),
            name=name,
            **kwargs,
        )
        self.rule = rule
        limit = max_consecutive_skips
        self.max_consecutive_skips = None if limit is None else checks.count("max_consecutive_skips", limit, 1)
        self.event_capacity = checks.count("event_capacity", event_capacity, 1)
        self._fuser = Fuser(fuse)
        self._calls = Calls(scales=rule.bounds != (1.0, 1.0))
        self._scaling: ScalingState | None = None
        self._paths: list[str] = []

    def build(self, variables: Sequence[Any]) -> None:
        """Creates all optimizer variables for the given trainable variables.

        Raises:
            NotImplementedError: The distribution strategy is of an untested kind.
        """
        distribute.check_supported(self.inner_optimizer)
        self._state().watch(len(variables), self.add_variable)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        self._paths = [gradients.path(variable) for variable in variables]
        # Keras's LossScaleOptimizer.build would add its own two variables: its base class does the rest.
        keras.optimizers.Optimizer.build(self, variables)

    def _state(self) -> ScalingState:
        # Made on first use, so that a loss scaled before `build` reads the variable and not a number.
        if self._scaling is None:
            self._scaling = ScalingState(self.rule, self.event_capacity, self.add_variable)
        return self._scaling

    @property
    def loss_scale(self) -> Any:
        """The scale of the next step, a float32 scalar tensor. Assigning to it is logged as a change by hand."""
        self._calls.loss_scale()
        return self._scale()

    @loss_scale.setter
    def loss_scale(self, value: Any) -> None:
        self._state().set_scale(value)

    def _scale(self) -> Any:
        return self._state().read("dynamic_scale")

    @property
    def dynamic(self) -> bool:
        """Whether the scale can move: Keras 2's name."""
        return not isinstance(self.rule, ConstantScale)

    @property
    def dynamic_scale(self) -> keras.Variable:
        """The variable that holds the scale, whatever the rule."""
        return self._state().variables["dynamic_scale"]

    @property
    def step_counter(self) -> keras.Variable | None:
        """The variable that counts finite steps towards the next growth; None if the rule counts none."""
        return self._state().variables.get("step_counter")

    @property
    def fused(self) -> Fusion:
        """Whether the last update that was traced is fused, and why. As a bool: whether it is."""
        return self._fuser.fusion

    @as_it_is
    def scale_loss(self, loss: Any) -> Any:
        """Returns `loss` times the scale, in float32 at least: most scales are too large for float16."""
        self._calls.scale("scale_loss", [loss])
        scaled = ops.multiply(loss, self._scale())
        self._calls.scaled([scaled])
        return scaled

    @as_it_is
    def get_scaled_loss(self, loss: Any) -> Any:
        """Returns `loss` times the scale, in float32 at least: the first half of a loop in the style of Keras 2.

        Args:
            loss: A number, a tensor, or a callable that returns one, for which a callable is returned; or a nested
                structure of these.

        Example:
        >>> optimizer = LossScaleOptimizer("sgd", 1024)
        >>> float(optimizer.get_scaled_loss(2.0)), float(optimizer.get_scaled_loss(lambda: 2.0)())
        (2048.0, 2048.0)
        """
        self._calls.scale("get_scaled_loss", keras.tree.flatten(loss))
        scaled = keras.tree.map_structure(self._scaled, loss)
        self._calls.scaled(keras.tree.flatten(scaled))
        return scaled

    def _scaled(self, loss: Any) -> Any:
        return (lambda: self._scaled(loss())) if callable(loss) else ops.multiply(loss, self._scale())

    @as_it_is
    def get_unscaled_gradients(self, grads: Any) -> Any:
        """Returns `grads` divided by the scale, in float32 at least: the second half of a loop in the style of Keras 2.

        `apply` then takes its gradients for unscaled, clipped or not, unless they are the very ones that were given
        here. What it skips and reports is what it is given: clip by a norm in between, not by value, which would hide
        an overflow.

        Args:
            grads: A list, or another nested structure, of tensors, `tf.IndexedSlices` and None; or an iterator.

        Example:
        >>> optimizer = LossScaleOptimizer("sgd", 1024)
        >>> loss = optimizer.get_scaled_loss(2.0)
        >>> gradient, missing = optimizer.get_unscaled_gradients([ops.array(512.0), None])
        >>> float(gradient), missing
        (0.5, None)
        """
        grads = list(grads) if isinstance(grads, Iterator) else grads
        self._calls.get_unscaled_gradients(keras.tree.flatten(grads))
        scale, largest = self._scale(), self.rule.bounds[1]
        unscaled = keras.tree.map_structure(lambda each: gradients.unscale(each, scale, largest), grads)
        self._calls.unscaled(keras.tree.flatten(unscaled))
        return unscaled

    def _scale_of_gradients(self, grads: Sequence[Any], indices: Sequence[int]) -> Any:
        """Returns by what the gradients that are applied are still multiplied."""
        return ops.ones((), "float32") if self._calls.apply(grads, indices) else self._scale()

    @as_it_is
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Applies gradients of the scaled loss, or skips the step if one of them is not finite.

        Args:
            grads: One gradient a variable: a tensor, `tf.IndexedSlices` or None. Unscaled ones are taken as they are
                if `get_unscaled_gradients` made them.
            trainable_variables: The variables; None means those that the optimizer was built with.

        Raises:
            ValueError: All gradients are None, their number is not that of the variables, or a variable is not one that
                the optimizer was built with.
            NotImplementedError: The distribution strategy is of an untested kind, or the inner optimizer accumulates
                gradients or overwrites weights by their averages in a compiled step of `MirroredStrategy`.
            RuntimeError: It is called outside of `strategy.run`.
        """
        grads = list(grads)
        if not grads:
            return
        _check_any(grads)
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        if not self.built:
            raise ValueError(
                "trainable_variables must be passed to an optimizer that is not built, received None: pass them, or "
                "call `optimizer.build(trainable_variables)` first"
            )
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"grads must hold one gradient a variable, received {len(grads)} for {len(variables)} variables"
            )
        distribute.check_supported(self.inner_optimizer)
        judge, indices = self._judge(), self._indices(variables)
        scale = self._scale_of_gradients(grads, indices)
        update = self._update(grads, variables, indices)

        def decide(total: Any, on_each: Any) -> None:
            verdict = judge.verdict(total, scale)

            def apply() -> None:
                on_each(lambda gradients: update(gradients, verdict.divisor))

            if self.rule.skip_nonfinite:
                when(verdict.finite, apply, variables=(*variables, *self.inner_optimizer.variables))
            else:
                apply()
            self._state().advance(verdict)

        distribute.decide_together(decide, judge.evidence(grads, scale, indices, distribute.replica()), grads)

    def _update(
        self, grads: Sequence[Any], variables: Sequence[Any], indices: Sequence[int]
    ) -> Callable[[Sequence[Any], Any], None]:
        """Returns what unscales gradients and applies them, fused where that is possible and faster."""

        def apply(grads: Sequence[Any], variables: Sequence[Any], divisor: Any) -> None:
            self.inner_optimizer.apply(self._unscale(grads, divisor, variables), list(variables))

        return self._fuser.fused(Call(apply, self.inner_optimizer, grads, variables, indices))

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Does what `apply` does on values instead of variables (the JAX backend's path).

        Args:
            optimizer_variables: Values of `self.variables`.
            grads: One gradient a trainable variable.
            trainable_variables: Values of the trainable variables.

        Returns:
            The new values of the trainable variables and of `self.variables`.

        Raises:
            ValueError: The optimizer is not built, or all gradients are None.
        """
        if not self.built:
            raise ValueError(
                "stateless_apply needs a built optimizer: call `optimizer.build(trainable_variables)` first"
            )
        if not grads:
            return list(trainable_variables), list(optimizer_variables)
        _check_any(grads)
        own = self.variables[: -len(self.inner_optimizer.variables)]
        values, inner = optimizer_variables[: len(own)], optimizer_variables[len(own) :]
        with keras.StatelessScope(state_mapping=list(zip(own, values, strict=True))) as scope:
            judge, indices = self._judge(), self._indices(self._trainable_variables)
            scale = self._scale_of_gradients(grads, indices)
            verdict = judge.verdict(judge.evidence(grads, scale, indices), scale)
            self._state().advance(verdict)
        new_own = [scope.get_current_value(variable) for variable in own]

        def applied() -> tuple[list[Any], list[Any]]:
            unscaled = self._unscale(grads, verdict.divisor, self._trainable_variables)
            return self.inner_optimizer.stateless_apply(inner, unscaled, trainable_variables)

        if not self.rule.skip_nonfinite:
            new_trainable, new_inner = applied()
        else:
            new_trainable, new_inner = ops.cond(
                verdict.finite, applied, lambda: (list(trainable_variables), list(inner))
            )
        return new_trainable, new_own + new_inner

    def _judge(self) -> Judge:
        variables = self._trainable_variables
        return Judge.of(self.inner_optimizer, variables, distribute.replicas(), self.rule.needs_amax)

    def _indices(self, variables: Sequence[Any]) -> list[int]:
        try:
            return [self._get_variable_index(variable) for variable in variables]
        except KeyError:
            known, names = ", ".join(self._paths), ", ".join(gradients.path(variable) for variable in variables)
            raise ValueError(
                f"trainable_variables must be among those that the optimizer was built with ({known}), received {names}"
            ) from None

    def _unscale(self, grads: Sequence[Any], divisor: Any, variables: Sequence[Any]) -> list[Any]:
        raw = map(gradients.holds_gradient, variables)
        return gradients.unscale_all(grads, raw, divisor, self.rule.bounds[1])

    def _overflows(self) -> dict[str, int]:
        counts = self._state().read("overflow_counts")
        return dict(zip(self._paths, map(int, ops.convert_to_numpy(counts)), strict=True))

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Does what Keras does at the end of `fit`, and raises if all was in vain; see `raise_if_exhausted`."""
        super().finalize_variable_values(var_list)
        # On JAX, `fit` calls this after an exception too, with variables that may be empty: let that one through.
        if keras.backend.backend() != "jax" or sys.exc_info()[0] is None:
            self.raise_if_exhausted()

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration: Keras's own four entries where they say it all."""
        config = {"name": self.name, "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer)}
        if self.rule == arguments.dynamic_rule(self.initial_scale, self.dynamic_growth_steps):
            config |= {"initial_scale": self.initial_scale, "dynamic_growth_steps": self.dynamic_growth_steps}
        else:
            config["scale"] = self.rule.get_config()
        ours = {
            "max_consecutive_skips": (self.max_consecutive_skips, _MAX_CONSECUTIVE_SKIPS),
            "fuse": (self._fuser.fuse, "auto"),
            "event_capacity": (self.event_capacity, _EVENT_CAPACITY),
        }
        return {**config, **{key: value for key, (value, default) in ours.items() if value != default}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> LossScaleOptimizer:
        """Returns the optimizer of a configuration, one of Keras's own class included."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(inner, **{key: value for key, value in config.items() if key != "inner_optimizer"})

    @classmethod
    def from_keras(cls, optimizer: keras.optimizers.LossScaleOptimizer) -> LossScaleOptimizer:
        """Returns an optimizer that goes on where one of Keras's own class stands, with the same inner optimizer.

        Args:
            optimizer: For instance `model.optimizer` after `keras.models.load_model` of an older file. It must not
                be used any more afterwards.
        """
        new = cls(
            optimizer.inner_optimizer,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
        )
        if optimizer.built:
            new.build(optimizer._trainable_variables)
            new._state().restore({name: getattr(optimizer, name).numpy() for name in ("dynamic_scale", "step_counter")})
        return new

    def save_own_variables(self, store: Any) -> None:
        """Writes own variables under their names and the inner optimizer's under their numbers."""
        for name, variable in {**self._state().variables, **self._inner_by_name()}.items():
            store[name] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote, or what Keras's own class wrote.

        What the file does not hold, because another rule wrote it, starts afresh.
        """
        inner = self._inner_by_name()
        saved = _by_name(store, inner)
        if inner.keys() != {name for name in saved if name.startswith("inner_")}:
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}: the inner optimizer of the file has other "
                f"variables than {type(self.inner_optimizer).__name__} here, or the optimizer is not built yet: build "
                "it first with `optimizer.build(model.trainable_variables)`.",
                stacklevel=2,
            )
            return
        self._state().restore(saved)
        for name, variable in inner.items():
            variable.assign(saved[name])

    def _inner_by_name(self) -> dict[str, keras.Variable]:
        return {f"inner_{index}": variable for index, variable in enumerate(self.inner_optimizer.variables)}


def _by_name(store: Any, inner: dict[str, Any]) -> dict[str, Any]:
    """Returns a file's values by our names; Keras numbers its four own variables and then the inner optimizer's."""
    numbered = ["iteration", "learning_rate", "step_counter", "dynamic_scale", *inner]
    if set(store.keys()) == {str(number) for number in range(len(numbered))}:
        return {name: store[str(number)] for number, name in enumerate(numbered)}
    return {name: store[name] for name in store.keys()}  # noqa: SIM118  # an HDF5 group of Keras does not iterate


def _check_any(grads: Sequence[Any]) -> None:
    if all(gradient is None for gradient in grads):
        raise ValueError(
            f"grads must hold at least one gradient, received {len(grads)} times None: the loss does not depend on "
            "any of the trainable variables"
        )
