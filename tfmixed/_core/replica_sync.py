"""Gives all replicas of a `tf.distribute` strategy the same finite check. Other backends have one replica.

A replica that checked only its own gradients would apply a step that the others skip. Weights would diverge, and
workers would wait for each other in a collective forever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from tfmixed._core.inner_optimizer import branches


class Replicas(NamedTuple):
    """Operations on all replicas of a step, in a context where a branch is the same on each of them.

    Args:
        sum: Returns the sum of a vector over all replicas.
        call: Calls a function on each replica with that replica's values of the arguments. Defaults to a plain call.
    """

    sum: Callable[[Any], Any]
    call: Callable[..., Any] = lambda function, *arguments: function(*arguments)


def run_jointly(step: Callable[..., Any], *values: Any) -> Any:
    """Returns `step(replicas, *values)`, called where all replicas take the same branch.

    On one device this is a plain call. Under strategies whose replicas update variables independently, each replica
    calls its own `step`. `MirroredStrategy` on CPUs merges replicas for an update, which no branch within a replica
    may do, so there the step branches outside of them: replicas wait for each other, and TensorFlow calls the `step`
    of replica 0 once, with the values of all replicas. All that this function captures is from replica 0.

    Args:
        step: Function that takes `Replicas` and `values`.
        *values: Tensors of this replica, or nested structures of them.
    """
    if current_strategy() is None:
        return step(Replicas(lambda vector: vector), *values)
    import tensorflow as tf

    context, total = tf.distribute.get_replica_context(), tf.distribute.ReduceOp.SUM
    if not _merges():
        return step(Replicas(functools.partial(context.all_reduce, total)), *values)

    def merged(strategy: Any, *values: Any) -> Any:
        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            return strategy.extended.call_for_each_replica(function, args=arguments)

        return step(Replicas(functools.partial(strategy.reduce, total, axis=None), call), *values)

    return context.merge_call(merged, args=values)


def run_jointly_once(function: Callable[[], None], home: Any) -> None:
    """Calls `function` once for all replicas, inside or outside of `strategy.run`.

    Args:
        function: Function that writes variables.
        home: Strategy under which these variables were created, or None.
    """
    if current_strategy() is None and home is None:
        function()
        return
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if current_strategy() is None or context is None:
        with (home or current_strategy()).scope():
            function()
    elif _merges():
        context.merge_call(lambda _: function())
    else:
        function()


def current_strategy() -> Any:
    """Returns the present `tf.distribute` strategy, or None.

    Raises:
        NotImplementedError: If the strategy is of an untested kind.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    from tensorflow import distribute

    if not distribute.has_strategy():
        return None
    strategy = distribute.get_strategy()
    tested = ("OneDeviceStrategy", "MirroredStrategy", "MultiWorkerMirroredStrategy")
    if not isinstance(strategy, tuple(getattr(distribute, name) for name in tested)):
        raise NotImplementedError(
            f"Loss scaling supports {', '.join(tested)}. Train in mixed_bfloat16 under other strategies, which needs "
            f"no loss scaling. Received: strategy={type(strategy).__name__}"
        )
    return strategy


def replica_count() -> int:
    """Returns the number of replicas that take each step together."""
    strategy = current_strategy()
    return 1 if strategy is None else int(strategy.num_replicas_in_sync)


def replica_id() -> Any:
    """Returns the number of this replica, from 0.

    Raises:
        RuntimeError: If it is called in cross-replica context.
    """
    if current_strategy() is None:
        return 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "Gradients must be applied in a replica context. Call the optimizer in the function that you pass to "
            "`strategy.run`. Received a call in cross-replica context."
        )
    return context.replica_id_in_sync_group


def check_supported(inner: Any) -> None:
    """Checks that an optimizer works under the present `tf.distribute` strategy.

    Raises:
        NotImplementedError: If the strategy is of an untested kind, or the inner optimizer branches within a replica
            where replicas can only branch together.
    """
    if current_strategy() is None:
        return
    import tensorflow as tf

    branching = branches(inner)
    if branching and _merges() and not tf.executing_eagerly():
        raise NotImplementedError(
            f"{', '.join(branching)} branches within each replica, which Keras cannot compile "
            "under a strategy of several replicas. Compile the model with `run_eagerly=True`, train on one device, or "
            "leave the argument out."
        )


def is_chief(model: Any) -> bool:
    """Returns whether this process writes files for the workers of a model or scaler. True without workers."""
    if not is_multi_worker(model):
        return True
    resolver = model.distribute_strategy.cluster_resolver
    chiefs = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not chiefs and (resolver.task_type, resolver.task_id) == ("worker", 0))


def is_multi_worker(model: Any) -> bool:
    """Returns whether the strategy of a model, scaler or optimizer has several workers, each with its own task."""
    # The model's strategy, not the present one: `fit` may be called outside of its scope.
    strategy = getattr(model, "distribute_strategy", None) or getattr(model, "_distribution_strategy", None)
    resolver = getattr(strategy, "cluster_resolver", None)
    return resolver is not None and bool(resolver.task_type)


def _merges() -> bool:
    """Returns whether the replicas of the present strategy are threads that update variables in a `merge_call`."""
    import tensorflow as tf

    is_alone = isinstance(current_strategy(), tf.distribute.OneDeviceStrategy)
    return not is_alone and not tf.__internal__.distribute.strategy_supports_no_merge_call()
