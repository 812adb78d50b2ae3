"""The Keras optimizer that scales losses, skips non-finite steps and remembers every change of the scale."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tfmixed import events, gradients, scaling
from tfmixed.gradients import Verdict
from tfmixed.records import Record
from tfmixed.scaling import ConstantScale, DynamicScale, ScalingRule, checks
from tfmixed.state import ScalingState


@keras.saving.register_keras_serializable(package="tfmixed")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """An optimizer that scales the loss and applies a step only if every unscaled gradient is finite.

    A drop-in for Keras's class of the same name: `compile` does not wrap it again, and learning rate, schedules,
    `iterations`, clipping, weight decay, EMA and gradient accumulation are the inner optimizer's. A skipped step leaves
    weights, inner state and `iterations` as they are.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`, or the name of one.
        scale: `"dynamic"`, a number (constant), a rule of `tfmixed.scaling`, or None (constant 1.0). Unlike in Keras,
            a number in second place is a constant scale.
        initial_scale: Keras's spelling: the first dynamic scale; with `dynamic=False` the constant one.
        dynamic_growth_steps: Keras's spelling of `growth_interval`.
        dynamic: Keras 2's spelling: False makes the scale constant.
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
        *,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        dynamic: bool | None = None,
        event_capacity: int = 256,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        rule = _rule_from(scale, initial_scale, dynamic_growth_steps, dynamic)
        super().__init__(
            _inner_from(inner_optimizer),
            initial_scale=float(rule.start().scale),
            dynamic_growth_steps=getattr(rule, "growth_interval", None),
            name=name,
            **kwargs,
        )
        self.rule = rule
        self.event_capacity = checks.count("event_capacity", event_capacity, 1)
        self._scaling: ScalingState | None = None
        self._paths: list[str] = []

    def build(self, variables: Sequence[Any]) -> None:
        """Creates all optimizer variables for the given trainable variables."""
        self._state()
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        self._paths = [getattr(variable, "path", variable.name) for variable in variables]
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
        return self._state().read("dynamic_scale")

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._state().set_scale(value)

    @property
    def dynamic_scale(self) -> keras.Variable:
        """The variable that holds the scale, whatever the rule."""
        return self._state().variables["dynamic_scale"]

    @property
    def step_counter(self) -> keras.Variable | None:
        """The variable that counts finite steps towards the next growth; None if the rule counts none."""
        return self._state().variables.get("step_counter")

    @property
    def attempted_steps(self) -> Any:
        """Steps so far, applied or skipped: an integer scalar tensor."""
        return self._state().read("attempted_steps")

    @property
    def skipped_steps(self) -> Any:
        """Steps skipped so far: an integer scalar tensor."""
        return self._state().read("skipped_steps")

    @property
    def consecutive_skips(self) -> Any:
        """Steps skipped since the last one that was applied: an integer scalar tensor."""
        return self._state().read("consecutive_skips")

    @property
    def gradient_norm(self) -> Any:
        """Global L2 norm of the last step's unscaled gradients, before clipping: a float32 scalar tensor."""
        return self._state().read("gradient_norm")

    def scale_loss(self, loss: Any) -> Any:
        """Returns `loss` times the scale, in float32 at least: most scales are too large for float16."""
        return ops.multiply(loss, self.loss_scale)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Applies gradients of the scaled loss, or skips the step if one of them is not finite.

        Args:
            grads: One gradient a variable: a tensor, `tf.IndexedSlices` or None.
            trainable_variables: The variables; None means those that the optimizer was built with.

        Raises:
            ValueError: All gradients are None.
            NotImplementedError: A distribution strategy runs more than one replica.
        """
        grads = list(grads)
        if not grads:
            return
        _check_any(grads)
        _check_one_replica()
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        unscaled, verdict = self._judge(grads, variables)
        if self.rule.skip_nonfinite:
            ops.cond(verdict.finite, lambda: self.inner_optimizer.apply(unscaled, variables), lambda: None)
        else:
            self.inner_optimizer.apply(unscaled, variables)
        self._state().advance(verdict)

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
        _check_any(grads)
        own, inner = optimizer_variables[: len(self._variables)], optimizer_variables[len(self._variables) :]
        with keras.StatelessScope(state_mapping=list(zip(self._variables, own, strict=True))) as scope:
            unscaled, verdict = self._judge(grads, self._trainable_variables)
            self._state().advance(verdict)
        new_own = [scope.get_current_value(variable) for variable in self._variables]

        def applied() -> tuple[list[Any], list[Any]]:
            return self.inner_optimizer.stateless_apply(inner, unscaled, trainable_variables)

        if not self.rule.skip_nonfinite:
            new_trainable, new_inner = applied()
        else:
            new_trainable, new_inner = ops.cond(
                verdict.finite, applied, lambda: (list(trainable_variables), list(inner))
            )
        return new_trainable, new_own + new_inner

    def _judge(self, grads: Sequence[Any], variables: Sequence[Any]) -> tuple[list[Any], Verdict]:
        scale = self.loss_scale
        # Variables that are overwritten with their gradient (float8 scales) hold it as it is.
        unscaled = [
            gradient if getattr(variable, "overwrite_with_gradient", False) else gradients.unscale(gradient, scale)
            for gradient, variable in zip(grads, variables, strict=True)
        ]
        indices = [self._get_variable_index(variable) for variable in variables]
        inner = self.inner_optimizer
        clips_by_norm = inner.clipnorm is not None or inner.global_clipnorm is not None
        return unscaled, gradients.judge(unscaled, indices, self.rule.needs_amax, clips_by_norm)

    def drain_events(self) -> list[Record]:
        """Returns the changes of the scale since the last call, oldest first, and forgets them.

        Reads the device. If more than `event_capacity` changes happened since, the list starts with an `EventsLost`
        that counts those that the ring no longer holds.
        """
        return events.drain(self._state().variables, self._paths)

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration: Keras's own four entries where they say it all."""
        config = {"name": self.name, "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer)}
        if self.rule == _dynamic_rule(self.initial_scale, self.dynamic_growth_steps):
            config |= {"initial_scale": self.initial_scale, "dynamic_growth_steps": self.dynamic_growth_steps}
        else:
            config["scale"] = self.rule.get_config()
        return config if self.event_capacity == 256 else {**config, "event_capacity": self.event_capacity}

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
        if not inner.keys() <= saved.keys():
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}: the inner optimizer of the file has other "
                f"variables than {type(self.inner_optimizer).__name__} here, or the optimizer is not built yet.",
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


def _rule_from(
    scale: Any, initial_scale: float | None, dynamic_growth_steps: int | None, dynamic: bool | None
) -> ScalingRule:
    if (initial_scale, dynamic_growth_steps, dynamic) == (None, None, None):
        return scaling.get(scale)
    if scale != "dynamic":
        raise ValueError(
            "scale and Keras's initial_scale, dynamic_growth_steps, dynamic exclude each other, "
            f"received scale={scale!r}: put the numbers into the rule"
        )
    if dynamic or dynamic is None:
        return _dynamic_rule(initial_scale, dynamic_growth_steps)
    if initial_scale is None or dynamic_growth_steps is not None:
        raise ValueError(
            "dynamic=False is a constant scale: it needs initial_scale and no dynamic_growth_steps, received "
            f"initial_scale={initial_scale!r}, dynamic_growth_steps={dynamic_growth_steps!r}. Pass `scale=128`, or set "
            "`loss_scale_factor` on the inner optimizer to scale without any check"
        )
    return ConstantScale(initial_scale)


def _dynamic_rule(initial_scale: float | None, growth_interval: int | None) -> DynamicScale:
    """Returns Keras's rule within bounds: the default ones, widened to hold the initial scale."""
    default = DynamicScale()
    first = default.initial_scale if initial_scale is None else checks.scale("initial_scale", initial_scale)
    return DynamicScale(
        initial_scale=first,
        growth_interval=default.growth_interval if growth_interval is None else growth_interval,
        min_scale=min(first, 1.0),
        max_scale=max(first, 2.0**24),
    )


def _inner_from(optimizer: Any) -> keras.optimizers.Optimizer:
    inner = keras.optimizers.get(optimizer) if isinstance(optimizer, str) else optimizer
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(f"inner_optimizer must not scale the loss itself, received {type(inner).__name__}")
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"inner_optimizer must be a keras.optimizers.Optimizer or its name, received {inner!r}")
    return inner


def _check_any(grads: Sequence[Any]) -> None:
    if all(gradient is None for gradient in grads):
        raise ValueError(
            f"grads must hold at least one gradient, received {len(grads)} times None: the loss does not depend on "
            "any of the trainable variables"
        )


def _check_one_replica() -> None:
    # Replicas that judged their own gradients only would part ways, and hang or destroy the weights.
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow

    replicas = tensorflow.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise NotImplementedError(
            "LossScaleOptimizer does not support distribution strategies of several replicas yet. Received: a "
            f"strategy of {replicas}. Train on one device, or in mixed_bfloat16, which needs no loss scaling."
        )
