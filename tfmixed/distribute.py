"""What several replicas need: one decision for all of them. TensorFlow's strategies; one replica elsewhere.

A replica that judged its own gradients alone would apply a step that the others skip: weights part ways, and workers
wait for each other in a collective for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras


def replicas() -> int:
    """Returns how many replicas take each step together.

    Raises:
        NotImplementedError: The present `tf.distribute` strategy is of a kind that no test here has run.
    """
    strategy = _strategy()
    return 1 if strategy is None else int(strategy.num_replicas_in_sync)


def replica() -> Any:
    """Returns the number of this replica, from 0."""
    if _strategy() is None:
        return 0
    import tensorflow

    context = tensorflow.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "apply must be called in a replica context, received a call in cross-replica context: call it in the "
            "function that you pass to `strategy.run`"
        )
    return context.replica_id_in_sync_group


def is_chief(model: Any) -> bool:
    """Returns whether this process is the one of the model's workers that writes files. True without workers."""
    # The model's strategy, not the present one: `fit` may be called outside of its scope.
    resolver = getattr(getattr(model, "distribute_strategy", None), "cluster_resolver", None)
    if resolver is None or not resolver.task_type:
        return True
    chiefs = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not chiefs and (resolver.task_type, resolver.task_id) == ("worker", 0))


def decide_together(
    decide: Callable[[Any, Callable[[Callable[[Any], None]], None]], None], evidence: Any, gradients: Sequence[Any]
) -> None:
    """Calls `decide(total, on_each)` where a branch on `total` is the same branch on every replica.

    Args:
        decide: Takes the sum of the evidence over all replicas, and `on_each`, which calls a function with the
            gradients of each replica. It may put `on_each` into one branch of a `cond`.
        evidence: float32 vector of this replica.
        gradients: Gradients of this replica.
    """
    if _strategy() is None:
        decide(evidence, lambda act: act(gradients))
        return
    import tensorflow

    context = tensorflow.distribute.get_replica_context()
    if tensorflow.__internal__.distribute.strategy_supports_no_merge_call():
        total = context.all_reduce(tensorflow.distribute.ReduceOp.SUM, evidence)
        decide(total, lambda act: act(gradients))
        return

    # The inner optimizer merges its replicas, which no branch inside of a replica may do: so branch outside of them.
    def merged(strategy: Any, evidence: Any, gradients: Any) -> None:
        total = strategy.reduce(tensorflow.distribute.ReduceOp.SUM, evidence, axis=None)
        decide(total, lambda act: strategy.extended.call_for_each_replica(act, args=(gradients,)))

    context.merge_call(merged, args=(evidence, gradients))


def _strategy() -> Any:
    if keras.backend.backend() != "tensorflow":
        return None
    from tensorflow import distribute

    if not distribute.has_strategy():
        return None
    strategy = distribute.get_strategy()
    tested = (distribute.OneDeviceStrategy, distribute.MirroredStrategy, distribute.MultiWorkerMirroredStrategy)
    if not isinstance(strategy, tested):
        raise NotImplementedError(
            f"LossScaleOptimizer supports {', '.join(kind.__name__ for kind in tested)}, received a "
            f"{type(strategy).__name__}. Train in mixed_bfloat16 there, which needs no loss scaling."
        )
    return strategy
