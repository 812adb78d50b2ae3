"""PyTorch's `GradScaler`, for loops that are written by hand."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import keras
from keras import ops

from tfmixed import applying, distribute, gradients, scaling, snapshots
from tfmixed.branching import as_it_is, in_graph, when
from tfmixed.gradients import Judge
from tfmixed.iteration import Iteration, Turn
from tfmixed.scaling import ScalingRule, checks
from tfmixed.state import Observable, ScalingState

_TORCH = {"init_scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


class GradScaler(Observable):
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
        max_consecutive_skips: As in `LossScaleOptimizer`.
        event_capacity: As in `LossScaleOptimizer`.

    Raises:
        ValueError: An argument is out of range, or numbers and a rule are given.

    A wrong order of calls is a `RuntimeError`, as far as it can be known: eagerly always; while a function is compiled,
    within that function. There an `update` that nothing preceded changes nothing.

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
        init_scale: float = _TORCH["init_scale"],
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        rule: Any = None,
        *,
        max_consecutive_skips: int | None = 100,
        event_capacity: int = 256,
    ) -> None:
        numbers = dict(zip(_TORCH, (init_scale, growth_factor, backoff_factor, growth_interval), strict=True))
        if rule is not None and numbers != _TORCH:
            raise ValueError(f"rule and PyTorch's four numbers exclude each other, received {rule!r} and {numbers}")
        self._enabled = enabled
        self.rule = _torch_rule(**numbers) if rule is None else scaling.get(rule)
        if not enabled:
            self.rule = scaling.ConstantScale(1.0)
        limit = max_consecutive_skips
        self.max_consecutive_skips = None if limit is None else checks.count("max_consecutive_skips", limit, 1)
        self.event_capacity = checks.count("event_capacity", event_capacity, 1)
        self._begin()

    def _begin(self) -> None:
        self._scaling: ScalingState | None = None
        self._is_compiled = False
        self.distribute_strategy: Any = None
        self._turns: dict[int, Turn] = {}
        self._paths: list[str] = []

    def _state(self) -> ScalingState:
        # Made on first use: PyTorch's may be made before anything else, too.
        if self._scaling is None:
            self.distribute_strategy = distribute.current()
            self._iteration = Iteration(_add_variable)
            self._scaling = ScalingState(self.rule, self.event_capacity, _add_variable)
        self._is_compiled |= in_graph()
        return self._scaling

    def _turn(self, optimizer: Any, grads: Sequence[Any], method: Literal["unscale", "step"]) -> Turn:
        """Returns the turn of an optimizer, if it may do this now."""
        applying.check(optimizer)
        distribute.check_supported(optimizer)
        self._state()
        if id(optimizer) not in self._turns:
            self._turns[id(optimizer)] = Turn(optimizer, _add_variable)
        turn = self._turns[id(optimizer)]
        self._iteration.check(turn, grads, method)
        return turn

    def get_scale(self) -> Any:
        """Returns the scale as a float; where it is not known, because a graph is being made, as a tensor."""
        return self.loss_scale if in_graph() else float(self.loss_scale)

    def is_enabled(self) -> bool:
        """Returns whether this scaler does anything."""
        return self._enabled

    def get_growth_factor(self) -> float:
        """Returns the factor of a growth, of a rule that has one; so do the next two."""
        return float(cast("Any", self.rule).growth_factor)

    def get_backoff_factor(self) -> float:
        """Returns the factor of a backoff."""
        return float(cast("Any", self.rule).backoff_factor)

    def get_growth_interval(self) -> int:
        """Returns how many good iterations in a row let the scale grow."""
        return int(cast("Any", self.rule).growth_interval)

    @as_it_is
    def scale(self, outputs: Any) -> Any:
        """Returns losses times the scale, in float32 at least: most scales are too large for float16.

        Args:
            outputs: A tensor or a nested structure of them.
        """
        if not self._enabled:
            return outputs
        scale = self.loss_scale
        return keras.tree.map_structure(lambda output: ops.multiply(output, scale), outputs)

    @as_it_is
    def unscale(self, optimizer: Any, grads: Iterable[Any]) -> list[Any]:
        """Returns gradients divided by the scale, to clip or look at them before `step`.

        Whether they are finite is remembered: no clip can hide an overflow.

        Args:
            optimizer: The one that they will be given to.
            grads: Tensors, `tf.IndexedSlices` and None.

        Raises:
            RuntimeError: In this iteration the optimizer's gradients were unscaled already, it has stepped already, or
                there is no gradient.
            ValueError: The optimizer scales the loss itself.
        """
        grads = list(grads)
        if not self._enabled:
            return grads
        turn = self._turn(optimizer, grads, "unscale")
        scale, raw = self.loss_scale, applying.raw(optimizer, len(grads))
        given = [(each, is_raw) for each, is_raw in zip(grads, raw, strict=True) if each is not None]
        judge = Judge.of_unknown(given, distribute.replicas(), self.rule.needs_amax)

        def decide(total: Any, _: Any) -> None:
            verdict = judge.verdict(total, scale)
            turn.keep(verdict, self._iteration.mark(verdict.finite))
            self._iteration.remember(turn, "unscaled")

        evidence = judge.evidence([each for each, _ in given], scale, range(len(given)), distribute.replica())
        distribute.decide_together(decide, evidence, grads)
        turn.scaled = [weakref.ref(each) for each, is_raw in given if not is_raw]
        return gradients.unscale_all(grads, raw, scale, self.rule.bounds[1])

    @as_it_is
    def step(self, optimizer: Any, grads_and_vars: Iterable[tuple[Any, Any]], **arguments: Any) -> Any:
        """Steps the optimizer if all gradients are finite on all replicas, and returns whether it did.

        Args:
            optimizer: One of Keras, or one with `apply_gradients`, such as those of `tf.compat.v1.train`.
            grads_and_vars: Pairs. The gradients of the scaled losses, or what `unscale` returned, clipped or not.
            **arguments: For `apply_gradients`, such as `global_step`.

        Returns:
            A boolean scalar tensor.

        Raises:
            RuntimeError: It has stepped already in this iteration, there is no gradient, or gradients that were given
                to `unscale` come back as they were.
            ValueError: The optimizer scales the loss itself.
            NotImplementedError: See `LossScaleOptimizer.apply`.
        """
        pairs = list(grads_and_vars)
        grads, variables = [each for each, _ in pairs], [each for _, each in pairs]
        if not self._enabled:
            applying.apply(optimizer, grads, variables, arguments)
            return ops.convert_to_tensor(True)
        turn, state, iteration = self._turn(optimizer, grads, "step"), self._state(), self._iteration
        applying.build(optimizer, variables)
        indices, is_row = turn.watch(variables, self._paths), state.read("consecutive_skips") > 0
        present = [index for index, each in zip(indices, grads, strict=True) if each is not None]
        unscaled = turn.is_unscaled(iteration.mark())
        scale = ops.where(unscaled, 1.0, self.loss_scale)
        judge = Judge.of(optimizer, turn.trained, distribute.replicas(), self.rule.needs_amax)
        raw = [gradients.holds_gradient(variable) for variable in variables]

        def decide(total: Any, on_each: Any) -> Any:
            verdict = turn.complete(judge.verdict(total, scale), unscaled, present)

            def apply_one(grads: Sequence[Any]) -> None:
                unscaled = gradients.unscale_all(grads, raw, verdict.divisor, self.rule.bounds[1])
                applying.apply(optimizer, unscaled, variables, arguments)

            finite = verdict.finite if self.rule.skip_nonfinite else ops.ones_like(verdict.finite)
            when(finite, lambda: on_each(apply_one), variables=applying.written(optimizer, variables))
            iteration.add(turn.step(verdict, iteration.mark(verdict.finite), is_row))
            iteration.remember(turn, "stepped")
            return finite

        evidence = judge.evidence(grads, scale, indices, distribute.replica())
        return distribute.decide_together(decide, evidence, grads)

    @as_it_is
    def update(self, new_scale: Any = None) -> None:
        """Ends the iteration: moves the scale as the rule says, once for all optimizers that have stepped.

        Args:
            new_scale: Instead of what the rule says: a number or a scalar tensor. It is logged as `"set"`.

        Raises:
            RuntimeError: No optimizer has stepped, and no `new_scale` is given.
            ValueError: The rule's bounds do not hold `new_scale`.
        """
        if not self._enabled:
            return
        self._state()
        if new_scale is None:
            self._iteration.check_stepped()
        distribute.once(lambda: self._close(new_scale), self.distribute_strategy)

    def _close(self, new_scale: Any) -> None:
        state, iteration = self._state(), self._iteration
        if new_scale is not None:
            state.set_scale(new_scale, "new_scale")
        when(iteration.read("steps") > 0, lambda: state.advance(iteration.outcome(), moves=new_scale is None))
        iteration.close()

    def _overflows(self) -> dict[str, int]:
        since = int(self._iteration.mark()) - int(self.consecutive_skips)
        return {path: count for turn in self._turns.values() for path, count in turn.overflows(since).items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs, as plain numbers, texts and dictionaries; empty if not enabled.

        PyTorch's own entries are there as far as the rule has them, and are what is loaded where others say the same.
        Events are not: drain them before. Reads the device. To be called after `update`.
        """
        if not self._enabled:
            return {}
        return snapshots.take(self._state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where the scaler of `state_dict` stood: this class's or PyTorch's.

        Nothing is loaded unless all is sound. Without effect if not enabled.

        Args:
            state_dict: Of PyTorch's scaler it sets the factors too.

        Raises:
            ValueError: An entry is missing or out of range; the message names it.
            RuntimeError: It has another rule, and functions were compiled with this one.
        """
        if not self._enabled:
            return
        rule, values = snapshots.read(state_dict, self.rule)
        if not snapshots.move_alike(rule, self.rule):
            if self._is_compiled:
                raise RuntimeError(
                    f"state_dict must have the rule that functions were compiled with, {self.rule}, received {rule}: "
                    "load it before they are called"
                )
            self._begin()
        self.rule = rule
        state = self._state()
        state.rule = rule

        def write() -> None:
            state.assign(values)
            self._iteration.close()

        distribute.once(write, self.distribute_strategy)


def _torch_rule(init_scale: float, **numbers: Any) -> ScalingRule:
    return scaling.like("torch", initial_scale=checks.scale("init_scale", init_scale), **numbers)


def _add_variable(shape: Any, initializer: Any, dtype: str, name: str) -> keras.Variable:
    return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=False, name=name)
