"""PyTorch's `GradScaler`, for loops that are written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from tfmixed import scaling
from tfmixed._core import arguments, gradients, optimizer_adapters, replica_sync
from tfmixed._core.control_flow import as_it_is, in_graph, when
from tfmixed._core.finite_check import Judge
from tfmixed._core.lasting import Lasting
from tfmixed._core.step_tracker import Method
from tfmixed._core.turn import Turn
from tfmixed._core.variables import plain_variable

_TORCH = scaling.PEERS["torch"].defaults


class GradScaler(Lasting):
    """Scales losses, unscales gradients, and steps an optimizer only if all of them are finite.

        scaler = GradScaler()
        for x, y in batches:
            with tf.GradientTape() as tape:
                loss = loss_function(y, model(x, training=True))
                scaled = scaler.scale(loss)
            grads = tape.gradient(scaled, model.trainable_variables)
            grads = scaler.unscale(optimizer, grads)  # if they are to be clipped or looked at
            grads, _ = tf.clip_by_global_norm(grads, 1.0)
            stepped = scaler.step(optimizer, zip(grads, model.trainable_variables))
            scaler.update()

    Names, defaults and order of calls are PyTorch's, and so is the rule, to the bit. Any part may run eagerly, in a
    `tf.function` or in the function of `strategy.run`, where all replicas decide together. Several losses and
    optimizers share one scale: those whose gradients overflow skip, and at `update` the scale backs off once. Unlike in
    PyTorch gradients are judged after they are unscaled (pytorch#99640), the scale never reaches 0 or inf (#98828), and
    `step` says whether it stepped (#67590).

    Args:
        init_scale: The first scale.
        growth_factor: Factor of a growth.
        backoff_factor: Factor of a backoff.
        growth_interval: Good iterations in a row that let the scale grow.
        enabled: False makes all methods pass through what they are given.
        rule: Instead of the four numbers: whatever `scaling.get` takes.
        device: PyTorch's, taken by name and ignored.
        max_consecutive_skips: As in `LossScaleOptimizer`.
        event_capacity: As in `LossScaleOptimizer`.

    Raises:
        ValueError: An argument is out of range, or numbers and a rule are given.

    A wrong order of calls is a `RuntimeError`, as far as it can be known: eagerly always; while a function is compiled,
    within that function. There an `update` that nothing preceded changes nothing, and a second `step` of an optimizer
    is told by the next `update` that runs eagerly. Optimizers and their variables are not kept alive.

    It can be pickled and copied between two iterations, without its events. `tf.train.Checkpoint` takes the list of
    `variable.value` for each of its `variables`.

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
        chosen = arguments.scaler_rule(rule, numbers) if enabled else scaling.ConstantScale(1.0)
        super().__init__(chosen, enabled, max_consecutive_skips, event_capacity)

    def _admit(self, optimizer: Any, grads: Sequence[Any], method: Method) -> Turn:
        """Lets an optimizer do what is its turn, and raises if it is not."""
        optimizer_adapters.check(optimizer)
        self._state()
        if optimizer not in self._turns:
            self._turns[optimizer] = Turn(plain_variable)
        turn = self._turns[optimizer]
        self._iteration.check(turn, grads, method)
        return turn

    def get_scale(self) -> Any:
        """Returns the scale as a float; where it is not known, because a graph is being made, as a tensor."""
        return self.loss_scale if in_graph() else float(self.loss_scale)

    @as_it_is
    def scale(self, outputs: Any) -> Any:
        """Returns losses times the scale, in float32 at least: most scales are too large for float16.

        Args:
            outputs: A tensor, a nested structure of them, or an iterator over these, for which one is returned.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, Iterator):
            return map(self.scale, outputs)
        scale = self._state().read("dynamic_scale")
        self._iteration.note_scale()
        return keras.tree.map_structure(lambda output: ops.multiply(output, scale), outputs)

    @as_it_is
    def unscale(self, optimizer: Any, grads: Iterable[Any]) -> list[Any]:
        """Returns gradients divided by the scale, to clip or look at them before `step`.

        Whether they are finite is remembered: no clip can hide an overflow, and `update` counts it without a `step`.

        Args:
            optimizer: The one that they will be given to. Where variables hold their gradients, as float8 layers' do,
                it must be built with the variables of these gradients, in their order.
            grads: Tensors, `tf.IndexedSlices` and None.

        Raises:
            RuntimeError: In this iteration the optimizer's gradients were unscaled already, it has stepped already, or
                there is no gradient, or one that is unscaled already.
            ValueError: The optimizer scales the loss itself.
            TypeError: It is none, or one of `grads` is no gradient.
            NotImplementedError: It is called in a graph for a `Session`.
        """
        grads = optimizer_adapters.check_gradients(grads)
        if not self._enabled:
            return grads
        turn, iteration, scale = self._admit(optimizer, grads, "unscale"), self._iteration, self.loss_scale
        known, variables = iteration.known(), optimizer_adapters.known(optimizer, len(grads))
        turn.is_blind = variables is None
        raw = [False] * len(grads) if variables is None else gradients.raw(variables)
        given, of_given = zip(*(pair for pair in zip(grads, raw, strict=True) if pair[0] is not None), strict=True)
        judge = Judge.of_unknown(of_given, replica_sync.replicas(), self.rule.needs_amax)

        def decide(total: Any, _: Any) -> None:
            iteration.unscale(turn, judge.verdict(total), known)

        evidence = judge.evidence(given, scale, range(len(given)), replica_sync.replica())
        replica_sync.decide_together(decide, evidence, grads)
        unscaled = gradients.unscale_all(grads, raw, scale, self.rule.bounds[1])
        turn.hand_out(grads, unscaled)
        return unscaled

    @as_it_is
    def step(self, optimizer: Any, grads_and_vars: Iterable[tuple[Any, Any]], **options: Any) -> Any:
        """Steps the optimizer if all gradients are finite on all replicas, and returns whether it did.

        Args:
            optimizer: One of Keras, or one with `apply_gradients`, such as those of `tf.compat.v1.train`.
            grads_and_vars: Pairs. The gradients of the scaled losses, or what `unscale` returned, clipped or not.
            **options: For `apply_gradients`, such as `global_step`.

        Returns:
            A boolean scalar tensor.

        Raises:
            RuntimeError: It has stepped already in this iteration; there is no gradient; gradients that were given to
                `unscale` come back as they were; or they were unscaled for another optimizer, or before an `update`.
            ValueError: The optimizer scales the loss itself.
            TypeError: It is none, or `grads_and_vars` holds other things.
            NotImplementedError: It is called in a graph for a `Session`; or see `LossScaleOptimizer.apply`.
        """
        grads, variables = optimizer_adapters.split(grads_and_vars)
        if not self._enabled:
            optimizer_adapters.apply(optimizer, grads, variables, options)
            return ops.convert_to_tensor(True)
        turn, iteration = self._admit(optimizer, grads, "step"), self._iteration
        known = iteration.known()
        turn.check_raw(variables)
        optimizer_adapters.build(optimizer, variables)
        replica_sync.check_supported(optimizer)  # of a `MultiOptimizer` the parts may not be known before
        indices = turn.watch(variables, self._paths)
        present = [index for index, each in zip(indices, grads, strict=True) if each is not None]
        was_unscaled, is_row = turn.is_unscaled(iteration.mark()), self.consecutive_skips > 0
        scale = ops.where(was_unscaled, 1.0, self.loss_scale)
        judge = Judge.of(optimizer, turn.trained, replica_sync.replicas(), self.rule.needs_amax)

        def decide(total: Any, on_each: Any) -> Any:
            verdict = turn.complete(judge.verdict(total), was_unscaled, present)
            finite = verdict.finite if self.rule.skip_nonfinite else ops.ones_like(verdict.finite)
            apply = self._application(optimizer, variables, scale, options)
            when(finite, lambda: on_each(apply), variables=optimizer_adapters.written(optimizer, variables))
            iteration.step(turn, verdict, is_row, known)
            return finite

        return replica_sync.decide_together(
            decide, judge.evidence(grads, scale, indices, replica_sync.replica()), grads
        )

    def _application(
        self, optimizer: Any, variables: Sequence[Any], scale: Any, options: Mapping[str, Any]
    ) -> Callable[[Sequence[Any]], None]:
        """Returns what divides gradients and gives them to an optimizer."""
        raw, largest = gradients.raw(variables), self.rule.bounds[1]

        def apply(grads: Sequence[Any]) -> None:
            optimizer_adapters.apply(optimizer, gradients.unscale_all(grads, raw, scale, largest), variables, options)

        return apply

    @as_it_is
    def update(self, new_scale: Any = None) -> None:
        """Ends the iteration: moves the scale as the rule says, once for all optimizers that unscaled or stepped.

        Args:
            new_scale: Instead of what the rule says: a number or a scalar tensor. It is logged as `"set"`.

        Raises:
            RuntimeError: No optimizer has unscaled or stepped, or one has stepped twice, and no `new_scale` is given.
            ValueError: The rule's bounds do not hold `new_scale`.
        """
        if not self._enabled:
            return
        self._state()
        if new_scale is None:
            self._iteration.check_update()
        replica_sync.once(lambda: self._close(new_scale), self.distribute_strategy)

    def _close(self, new_scale: Any) -> None:
        state, iteration = self._state(), self._iteration
        known = iteration.known()
        if new_scale is not None:
            state.set_scale(new_scale, "new_scale")
        when(iteration.read("begun") > 0, lambda: state.advance(iteration.outcome(), moves=new_scale is None))
        iteration.close(known)

    def _overflows(self) -> dict[str, int]:
        since = int(self._iteration.mark()) - int(self.consecutive_skips)
        return {path: count for turn in list(self._turns.values()) for path, count in turn.overflows(since).items()}

    def __reduce__(self) -> tuple[Any, ...]:
        limits = {name: getattr(self, name) for name in ("max_consecutive_skips", "event_capacity")}
        rule = self.rule if self._enabled else None
        make = functools.partial(type(self), enabled=self._enabled, rule=rule, **limits)
        return make, (), None if self._scaling is None else self.state_dict()

    def __setstate__(self, state_dict: Mapping[str, Any]) -> None:
        self.load_state_dict(state_dict)
