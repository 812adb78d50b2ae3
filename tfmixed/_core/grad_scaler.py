"""PyTorch's `GradScaler`, for custom training loops."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from tfmixed import scaling
from tfmixed._core import arguments, gradients, optimizer_adapters, replica_sync, scalar_ops
from tfmixed._core.control_flow import cond, in_graph, in_session_graph
from tfmixed._core.finite_check import FiniteCheck
from tfmixed._core.fused_update import Fuser, Step
from tfmixed._core.scaler_state import ScalerState
from tfmixed._core.state_dict import StateDict
from tfmixed._core.step_tracker import Method, OptimizerSteps, StepTracker
from tfmixed._core.variables import plain_variable
from tfmixed._utils.patching import do_not_convert
from tfmixed.scaling import validation

_TORCH = scaling.PEERS["torch"].defaults


class GradScaler(StateDict):
    """Scales losses, unscales gradients, and steps an optimizer only if all of them are finite.

        scaler = GradScaler()
        for x, y in batches:
            with tf.GradientTape() as tape:
                loss = loss_function(y, model(x, training=True))
                scaled = scaler.scale(loss)
            grads = tape.gradient(scaled, model.trainable_variables)
            grads = scaler.unscale(optimizer, grads)  # if they are clipped or inspected
            grads, _ = tf.clip_by_global_norm(grads, 1.0)
            stepped = scaler.step(optimizer, zip(grads, model.trainable_variables))
            scaler.update()

    Names, defaults and order of calls are PyTorch's, and so is the rule, bit for bit. Each part can run eagerly, in a
    `tf.function` or in the function of `strategy.run`, where all replicas take the same branch. Several losses and
    optimizers share one scale: those whose gradients overflow skip, and `update` backs off once. Unlike in PyTorch,
    gradients are checked after they are unscaled (pytorch#99640), the scale never reaches 0 or inf (#98828), and `step`
    returns whether it stepped (#67590).

    Args:
        init_scale: Initial scale. Defaults to 65536.
        growth_factor: Factor of a growth. Defaults to 2.
        backoff_factor: Factor of a backoff. Defaults to 0.5.
        growth_interval: Number of finite iterations in a row after which the scale grows. Defaults to 2000.
        enabled: If False, all methods pass their arguments through. Defaults to True.
        rule: A rule instead of the four numbers, as in `scaling.get`. Defaults to None.
        device: PyTorch's argument, ignored.
        max_consecutive_skips: As in `LossScaleOptimizer`.
        event_capacity: As in `LossScaleOptimizer`.

    Raises:
        ValueError: If an argument is out of range, or numbers and a rule are given.

    Calls in a wrong order raise a `RuntimeError` as far as it is known: always eagerly, and in a compiled function if
    all calls are traced in it. A compiled `update` without a preceding call changes nothing, and a second `step` of an
    optimizer is reported by the next eager `update`. Optimizers and their variables are not kept alive.

    A scaler can be pickled and copied between two iterations, without its events. `tf.train.Checkpoint` takes the list
    of `variable.value` for its `variables`.

    Example:
    >>> scaler, optimizer, weight = GradScaler(init_scale=8.0), keras.optimizers.SGD(1.0), keras.Variable(1.0)
    >>> for gradient in (4.0, float("inf")):
    ...     stepped = scaler.step(optimizer, [(ops.convert_to_tensor(gradient), weight)])
    ...     scaler.update()
    ...     print(bool(stepped), float(weight.value), scaler.get_scale())
    True 0.5 8.0
    False 0.5 4.0
    """

    def __init__(
        self,
        init_scale: float = _TORCH["initial_scale"],
        growth_factor: float = _TORCH["growth_factor"],
        backoff_factor: float = _TORCH["backoff_factor"],
        growth_interval: int = _TORCH["growth_interval"],
        enabled: bool = True,
        rule: Any = None,
        *,
        device: str | None = None,
        max_consecutive_skips: int | None = 100,
        event_capacity: int = 256,
    ) -> None:
        del device
        numbers = {
            "initial_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }
        self.rule = arguments.scaler_rule(rule, numbers) if enabled else scaling.ConstantScale(1.0)
        self._enabled = enabled
        self.max_consecutive_skips = arguments.skip_limit(max_consecutive_skips)
        self.event_capacity = validation.count("event_capacity", event_capacity, 1)
        self._reset()

    def _reset(self) -> None:
        self._scaling: ScalerState | None = None
        self._is_compiled = False
        self.distribute_strategy: Any = None
        self._steps: weakref.WeakKeyDictionary[Any, OptimizerSteps] = weakref.WeakKeyDictionary()
        self._paths: list[str] = []

    def _state(self) -> ScalerState:
        # Created on first use, since PyTorch's scaler may be created before anything else.
        if in_session_graph():
            raise NotImplementedError(
                "`GradScaler` works eagerly and in a `tf.function`. A graph for a `Session` runs only what is fetched. "
                "Use `tfmixed.compat.v1` there."
            )
        if self._scaling is None:
            self.distribute_strategy = replica_sync.current_strategy()
            self._step_tracker = StepTracker(plain_variable)
            self._scaling = ScalerState(self.rule, self.event_capacity, plain_variable)
        self._is_compiled |= in_graph()
        return self._scaling

    @do_not_convert
    def scale(self, outputs: Any) -> Any:
        """Returns losses times the scale, in float32 at least, since most scales are too large for float16.

        Args:
            outputs: A tensor, a nested structure of tensors, or an iterator over these, for which one is returned.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, Iterator):
            return map(self.scale, outputs)
        scale = scalar_ops.tensor(self._state().read("dynamic_scale"))
        self._step_tracker.note_scale()
        return keras.tree.map_structure(lambda output: ops.multiply(output, scale), outputs)

    @do_not_convert
    def unscale(self, optimizer: Any, grads: Iterable[Any]) -> list[Any]:
        """Returns gradients divided by the scale, to clip or inspect them before `step`.

        Overflows are remembered, so that no clip hides one, and `update` counts them without a `step`.

        Args:
            optimizer: Optimizer of these gradients. If variables hold their gradients, as those of float8 layers do,
                it must be built with the variables of these gradients, in their order.
            grads: Tensors, `tf.IndexedSlices` and None.

        Raises:
            RuntimeError: If the optimizer's gradients were unscaled already in this iteration, it has stepped already,
                there is no gradient, or one of them is unscaled already.
            ValueError: If the optimizer scales the loss itself.
            TypeError: If it is not an optimizer, or one of `grads` is not a gradient.
            NotImplementedError: If it is called in a graph for a `Session`.
        """
        grads = optimizer_adapters.check_gradients(grads)
        if not self._enabled:
            return grads
        steps, scale = self._steps_of(optimizer, grads, "unscale"), self._state().read("dynamic_scale")
        variables = optimizer_adapters.variables_of(optimizer, len(grads))
        steps.has_unknown_variables = variables is None
        raw = [False] * len(grads) if variables is None else gradients.raw(variables)
        given, raw_given = zip(*(pair for pair in zip(grads, raw, strict=True) if pair[0] is not None), strict=True)
        check = FiniteCheck.for_gradients(raw_given, replica_sync.replica_count(), self.rule.needs_amax)
        statistics = check.measure(given, scale, range(len(given)), replica_sync.replica_id())

        def record(replicas: replica_sync.Replicas, statistics: Any) -> None:
            self._step_tracker.unscale(steps, check.result(replicas.sum(statistics)))

        replica_sync.run_jointly(record, statistics)
        unscaled = gradients.unscale_all(grads, raw, scale, self.rule.bounds[1])
        steps.remember(grads, unscaled)
        return unscaled

    @do_not_convert
    def step(self, optimizer: Any, grads_and_vars: Iterable[tuple[Any, Any]], **options: Any) -> Any:
        """Steps the optimizer if all gradients are finite on all replicas, and returns whether it did.

        Args:
            optimizer: One of Keras, or one with `apply_gradients`, such as those of `tf.compat.v1.train`.
            grads_and_vars: Pairs of a gradient and its variable. The gradients are those of the scaled losses, or what
                `unscale` returned, clipped or not.
            **options: Arguments for `apply_gradients`, such as `global_step`.

        Returns:
            A boolean scalar tensor.

        Raises:
            RuntimeError: If it has stepped already in this iteration, there is no gradient, or the gradients are still
                scaled, or unscaled for another optimizer or before an `update`.
            ValueError: If the optimizer scales the loss itself.
            TypeError: If it is not an optimizer, or `grads_and_vars` holds other things.
            NotImplementedError: If it is called in a graph for a `Session`; or see `LossScaleOptimizer.apply`.
        """
        grads, variables = optimizer_adapters.split(grads_and_vars)
        if not self._enabled:
            optimizer_adapters.apply(optimizer, grads, variables, options)
            return ops.convert_to_tensor(True)
        steps = self._steps_of(optimizer, grads, "step")
        steps.check_raw(variables)
        optimizer_adapters.build(optimizer, variables)
        replica_sync.check_supported(optimizer)  # the parts of a `MultiOptimizer` may not be known before
        indices = steps.add(variables, self._paths)
        present = [index for index, gradient in zip(indices, grads, strict=True) if gradient is not None]
        was_unscaled, is_row = steps.is_unscaled(self._step_tracker.mark()), self._state().read("consecutive_skips") > 0
        scale = scalar_ops.where(was_unscaled, 1.0, self._state().read("dynamic_scale"))
        count = replica_sync.replica_count()
        check = FiniteCheck.for_variables(optimizer, steps.trained, count, self.rule.needs_amax)
        update = self._update(optimizer, variables, grads, options)
        statistics = check.measure(grads, scale, indices, replica_sync.replica_id())

        # As in `LossScaleOptimizer.apply`: captures from replica 0 are scalars that are the same on all replicas.
        def joint_step(replicas: replica_sync.Replicas, statistics: Any, grads: Sequence[Any]) -> Any:
            result = steps.complete(check.result(replicas.sum(statistics)), was_unscaled, present)
            is_applied = result.finite if self.rule.skip_nonfinite else True
            written = optimizer_adapters.written_variables(optimizer, variables)
            cond(is_applied, functools.partial(replicas.call, update, grads, scale), variables=written)
            self._step_tracker.step(steps, result, is_row)
            return ops.convert_to_tensor(is_applied)

        return replica_sync.run_jointly(joint_step, statistics, grads)

    def _steps_of(self, optimizer: Any, grads: Sequence[Any], method: Method) -> OptimizerSteps:
        """Returns the progress of an optimizer, and checks that it may do this now."""
        optimizer_adapters.check(optimizer)
        self._state()
        if optimizer not in self._steps:
            self._steps[optimizer] = OptimizerSteps(plain_variable)
        self._step_tracker.check(self._steps[optimizer], grads, method)
        return self._steps[optimizer]

    def _update(self, optimizer: Any, variables: Sequence[Any], grads: Sequence[Any], options: Any) -> Step:
        """Returns the function of gradients and their scale that updates variables."""
        largest = self.rule.bounds[1]
        if optimizer_adapters.is_keras(optimizer):
            # An attribute, since a value of `_steps` that holds the optimizer would keep it alive.
            fusers = vars(optimizer).setdefault("_tfmixed_fusers", {})
            keys = list(map(id, variables))  # other scalers number the variables in another way
            return fusers.setdefault(largest, Fuser("auto")).step(optimizer, variables, keys, grads, largest)

        def update(grads: Sequence[Any], scale: Any) -> None:
            unscaled = gradients.unscale_all(grads, gradients.raw(variables), scale, largest)
            optimizer_adapters.apply(optimizer, unscaled, variables, options)

        return update

    @do_not_convert
    def update(self, new_scale: Any = None) -> None:
        """Ends the iteration: moves the scale by the rule, once for all optimizers that unscaled or stepped.

        Args:
            new_scale: A number or a scalar tensor that replaces the scale, logged as `"set"`. Defaults to None, which
                follows the rule.

        Raises:
            RuntimeError: If no optimizer has unscaled or stepped, or one has stepped twice, and `new_scale` is None.
            ValueError: If `new_scale` is outside of the rule's bounds.
        """
        if not self._enabled:
            return
        self._state()
        if new_scale is None:
            self._step_tracker.check_update()
        replica_sync.run_jointly_once(functools.partial(self._close, new_scale), self.distribute_strategy)

    def _close(self, new_scale: Any) -> None:
        state, tracker = self._state(), self._step_tracker
        if new_scale is not None:
            state.set_scale(new_scale, "new_scale")
        cond(tracker.read("begun") > 0, lambda: state.advance(tracker.result(), moves=new_scale is None))
        tracker.close()

    def _overflow_counts(self) -> dict[str, int]:
        since = int(self._step_tracker.mark()) - int(self.consecutive_skips)
        counts = [steps.overflow_counts(since) for steps in list(self._steps.values())]
        return {path: count for by_path in counts for path, count in by_path.items()}

    def is_enabled(self) -> bool:
        """Returns whether this scaler does anything."""
        return self._enabled

    def get_scale(self) -> Any:
        """Returns the scale as a float, or as a tensor while a graph is built."""
        return self.loss_scale if in_graph() else float(self.loss_scale)

    def __reduce__(self) -> tuple[Any, ...]:
        limits = {name: getattr(self, name) for name in ("max_consecutive_skips", "event_capacity")}
        rule = self.rule if self._enabled else None
        make = functools.partial(type(self), enabled=self._enabled, rule=rule, **limits)
        return make, (), None if self._scaling is None else self.state_dict()

    def __setstate__(self, state_dict: Mapping[str, Any]) -> None:
        self.load_state_dict(state_dict)
