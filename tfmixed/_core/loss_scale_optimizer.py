"""The Keras optimizer that scales losses, skips non-finite steps and remembers every change of the scale."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
from keras import ops

from tfmixed._core import arguments, gradients, replica_sync
from tfmixed._core.control_flow import as_it_is, when
from tfmixed._core.delegation import Delegating
from tfmixed._core.finite_check import Judge
from tfmixed._core.fused_update import Call, Fuser, Fusion
from tfmixed._core.keras2_methods import ByHand
from tfmixed._core.scaler_state import ScalingState
from tfmixed._core.scaling_calls import Calls
from tfmixed._core.serialization import Saved
from tfmixed.scaling import validation


@keras.saving.register_keras_serializable(package="tfmixed")
class LossScaleOptimizer(ByHand, Delegating, Saved):
    """An optimizer that scales the loss and applies a step only if every unscaled gradient, and their norm, is finite.

    A drop-in for Keras's class of the same name: `compile` does not wrap it again. Learning rate, schedules,
    `iterations`, clipping, weight decay, EMA, gradient accumulation and attributes of the inner optimizer's own class,
    such as `beta_1`, are read from the inner optimizer and set on it. A skipped step leaves weights, inner state and
    `iterations` as they are.

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
        self._calls = Calls(scales=rule.bounds != (1.0, 1.0))
        self._scaling: ScalingState | None = None
        self._paths: list[str] = []
        self._delegate()

    def build(self, variables: Sequence[Any]) -> None:
        """Creates all optimizer variables for the given trainable variables.

        Raises:
            NotImplementedError: The distribution strategy is of an untested kind.
        """
        replica_sync.check_supported(self.inner_optimizer)
        self._state().watch(len(variables), self.add_variable)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        self._paths = [gradients.path(variable) for variable in variables]
        # Keras's LossScaleOptimizer.build would add its own two variables: its base class does the rest.
        self._build_base(variables)

    def _state(self) -> ScalingState:
        # Made on first use, so that a loss scaled before `build` reads the variable and not a number.
        if self._scaling is None:
            self._scaling = ScalingState(self.rule, self.event_capacity, self.add_variable)
        return self._scaling

    @property
    def loss_scale(self) -> Any:
        """The scale of the next step, a float32 scalar tensor. Assigning to it is logged as a change by hand."""
        return self._scale()

    @loss_scale.setter
    def loss_scale(self, value: Any) -> None:
        self._state().set_scale(value)

    @property
    def dynamic_scale(self) -> keras.Variable | None:
        """The variable that holds the scale, whatever the rule; None before the optimizer is built or used."""
        return None if self._scaling is None else self._scaling.variables["dynamic_scale"]

    @property
    def step_counter(self) -> keras.Variable | None:
        """The variable that counts finite steps towards the next growth; None if there is none, or none yet."""
        return None if self._scaling is None else self._scaling.variables.get("step_counter")

    @property
    def fused(self) -> Fusion:
        """Whether the last update that was traced is fused, and why. As a bool: whether it is."""
        return self._fuser.fusion

    @as_it_is
    def scale_loss(self, loss: Any) -> Any:
        """Returns `loss` times the scale, in float32 at least: most scales are too large for float16."""
        self._calls.scale("scaled", [loss])
        scaled = ops.multiply(loss, self._scale())
        self._calls.scaled([scaled])
        return scaled

    def _scale_of_gradients(self, grads: Sequence[Any]) -> Any:
        """Returns the factor of the gradients that are applied: 1 if they are unscaled, else the scale."""
        return ops.ones((), "float32") if self._calls.are_unscaled(grads) else self._scale()

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
        variables = self._variables_of(grads, trainable_variables)
        replica_sync.check_supported(self.inner_optimizer)
        judge, indices = self._judge(), self._indices(variables)
        scale = self._scale_of_gradients(grads)
        update = self._update(grads, variables, indices)

        def decide(total: Any, on_each: Any) -> None:
            verdict = judge.verdict(total)

            def apply() -> None:
                on_each(lambda grads: update(grads, scale))

            if self.rule.skip_nonfinite:
                when(verdict.finite, apply, variables=(*variables, *self.inner_optimizer.variables))
            else:
                apply()
            self._state().advance(verdict)

        replica_sync.decide_together(decide, judge.evidence(grads, scale, indices, replica_sync.replica()), grads)

    def _variables_of(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None) -> list[Any]:
        """Returns the variables of gradients, with which the optimizer is built from now on."""
        _check_any(grads)
        if not self.built:
            if trainable_variables is None:
                raise ValueError(
                    "trainable_variables must be passed to an optimizer that is not built, received None: pass them, "
                    "or call `optimizer.build(trainable_variables)` first"
                )
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"grads must hold one gradient a variable, received {len(grads)} for {len(variables)} variables"
            )
        return variables

    def _update(
        self, grads: Sequence[Any], variables: Sequence[Any], indices: Sequence[int]
    ) -> Callable[[Sequence[Any], Any], None]:
        """Returns what unscales gradients and applies them, fused where that is possible and faster."""

        def apply(grads: Sequence[Any], variables: Sequence[Any], scale: Any) -> None:
            self.inner_optimizer.apply(self._unscale(grads, scale, variables), list(variables))

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
            scale = self._scale_of_gradients(grads)
            verdict = judge.verdict(judge.evidence(grads, scale, indices))
            self._state().advance(verdict)
        new_own = [scope.get_current_value(variable) for variable in own]

        def applied() -> tuple[list[Any], list[Any]]:
            unscaled = self._unscale(grads, scale, self._trainable_variables)
            return self.inner_optimizer.stateless_apply(inner, unscaled, trainable_variables)

        def skipped() -> tuple[list[Any], list[Any]]:
            return list(trainable_variables), list(inner)

        skips = self.rule.skip_nonfinite
        new_trainable, new_inner = ops.cond(verdict.finite, applied, skipped) if skips else applied()
        return new_trainable, new_own + new_inner

    def _judge(self) -> Judge:
        variables = self._trainable_variables
        return Judge.of(self.inner_optimizer, variables, replica_sync.replicas(), self.rule.needs_amax)

    def _indices(self, variables: Sequence[Any]) -> list[int]:
        try:
            return [self._get_variable_index(variable) for variable in variables]
        except KeyError:
            known, names = ", ".join(self._paths), ", ".join(gradients.path(variable) for variable in variables)
            raise ValueError(
                f"trainable_variables must be among those that the optimizer was built with ({known}), received {names}"
            ) from None

    def _unscale(self, grads: Sequence[Any], scale: Any, variables: Sequence[Any]) -> list[Any]:
        return gradients.unscale_all(grads, gradients.raw(variables), scale, self.rule.bounds[1])

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Does what Keras does at the end of `fit`, and warns if most of its steps were skipped.

        Raises:
            LossScaleExhausted: If step after step was skipped, and the scale is at its floor; see `raise_if_exhausted`.
        """
        super().finalize_variable_values(var_list)
        self._calls.end_fit()
        # On JAX, `fit` calls this after an exception too, with variables that may be empty: let that one through.
        if keras.backend.backend() != "jax" or sys.exc_info()[0] is None:
            self.raise_if_exhausted()
            self._end_run()


def _check_any(grads: Sequence[Any]) -> None:
    if all(gradient is None for gradient in grads):
        raise ValueError(
            f"grads must hold at least one gradient, received {len(grads)} times None: the loss does not depend on "
            "any of the trainable variables"
        )
