"""Keras optimizer that scales the loss, skips non-finite steps and records every change of the scale."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import keras
from keras import ops

from tfmixed._core import arguments, gradients, optimizer_precision, replica_sync, scalar_ops
from tfmixed._core.control_flow import cond
from tfmixed._core.finite_check import FiniteCheck
from tfmixed._core.fused_update import Fuser, Fusion
from tfmixed._core.hyperparameters import DelegatedHyperparameters, check_any
from tfmixed._core.keras2_methods import Keras2Methods
from tfmixed._core.low_precision_optimizer import LowPrecisionOptimizer
from tfmixed._core.scaler_state import ScalerState
from tfmixed._core.scaling_calls import ScalingCalls
from tfmixed._core.serialization import Serialization
from tfmixed._utils.patching import do_not_convert
from tfmixed.scaling import validation


@keras.saving.register_keras_serializable(package="tfmixed")
class LossScaleOptimizer(Keras2Methods, DelegatedHyperparameters, Serialization):
    """An optimizer that scales the loss, and applies a step only if all unscaled gradients and their norm are finite.

    A drop-in replacement for Keras's class of the same name, which `compile` does not wrap again. Learning rate,
    schedules, `iterations`, clipping, weight decay, EMA, gradient accumulation and attributes of the inner optimizer's
    own class, such as `beta_1`, are read from the inner optimizer and set on it. A skipped step leaves weights, inner
    state and `iterations` unchanged.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`, or its name.
        scale: `"dynamic"`, a number (constant), a rule of `tfmixed.scaling`, or None (constant 1.0). Unlike in Keras
            3, a number in second place is a constant scale. As in Keras 2, True and False there stand for `dynamic`.
            Defaults to `"dynamic"`.
        initial_scale: Keras's name of the initial dynamic scale, or of the constant one with `dynamic=False`.
        dynamic_growth_steps: Keras's name of `growth_interval`.
        dynamic: Keras 2's argument. False makes the scale constant.
        max_consecutive_skips: Number of steps skipped in a row after which `raise_if_exhausted` raises an error, or
            None for never. Defaults to 100.
        fuse: `"auto"` compiles unscaling and the inner optimizer's step into one XLA function where that is possible
            and faster: on TensorFlow, without a strategy, for large variables. True compiles small ones too, False
            nothing. `fused` tells the outcome. Results differ by rounding. Defaults to `"auto"`.
        event_capacity: Number of scale changes that the buffer on the device holds between two calls of
            `drain_events`, 40 bytes each. Defaults to 256.
        name: Name of the optimizer.
        **kwargs: Not supported, as in Keras: arguments of the base optimizer belong to the inner one. Defaults are
            accepted, since old files contain them.

    Raises:
        ValueError: If an argument is out of range, or two of them contradict each other.
        TypeError: If `inner_optimizer` is not an optimizer.

    Source: Micikevicius et al., "Mixed Precision Training", 2017. Each rule names its own.

    Example:
    >>> optimizer = LossScaleOptimizer("adam", scale=1024)
    >>> float(optimizer.scale_loss(2.0))
    2048.0
    """

    _FIXED = ("rule", "initial_scale", "dynamic_growth_steps")

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        scale: Any = "dynamic",
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        *,
        dynamic: bool | None = None,
        max_consecutive_skips: int | None = 100,
        fuse: bool | Literal["auto"] = "auto",
        event_capacity: int = 256,
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
        self.max_consecutive_skips = arguments.skip_limit(max_consecutive_skips)
        self.event_capacity = validation.count("event_capacity", event_capacity, 1)
        self._fuser = Fuser(fuse)
        self._calls = ScalingCalls(scales=rule.bounds != (1.0, 1.0))
        self._scaling: ScalerState | None = None
        self._paths: list[str] = []
        self._delegate()

    def build(self, variables: Sequence[Any]) -> None:
        """Creates all optimizer variables for the given trainable variables.

        Warns once if half-precision variables round the inner optimizer's constants away.

        Raises:
            NotImplementedError: If the distribution strategy is of an untested kind.
        """
        replica_sync.check_supported(self.inner_optimizer)
        self._state().add_overflow_counts(len(variables), self.add_variable)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        optimizer_precision.report(self.inner_optimizer, variables)
        self._paths = [gradients.path(variable) for variable in variables]
        # Keras's LossScaleOptimizer.build would add its own two variables.
        self._build_base(variables)

    def _state(self) -> ScalerState:
        # Created on first use, so that a loss scaled before `build` reads the variable and not a number.
        if self._scaling is None:
            is_jax = keras.backend.backend() == "jax"
            self._scaling = ScalerState(self.rule, self.event_capacity, self.add_variable, is_packed=is_jax)
        return self._scaling

    @property
    def loss_scale(self) -> Any:
        """The scale of the next step, a float32 scalar tensor. Assigning to it is logged as a change."""
        return self._read("dynamic_scale")

    @loss_scale.setter
    def loss_scale(self, value: Any) -> None:
        self._state().set_scale(value)

    @property
    def dynamic_scale(self) -> keras.Variable | None:
        """The variable that holds the scale of any rule. None before the optimizer is built or used."""
        return None if self._scaling is None else self._scaling.variables["dynamic_scale"]

    @property
    def step_counter(self) -> keras.Variable | None:
        """The variable that counts finite steps towards the next growth. None if there is none, or none yet."""
        return None if self._scaling is None else self._scaling.variables.get("step_counter")

    @property
    def fused(self) -> Fusion:
        """Tells whether the last traced update is fused, and why. True as a bool if it is."""
        inner = self.inner_optimizer
        return inner.fused if isinstance(inner, LowPrecisionOptimizer) else self._fuser.fusion

    @do_not_convert
    def scale_loss(self, loss: Any) -> Any:
        """Returns `loss` times the scale, in float32 at least, since most scales are too large for float16."""
        scaled = ops.multiply(loss, self.loss_scale)
        self._calls.scale("scaled", [loss], [scaled])
        return scaled

    @do_not_convert
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Applies gradients of the scaled loss, or skips the step if one of them is not finite.

        Args:
            grads: One gradient for each variable: a tensor, `tf.IndexedSlices` or None. Gradients that
                `get_unscaled_gradients` has unscaled are taken as they are.
            trainable_variables: The variables. Defaults to those that the optimizer was built with.

        Raises:
            ValueError: If all gradients are None, their number is not that of the variables, or a variable is not one
                that the optimizer was built with.
            NotImplementedError: If the distribution strategy is of an untested kind, or the inner optimizer accumulates
                gradients or overwrites weights by their averages in a compiled step of `MirroredStrategy`.
            RuntimeError: If it is called outside of `strategy.run`, or cannot know whether the gradients are scaled.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._variables_of(grads, trainable_variables)
        indices, scale, check = self._indices(variables), self._gradient_scale(grads), self._finite_check()
        update = self._fuser.step(self.inner_optimizer, variables, indices, grads, self.rule.bounds[1])
        written = [*variables, *self.inner_optimizer.variables]
        statistics = check.measure(grads, scale, indices, replica_sync.replica_id())  # of this replica, in one pass

        # Under strategies that merge replicas, `run` calls the function of replica 0 for all of them. It captures that
        # replica's `scale`, which has the same value on all, and mirrored variables. Gradients are arguments instead.
        def joint_step(replicas: replica_sync.Replicas, statistics: Any, grads: Sequence[Any]) -> None:
            result = check.result(replicas.sum(statistics))  # the same on every replica
            is_applied = result.finite if self.rule.skip_nonfinite else True
            cond(is_applied, partial(replicas.call, update, grads, scale), variables=written)
            self._state().advance(result)

        replica_sync.run_jointly(joint_step, statistics, grads)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Does what `apply` does on values instead of variables, for the JAX backend.

        Args:
            optimizer_variables: Values of `self.variables`.
            grads: One gradient for each trainable variable.
            trainable_variables: Values of the trainable variables.

        Returns:
            The new values of the trainable variables and of `self.variables`.

        Raises:
            ValueError: If the optimizer is not built, or all gradients are None.
        """
        if not self.built:
            raise ValueError("`stateless_apply` needs a built optimizer. Call `build(trainable_variables)` first.")
        if not grads:
            return list(trainable_variables), list(optimizer_variables)
        check_any(grads)
        own = self.variables[: -len(self.inner_optimizer.variables)]
        values, inner = optimizer_variables[: len(own)], optimizer_variables[len(own) :]
        with keras.StatelessScope(state_mapping=list(zip(own, values, strict=True))) as scope:
            scale, check = self._gradient_scale(grads), self._finite_check()
            result = check.result(check.measure(grads, scale, range(len(grads))))
            self._state().advance(result)
        new_own = [scope.get_current_value(variable) for variable in own]

        def update() -> tuple[list[Any], list[Any]]:
            unscaled = self._unscale(grads, scale, self._trainable_variables)
            return self.inner_optimizer.stateless_apply(inner, unscaled, trainable_variables)

        def skip() -> tuple[list[Any], list[Any]]:
            return list(trainable_variables), list(inner)

        new_trainable, new_inner = ops.cond(result.finite, update, skip) if self.rule.skip_nonfinite else update()
        return new_trainable, new_own + new_inner

    def _gradient_scale(self, grads: Sequence[Any]) -> Any:
        """Returns the scale of gradients that are applied: 1 if they are unscaled, else the loss scale."""
        if self._calls.are_unscaled(grads):
            return scalar_ops.ones((), "float32")
        return self._state().read("dynamic_scale")

    def _finite_check(self) -> FiniteCheck:
        inner, variables, count = self.inner_optimizer, self._trainable_variables, replica_sync.replica_count()
        return FiniteCheck.for_variables(inner, variables, count, self.rule.needs_amax)

    def _unscale(self, grads: Sequence[Any], scale: Any, variables: Sequence[Any]) -> list[Any]:
        return gradients.unscale_all(grads, gradients.raw(variables), scale, self.rule.bounds[1])

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Does what Keras does at the end of `fit`, and warns if most of its steps were skipped.

        Raises:
            LossScaleExhausted: If all recent steps were skipped and the scale is at its minimum; see
                `raise_if_exhausted`.
        """
        super().finalize_variable_values(var_list)
        self._calls.end_fit()
        # On JAX, `fit` calls this after an exception too, with variables that may be empty. That exception matters.
        if keras.backend.backend() != "jax" or sys.exc_info()[0] is None:
            self.raise_if_exhausted()
            self._end_run()
