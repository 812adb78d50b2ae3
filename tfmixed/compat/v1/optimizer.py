"""Loss scale optimizer for TensorFlow 1 graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops
from tensorflow.python.training.experimental import mixed_precision_global_state as flags

from tfmixed._core import arguments, gradients
from tfmixed._core.finite_check import FiniteCheck
from tfmixed._utils import user_warnings
from tfmixed._utils.patching import do_not_convert
from tfmixed.compat.v1 import graph_ops, patches
from tfmixed.compat.v1.graph_state import GraphScaler, GraphState
from tfmixed.compat.v1.loss_scale import states_of
from tfmixed.policy import BESIDE_REWRITE, REWRITE

V1 = tf.compat.v1
_SCOPE = "loss_scaling"


class LossScaleOptimizer(GraphScaler, tf.compat.v1.train.Optimizer):
    """Wraps an optimizer of `tf.compat.v1.train`: scales the loss, and skips steps with non-finite gradients.

    `compute_gradients` returns unscaled gradients and checks them, so that clipping cannot hide an overflow.
    `apply_gradients` checks its gradients too. A skipped step does not change weights, slots or `global_step`.
    At the top of a graph, the scale is the tensor `tfmixed/loss_scale:0`. The variables of the scaling are created in
    the scope `tfmixed` of the model's graph when they are first needed. Slots keep their names.

    Args:
        opt: The optimizer to wrap, of `tf.compat.v1.train` or a subclass.
        loss_scale: `"dynamic"`, a number, a rule of `tfmixed.scaling`, a loss scale of this package or of
            `tf.compat.v1`, or a manager of `tf.contrib.mixed_precision`. Defaults to `"dynamic"`.
        max_consecutive_skips: As in `tfmixed.LossScaleOptimizer`. `LossScaleHook` checks it. Defaults to 100.

    Raises:
        ValueError: If `loss_scale` or `max_consecutive_skips` is invalid, or if `opt` is not an optimizer or scales the
            loss itself.
        NotImplementedError: If `opt` is a `SyncReplicasOptimizer`.

    Example:
    >>> optimizer = LossScaleOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.5), 128)
    >>> weight = tf.Variable(4.0)
    >>> _ = optimizer.minimize(lambda: weight**2 / 2, var_list=[weight])
    >>> float(weight), float(optimizer.loss_scale)
    (2.0, 128.0)
    """

    def __init__(self, opt: Any, loss_scale: Any = "dynamic", *, max_consecutive_skips: int | None = 100) -> None:
        _check_optimizer(opt)
        super().__init__(opt._use_locking, opt.get_name())
        self._optimizer = opt
        self._states = states_of(loss_scale)
        self.max_consecutive_skips = arguments.skip_limit(max_consecutive_skips)
        self._is_tracked = False
        self._track_trackable(opt, "base_optimizer")

    @property
    def rule(self) -> Any:  # type: ignore[override]  # the base class declares an attribute
        """The scaling rule."""
        return self._states.rule

    @property
    def inner_optimizer(self) -> Any:
        """The wrapped optimizer."""
        return self._optimizer

    @property
    def loss_scale(self) -> Any:
        """The scale of the current step, a float32 scalar tensor."""
        return self._states.scale()

    def _state(self) -> GraphState:
        state = self._states.here()
        if state is self._states.eager and not self._is_tracked:  # for tf.train.Checkpoint
            self._is_tracked = True
            for name, variable in state.variables.items():
                self._track_trackable(variable.value, name)
        return state

    @property
    def _paths(self) -> list[str]:  # type: ignore[override]  # the base class declares an attribute
        return self._state().paths

    def minimize(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the operation of a whole step. The arguments are those of TensorFlow's method."""
        opt, applied = self._optimizer, list[Any]()
        if type(opt).minimize is V1.train.Optimizer.minimize:
            return super().minimize(*args, **kwargs)

        def apply_gradients(*args: Any, **kwargs: Any) -> Any:
            applied.append(self.apply_gradients(*args, **kwargs))
            return applied[-1]

        owner = object()
        patches.set_item(owner, vars(opt), "compute_gradients", self.compute_gradients)
        patches.set_item(owner, vars(opt), "apply_gradients", apply_gradients)
        try:
            train = opt.minimize(*args, **kwargs)
        finally:
            patches.undo(owner)
        if not applied:
            user_warnings.warn(
                f"{type(opt).__name__} overrides minimize and does not call its apply_gradients there. Its steps are "
                "not checked, and none is skipped. Call compute_gradients and apply_gradients."
            )
        return train

    @do_not_convert
    def compute_gradients(self, loss: Any, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """Returns the unscaled gradients of `loss`, computed with the scale, and their variables.

        If the wrapped optimizer overrides `compute_gradients`, its call of TensorFlow's method returns unscaled
        gradients.

        Args:
            loss: A tensor, or in eager code a function that returns one.
            *args: As for the wrapped optimizer.
            **kwargs: As for the wrapped optimizer.

        Raises:
            ValueError: If a mixed precision Keras policy was set after the graph rewrite was enabled.
        """
        if flags.is_mixed_precision_graph_rewrite_enabled() and (policy := mixed_policy()):
            raise ValueError(BESIDE_REWRITE.format(REWRITE, f"the Keras policy {policy!r} was set"))
        _check_strategy()
        kind = type(self._optimizer)
        compute = functools.partial(kind.compute_gradients, self._optimizer)
        with patches.wrapped_call():
            if kind.compute_gradients is V1.train.Optimizer.compute_gradients:
                return self._compute_unscaled(compute, loss, *args, **kwargs)
            with patches.intercept_compute_gradients(self._compute_unscaled) as calls:
                pairs = list(compute(loss, *args, **kwargs))
        if calls:
            return pairs
        user_warnings.warn(
            f"{kind.__name__} overrides compute_gradients and does not call that of tf.compat.v1.train.Optimizer. Its "
            "loss is not scaled, which float16 needs. Call super().compute_gradients there."
        )
        return self._unscale(pairs, ops.ones((), "float32"))

    def _compute_unscaled(
        self, compute: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any
    ) -> list[tuple[Any, Any]]:
        """Returns the result of `compute` for the scaled loss, unscaled and checked."""
        scale = self.loss_scale
        scaled = graph_ops.scale_loss(loss, scale)
        if kwargs.get("grad_loss") is not None and hasattr(scaled, "dtype"):
            kwargs["grad_loss"] = tf.cast(kwargs["grad_loss"], scaled.dtype)
        return self._unscale(list(compute(scaled, *args, **kwargs)), scale)

    def _unscale(self, pairs: list[tuple[Any, Any]], scale: Any) -> list[tuple[Any, Any]]:
        """Returns unscaled gradients, marked with the finding of their check."""
        present = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
        if not present:
            return pairs
        grads, variables = zip(*present, strict=True)
        state, largest = self._state(), self.rule.bounds[1]
        # Clipping may follow. The limits of the variables and the optimizer apply in `apply_gradients`.
        check = FiniteCheck.for_gradients([False] * len(grads), 1, self.rule.needs_amax)
        indices = state.indices(variables)
        with V1.name_scope(_SCOPE):
            statistics = check.measure(grads, scale, range(len(grads)))
            finding = graph_ops.in_order(lambda values: state.record(check.result(values), indices), statistics)
            with V1.control_dependencies([finding]):
                return [
                    (graph_ops.mark(gradients.unscale(gradient, scale, largest), finding), variable)
                    for gradient, variable in pairs
                ]

    @do_not_convert
    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], global_step: Any = None, name: str | None = None, **kwargs: Any
    ) -> Any:
        """Returns the operation that applies or skips the step, and updates the scale.

        Args:
            grads_and_vars: The result of `compute_gradients`, which may be modified.
            global_step: A variable that counts the applied steps. Defaults to None.
            name: The name of the operation. Defaults to the name of the wrapped optimizer.
            **kwargs: Other arguments of the wrapped optimizer.

        Raises:
            ValueError: If there is no gradient.
            NotImplementedError: If the gradients come from a `SyncReplicasOptimizer`, or under a `tf.distribute`
                strategy.
        """
        _check_strategy()
        pairs = list(grads_and_vars)
        present = [(graph_ops.tensor(gradient), variable) for gradient, variable in pairs if gradient is not None]
        if not present:
            names = [gradients.path(variable) for _, variable in pairs]
            raise ValueError(f"`grads_and_vars` must have at least one gradient. Received: none for {names}.")
        grads, variables = zip(*present, strict=True)
        _check_not_accumulated(grads)
        train_ops = list(V1.get_collection(V1.GraphKeys.TRAIN_OP))
        finite = self._check_and_advance(grads, variables)
        scope = tf.get_current_name_scope()

        def update() -> Any:
            with graph_ops.create_variables_outside(scope), patches.wrapped_call():
                fitting = [(graph_ops.cast_like(gradient, variable), variable) for gradient, variable in present]
                step = type(self._optimizer).apply_gradients(
                    self._optimizer, fitting, global_step=global_step, name=name, **kwargs
                )
            return graph_ops.no_op([step])

        with graph_ops.branch_with_writes(variables):
            step = tf.cond(finite, update, lambda: graph_ops.no_op([]))
        if tf.executing_eagerly():
            return None
        operation = tf.group(step, name=name or self.get_name())
        # The wrapped optimizer adds its own operation, which is in a branch and cannot be run.
        V1.get_collection_ref(V1.GraphKeys.TRAIN_OP)[:] = [*train_ops, operation]
        return operation

    def _check_and_advance(self, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Checks gradients, advances the state, and returns whether to apply them."""
        state, origins = self._state(), graph_ops.origins(grads)
        check = FiniteCheck.for_variables(self._optimizer, variables, 1, self.rule.needs_amax)
        indices = state.indices(variables)

        def advance(statistics: Any, *findings: Any) -> Any:
            return state.advance_from(check.result(statistics), indices, origins._replace(findings=findings))

        with V1.name_scope(_SCOPE):
            statistics = check.measure(grads, ops.ones((), "float32"), range(len(grads)))
            return graph_ops.in_order(advance, statistics, *origins.findings)

    def get_slot(self, var: Any, name: str) -> Any:
        """Returns a slot of the wrapped optimizer, or None."""
        return self._optimizer.get_slot(var, name)

    def get_slot_names(self) -> list[str]:
        """Returns the names of the wrapped optimizer's slots."""
        return list(self._optimizer.get_slot_names())

    def variables(self) -> list[Any]:
        """Returns the variables of the wrapped optimizer and of the scaling in this graph."""
        return [*self._optimizer.variables(), *(variable.value for variable in self._state().variables.values())]

    def __dir__(self) -> list[str]:
        # tf.train.Checkpoint (TensorFlow 2.21) refuses slots that two optimizers list in dir(). The wrapped optimizer,
        # saved as `base_optimizer`, already lists them.
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def __getattr__(self, name: str) -> Any:
        # Scripts read `_lr`, `make_session_run_hook` and other attributes of the optimizer that they created.
        if name.startswith("__") or name == "_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._optimizer, name)


def mixed_policy() -> str | None:
    """Returns the name of the global Keras policy if it is for mixed precision, else None."""
    policy = keras.config.dtype_policy()
    return policy.name if policy.compute_dtype != policy.variable_dtype else None


_SYNC_REPLICAS = (
    "{}. Its accumulators drop gradients that are older than global_step, which does not change in a skipped step, so "
    "all workers would wait forever. Use a tf.distribute strategy and a Keras optimizer, or SyncReplicasOptimizer "
    "without loss scaling (bfloat16 does not need it)."
)


def _check_optimizer(opt: Any) -> None:
    if not isinstance(opt, V1.train.Optimizer):
        raise ValueError(f"`opt` must be an optimizer of tf.compat.v1.train. Received: opt={opt!r}.")
    if isinstance(opt, (LossScaleOptimizer, V1.mixed_precision.MixedPrecisionLossScaleOptimizer)):
        raise ValueError(f"`opt` must not scale the loss itself. Pass the optimizer it wraps. Received: opt={opt!r}.")
    if isinstance(opt, V1.train.SyncReplicasOptimizer):
        raise NotImplementedError(_SYNC_REPLICAS.format("`opt` must not be a SyncReplicasOptimizer"))


def _check_not_accumulated(grads: Sequence[Any]) -> None:
    if tf.executing_eagerly():
        return
    kinds = {gradients.values_of(gradient).op.type for gradient in grads}
    if any("AccumulatorTakeGradient" in kind for kind in kinds):
        raise NotImplementedError(_SYNC_REPLICAS.format("SyncReplicasOptimizer must not wrap a LossScaleOptimizer"))


def _check_strategy() -> None:
    if tf.distribute.has_strategy():
        raise NotImplementedError(
            "LossScaleOptimizer of tfmixed.compat.v1 does not support tf.distribute strategies. Use a Keras optimizer "
            "in tfmixed.LossScaleOptimizer, or tfmixed.GradScaler around the TensorFlow 1 optimizer."
        )
