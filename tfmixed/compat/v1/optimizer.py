"""The optimizer for TensorFlow 1's graphs that scales losses and skips steps that are not finite."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras import ops

from tfmixed._core import arguments, gradients
from tfmixed._core.finite_check import FiniteCheck
from tfmixed._utils import user_warnings
from tfmixed._utils.autograph import do_not_convert
from tfmixed.compat.v1 import control_flow, origins, overriding, rewrite
from tfmixed.compat.v1.graphs import Blaming, GraphState
from tfmixed.compat.v1.origins import Origins
from tfmixed.compat.v1.scales import scalings_of

V1 = tf.compat.v1
_SCOPE = "loss_scaling"
_local = threading.local()


class LossScaleOptimizer(Blaming, tf.compat.v1.train.Optimizer):
    """Wraps an optimizer of `tf.compat.v1.train`: scales the loss, and steps only if all gradients are finite.

    `compute_gradients` returns unscaled gradients and judges them, so that no clipping can hide an overflow;
    `apply_gradients` judges what it is given too. A skipped step leaves weights, slots and `global_step` as they are.
    At the top of a graph the scale is the tensor `tfmixed/loss_scale:0`. The variables, in the scope `tfmixed`, are
    made in the graph of the model when they are first needed; slots have the names that they have without scaling.

    Args:
        opt: The optimizer to wrap, or one of a subclass of one's own.
        loss_scale: `"dynamic"`, a number, a rule of `tfmixed.scaling`, or a loss scale: one of this package, of
            `tf.compat.v1`, or a manager of `tf.contrib.mixed_precision`.
        max_consecutive_skips: As in `tfmixed.LossScaleOptimizer`; `LossScaleHook` asks.

    Raises:
        ValueError: `loss_scale` is none of these, `opt` is no optimizer, or scales the loss itself, or
            `max_consecutive_skips` is out of range.
        NotImplementedError: `opt` is a `SyncReplicasOptimizer`.

    Example:
    >>> optimizer = LossScaleOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.5), 128)
    >>> weight = tf.Variable(4.0)
    >>> _ = optimizer.minimize(lambda: weight**2 / 2, var_list=[weight])
    >>> float(weight), float(optimizer.loss_scale)
    (2.0, 128.0)
    """

    def __init__(self, opt: Any, loss_scale: Any = "dynamic", *, max_consecutive_skips: int | None = 100) -> None:
        _check(opt)
        super().__init__(opt._use_locking, opt.get_name())
        self._optimizer = opt
        self._scalings = scalings_of(loss_scale)
        self.max_consecutive_skips = arguments.skip_limit(max_consecutive_skips)
        self._is_tracked = False
        self._track_trackable(opt, "base_optimizer")

    @property
    def rule(self) -> Any:  # type: ignore[override]  # the base declares an attribute
        """How the scale moves."""
        return self._scalings.rule

    @property
    def inner_optimizer(self) -> Any:
        """The wrapped optimizer."""
        return self._optimizer

    @property
    def loss_scale(self) -> Any:
        """The scale of the present step, a float32 scalar tensor."""
        return self._scalings.scale()

    def _state(self) -> GraphState:
        state = self._scalings.here()
        if state is self._scalings.eager and not self._is_tracked:  # for tf.train.Checkpoint
            self._is_tracked = True
            for name, variable in state.variables.items():
                self._track_trackable(variable.value, name)
        return state

    @property
    def _paths(self) -> list[str]:  # type: ignore[override]
        return self._state().paths

    def minimize(self, *arguments: Any, **named: Any) -> Any:
        """Returns the operation of a whole step, with the arguments of TensorFlow's: both halves in one call."""
        opt = self._optimizer
        if type(opt).minimize is V1.train.Optimizer.minimize:
            return super().minimize(*arguments, **named)
        with overriding.taking(opt, self.compute_gradients, self.apply_gradients) as calls:
            train = opt.minimize(*arguments, **named)
        if "apply_gradients" not in calls:
            user_warnings.warn(
                f"{type(opt).__name__} has its own minimize, which does not call its apply_gradients: its steps are "
                "not checked, and none is skipped. Call compute_gradients and apply_gradients"
            )
        return train

    @do_not_convert
    def compute_gradients(self, loss: Any, *arguments: Any, **named: Any) -> list[tuple[Any, Any]]:
        """Returns the gradients of `loss`, computed with the scale and divided by it, and their variables.

        A `compute_gradients` of the wrapped optimizer's own gets them divided where it calls TensorFlow's.

        Args:
            loss: A tensor, or where there is no graph a function that returns one.
            *arguments: As for the wrapped optimizer.
            **named: The same.

        Raises:
            ValueError: A Keras policy for mixed precision was set after the graph rewrite was switched on.
        """
        rewrite.check_policy()
        _check_strategy()
        compute = functools.partial(type(self._optimizer).compute_gradients, self._optimizer)
        with at_work():
            if not overriding.has_own(self._optimizer):
                return self._unscaled(compute, loss, *arguments, **named)
            with overriding.going_through(self._unscaled) as calls:
                pairs = list(compute(loss, *arguments, **named))
        if calls:
            return pairs
        user_warnings.warn(
            f"{type(self._optimizer).__name__} has its own compute_gradients, which does not call that of "
            "tf.compat.v1.train.Optimizer: its loss is not scaled, which float16 needs. Call "
            "super().compute_gradients there"
        )
        return self._judged(pairs, ops.ones((), "float32"))

    def _unscaled(self, compute: Callable[..., Any], loss: Any, *arguments: Any, **named: Any) -> list[tuple[Any, Any]]:
        """Returns what `compute` makes of the scaled loss, unscaled and judged."""
        scale = self.loss_scale
        scaled = _scaled(loss, scale)
        if named.get("grad_loss") is not None and hasattr(scaled, "dtype"):
            named["grad_loss"] = tf.cast(named["grad_loss"], scaled.dtype)
        return self._judged(list(compute(scaled, *arguments, **named)), scale)

    def _judged(self, pairs: list[tuple[Any, Any]], scale: Any) -> list[tuple[Any, Any]]:
        """Returns gradients divided by the scale; what they are like is kept in mind."""
        present = [(each, variable) for each, variable in pairs if each is not None]
        if not present:
            return pairs
        grads, variables = zip(*present, strict=True)
        state, largest = self._state(), self.rule.bounds[1]
        # Clipping may follow: that it fits its variable and its optimizer is asked of what is applied.
        check, indices = (
            FiniteCheck.for_gradients([False] * len(grads), 1, self.rule.needs_amax),
            state.indices(variables),
        )
        with V1.name_scope(_SCOPE):
            evidence = check.measure(grads, scale, range(len(grads)))
            found = control_flow.as_one(lambda said: state.record(check, said, indices), evidence)
            with V1.control_dependencies([found]):
                return [
                    (origins.marked(gradients.unscale(each, scale, largest), found), variable)
                    for each, variable in pairs
                ]

    @do_not_convert
    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], global_step: Any = None, name: str | None = None, **named: Any
    ) -> Any:
        """Returns the operation that takes the step, or skips it, and moves the scale.

        Args:
            grads_and_vars: What `compute_gradients` returned, changed at will.
            global_step: A variable that counts the steps that are not skipped.
            name: Of the operation; None takes the wrapped optimizer's.
            **named: For the wrapped optimizer, if it takes more.

        Raises:
            ValueError: There is no gradient.
            NotImplementedError: They come from a `SyncReplicasOptimizer`, or under a `tf.distribute` strategy.
        """
        _check_strategy()
        pairs = list(grads_and_vars)
        present = [(_tensor(each), variable) for each, variable in pairs if each is not None]
        if not present:
            names = [gradients.path(variable) for _, variable in pairs]
            raise ValueError(f"grads_and_vars must hold at least one gradient, received none for {names}")
        grads, variables = zip(*present, strict=True)
        _check_not_accumulated(grads)
        before, finite = _train_ops(), self._concluded(grads, variables)
        step = self._stepping(present, global_step=global_step, name=name, **named)
        with control_flow.branches_that_hold(variables):
            stepped = tf.cond(finite, step, _nothing)
        if tf.executing_eagerly():
            return None
        operation = tf.group(stepped, name=name or self.get_name())
        _set_train_ops([*before, operation])
        return operation

    def _concluded(self, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Moves the scale, and returns whether to apply these gradients."""
        state, origin = self._state(), origins.of(grads)
        check, indices = (
            FiniteCheck.for_variables(self._optimizer, variables, 1, self.rule.needs_amax),
            state.indices(variables),
        )

        def conclude(evidence: Any, *found: Any) -> Any:
            return state.conclude(check, evidence, indices, Origins(found, origin.complete))

        with V1.name_scope(_SCOPE):
            evidence = check.measure(grads, ops.ones((), "float32"), range(len(grads)))
            return control_flow.as_one(conclude, evidence, *origin.found)

    def _stepping(self, pairs: Sequence[tuple[Any, Any]], **named: Any) -> Callable[[], Any]:
        """Returns what gives the gradients to the wrapped optimizer, within a branch."""
        scope = tf.get_current_name_scope()

        def step() -> Any:
            with control_flow.variables_outside(scope), at_work():
                fitting = [(_like(each, variable), variable) for each, variable in pairs]
                return _done(type(self._optimizer).apply_gradients(self._optimizer, fitting, **named))

        return step

    def get_slot(self, var: Any, name: str) -> Any:
        """Returns a slot of the wrapped optimizer, or None."""
        return self._optimizer.get_slot(var, name)

    def get_slot_names(self) -> list[str]:
        """Returns the names of the wrapped optimizer's slots."""
        return list(self._optimizer.get_slot_names())

    def variables(self) -> list[Any]:
        """Returns the variables of the wrapped optimizer, and those of the scaling in this graph."""
        return [*self._optimizer.variables(), *(each.value for each in self._state().variables.values())]

    def __dir__(self) -> list[str]:
        # tf.train.Checkpoint asks dir() who has slots (TensorFlow 2.21), and refuses those that two have: the wrapped
        # optimizer, which it saves as `base_optimizer`, says so itself.
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def __getattr__(self, name: str) -> Any:
        # `_lr`, `make_session_run_hook` and whatever else scripts ask the optimizer for that they made.
        if name.startswith("__") or name == "_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._optimizer, name)


def is_at_work() -> bool:
    """Returns whether a `LossScaleOptimizer` is calling the optimizer that it wraps, in this thread."""
    return getattr(_local, "depth", 0) > 0


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Lets optimizers that are called within it be taken for wrapped ones, in this thread."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


def _check(opt: Any) -> None:
    if not isinstance(opt, V1.train.Optimizer):
        raise ValueError(f"opt must be an optimizer of tf.compat.v1.train, received {opt!r}")
    if isinstance(opt, (LossScaleOptimizer, V1.mixed_precision.MixedPrecisionLossScaleOptimizer)):
        raise ValueError(f"opt must not scale the loss itself, received a {type(opt).__name__}: pass the one it wraps")
    if isinstance(opt, V1.train.SyncReplicasOptimizer):
        raise NotImplementedError(_SYNC.format("opt must not be a SyncReplicasOptimizer"))


_SYNC = (
    "{}: it hands gradients over through accumulators that drop whatever is older than global_step, and global_step "
    "stands still in a skipped step, so that all workers would wait for ever. Use a tf.distribute strategy and a Keras "
    "optimizer, or SyncReplicasOptimizer without loss scaling (bfloat16 needs none)"
)


def _check_not_accumulated(grads: Sequence[Any]) -> None:
    if tf.executing_eagerly():
        return
    kinds = {gradients.values_of(each).op.type for each in grads}
    if any("AccumulatorTakeGradient" in kind for kind in kinds):
        raise NotImplementedError(_SYNC.format("SyncReplicasOptimizer must not wrap a LossScaleOptimizer"))


def _check_strategy() -> None:
    if tf.distribute.has_strategy():
        raise NotImplementedError(
            "an optimizer of tf.compat.v1.train is not scaled under a tf.distribute strategy. Use a Keras optimizer in "
            "tfmixed.LossScaleOptimizer, or tfmixed.GradScaler around this one"
        )


def _scaled(loss: Any, scale: Any) -> Any:
    """Returns losses times the scale, in float32 at least: most scales are too large for float16."""
    if callable(loss):
        return lambda: _scaled(loss(), scale)
    return tf.nest.map_structure(lambda each: ops.multiply(each, scale), loss)


def _tensor(gradient: Any) -> Any:
    # Accumulated gradients may come as the variables that hold them, and under TensorFlow 1's behavior as references.
    if gradients.is_sparse(gradient):
        return gradient
    tensor = tf.convert_to_tensor(gradient)
    return tensor if tensor.dtype == tensor.dtype.base_dtype else tf.identity(tensor)


def _like(gradient: Any, variable: Any) -> Any:
    """Returns the gradient in the dtype of its variable, which TensorFlow 1's kernels insist on."""
    return gradients.with_values(gradient, lambda values: tf.cast(values, variable.dtype.base_dtype))


def _done(step: Any) -> Any:
    if tf.executing_eagerly():
        return None
    with V1.control_dependencies([step]):
        return tf.no_op()


def _nothing() -> Any:
    return None if tf.executing_eagerly() else tf.no_op()


def _train_ops() -> list[Any]:
    return list(V1.get_collection(V1.GraphKeys.TRAIN_OP))


def _set_train_ops(operations: Sequence[Any]) -> None:
    # The wrapped optimizer's own stands in a branch, where nobody can run it.
    V1.get_collection_ref(V1.GraphKeys.TRAIN_OP)[:] = operations
