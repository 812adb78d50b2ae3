"""What several replicas need: one decision for all of them. TensorFlow's strategies; one replica elsewhere.

A replica that judged its own gradients alone would apply a step that the others skip: weights part ways, and workers
wait for each other in a collective for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from tfmixed._core import multi_worker_fit
from tfmixed._core.inner_optimizer import branches
from tfmixed._utils import user_warnings

# The versions of Keras whose `Model.fit` on several workers lacks just what `enable_multi_worker_fit` adds.
_FIT_TESTED = ("3.14", "3.15")


def check_supported(inner: Any) -> None:
    """Refuses what cannot work under the present `tf.distribute` strategy.

    Raises:
        NotImplementedError: The strategy is of a kind that no test here has run, or the inner optimizer branches within
            a replica where replicas may only branch together.
    """
    if current() is None:
        return
    import tensorflow

    branching = branches(inner)
    if branching and _merges() and not tensorflow.executing_eagerly():
        raise NotImplementedError(
            f"{', '.join(branching)} branches within each replica, which Keras cannot compile "
            "under a strategy of several replicas. Compile the model with `run_eagerly=True`, train on one device, or "
            "leave the argument out."
        )


def replicas() -> int:
    """Returns how many replicas take each step together."""
    strategy = current()
    return 1 if strategy is None else int(strategy.num_replicas_in_sync)


def replica() -> Any:
    """Returns the number of this replica, from 0."""
    if current() is None:
        return 0
    import tensorflow

    context = tensorflow.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "gradients must be given to their optimizer in a replica context, received a call in cross-replica "
            "context: call it in the function that you pass to `strategy.run`"
        )
    return context.replica_id_in_sync_group


def is_chief(model: Any) -> bool:
    """Returns whether this process is the one of the model's or scaler's workers that writes files.

    True without workers.
    """
    if not works_with_others(model):
        return True
    resolver = model.distribute_strategy.cluster_resolver
    chiefs = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not chiefs and (resolver.task_type, resolver.task_id) == ("worker", 0))


def works_with_others(model: Any) -> bool:
    """Returns whether the model's or scaler's strategy is one of several workers, each with a task of its own."""
    # The model's strategy, not the present one: `fit` may be called outside of its scope.
    resolver = getattr(getattr(model, "distribute_strategy", None), "cluster_resolver", None)
    return resolver is not None and bool(resolver.task_type)


def decide_together(
    decide: Callable[[Any, Callable[[Callable[[Any], None]], None]], Any], evidence: Any, gradients: Sequence[Any]
) -> Any:
    """Returns `decide(total, on_each)`, called where a branch on `total` is the same branch on every replica.

    Args:
        decide: Takes the sum of the evidence over all replicas, and `on_each`, which calls a function with the
            gradients of each replica. It may put `on_each` into one branch of a `cond`.
        evidence: float32 vector of this replica.
        gradients: Gradients of this replica.
    """
    if current() is None:
        return decide(evidence, lambda act: act(gradients))
    import tensorflow

    context = tensorflow.distribute.get_replica_context()
    if not _merges():
        total = context.all_reduce(tensorflow.distribute.ReduceOp.SUM, evidence)
        return decide(total, lambda act: act(gradients))

    # The inner optimizer merges its replicas, which no branch inside of a replica may do: so branch outside of them.
    def merged(strategy: Any, evidence: Any, gradients: Any) -> Any:
        total = strategy.reduce(tensorflow.distribute.ReduceOp.SUM, evidence, axis=None)
        return decide(total, lambda act: strategy.extended.call_for_each_replica(act, args=(gradients,)))

    return context.merge_call(merged, args=(evidence, gradients))


def once(act: Callable[[], None], home: Any) -> None:
    """Calls `act` once for all replicas, in the function of `strategy.run` or outside of it.

    Args:
        act: Writes variables.
        home: The strategy under which these were made, or None.
    """
    if current() is None and home is None:
        act()
        return
    import tensorflow

    context = tensorflow.distribute.get_replica_context()
    if current() is None or context is None:
        with (home or current()).scope():
            act()
    elif _merges():
        context.merge_call(lambda _: act())
    else:
        act()


def enable_multi_worker_fit() -> Callable[[], None]:
    """Makes `Model.fit` and `evaluate` work under `tf.distribute.MultiWorkerMirroredStrategy`, for the whole process.

    Keras 3 fails there in three places (keras#20585), which are replaced: it reduces over the workers the first batch,
    from which it builds the model, and the results of each step, both in a way that does not work; and with
    `steps_per_execution` it calls the step in a way that loses its collectives. Other strategies go on as they were.

    Returns:
        A function that takes it back.

    With a version of Keras that it does not know it warns and changes nothing.

    Raises:
        RuntimeError: The Keras backend is not TensorFlow.

    Example:
    >>> undo = enable_multi_worker_fit()
    >>> undo()
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "enable_multi_worker_fit serves tf.distribute and needs the TensorFlow backend, received the backend "
            f"{keras.backend.backend()}"
        )
    if keras.__version__.rpartition(".")[0] not in _FIT_TESTED:
        user_warnings.warn(
            f"enable_multi_worker_fit changes nothing: it knows Keras {', '.join(_FIT_TESTED)}, and this is "
            f"{keras.__version__}. Try `fit` as it is, or train in a loop with `strategy.run`."
        )
        return lambda: None
    return multi_worker_fit.patch()


def _merges() -> bool:
    """Returns whether the replicas of the present strategy are threads that update variables in a `merge_call`."""
    import tensorflow

    alone = isinstance(current(), tensorflow.distribute.OneDeviceStrategy)
    return not alone and not tensorflow.__internal__.distribute.strategy_supports_no_merge_call()


def current() -> Any:
    """Returns the present `tf.distribute` strategy, or None.

    Raises:
        NotImplementedError: It is of a kind that no test here has run.
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
            f"Loss scaling supports {', '.join(tested)}, received a {type(strategy).__name__}. Train in "
            "mixed_bfloat16 there, which needs no loss scaling."
        )
    return strategy
