"""What Keras's trainer lacks on several workers, and is given; see `distribute.enable_multi_worker_fit`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras


@functools.cache
def patch() -> Callable[[], None]:
    """Replaces three functions of Keras's trainer, if they are not replaced yet, and returns what takes it back."""
    from keras.src.backend.tensorflow import trainer

    def put(build: Any, make: Any, reduce: Any) -> None:
        trainer.TensorFlowTrainer._maybe_symbolic_build, trainer.TensorFlowTrainer._make_function = build, make
        trainer.reduce_per_replica = reduce

    def undo() -> None:
        put(build, make, reduce)
        patch.cache_clear()

    build, make = trainer.TensorFlowTrainer._maybe_symbolic_build, trainer.TensorFlowTrainer._make_function
    reduce = trainer.reduce_per_replica
    put(_from_local_batch(build), _in_one_loop(make), _over_workers(reduce))
    return undo


def _has_workers(strategy: Any) -> bool:
    from keras.src.backend.tensorflow import trainer

    return bool(trainer._collective_all_reduce_multi_worker(strategy))


def _from_local_batch(build: Any) -> Any:
    """Returns what builds a model from a batch of this worker."""

    @functools.wraps(build)
    def build_from_local_batch(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None and _has_workers(self._distribute_strategy):
            data_batch, iterator = _first_local_batch(iterator, self._distribute_strategy), None
        build(self, iterator, data_batch)
        if _has_workers(self._distribute_strategy):
            _check_metrics(self.metrics)

    return build_from_local_batch


def _in_one_loop(make: Any) -> Any:
    """Returns what makes a trainer's function, with the steps of an execution in a loop that keeps its collectives."""

    @functools.wraps(make)
    def make_loop(self: Any, step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        steps, strategy = self.steps_per_execution, self.distribute_strategy
        if steps == 1 or self.run_eagerly or not _has_workers(strategy):
            return make(self, step_function)
        return _loop(steps, lambda batch: _mean(strategy.run(step_function, (batch,)), strategy))

    return make_loop


def _over_workers(reduce: Any) -> Any:
    """Returns what reduces the results of a step, over the workers too."""

    @functools.wraps(reduce)
    def reduce_over_workers(values: Any, strategy: Any, reduction: str) -> Any:
        if reduction in ("auto", "mean") and _has_workers(strategy):
            return _mean(values, strategy)
        return reduce(values, strategy, reduction)

    return reduce_over_workers


def _mean(values: Any, strategy: Any) -> Any:
    return keras.tree.map_structure(lambda value: strategy.reduce("MEAN", value, axis=None), values)


def _check_metrics(metrics: Sequence[Any]) -> None:
    """Refuses metrics that each worker would keep for itself: callbacks that look at them would part the workers.

    Raises:
        ValueError: A metric was made, or the model compiled, outside of the strategy's scope.
    """
    import tensorflow

    kind = tensorflow.distribute.DistributedValues
    alone = {each.path for metric in metrics for each in metric.variables if not isinstance(each.value, kind)}
    if alone:
        raise ValueError(
            "metrics must be made, and `compile` be called, within `strategy.scope()`, for their values to be those of "
            f"all workers; received the variables {', '.join(sorted(alone))}, made outside of it"
        )


def _first_local_batch(iterator: Any, strategy: Any) -> Any:
    # An epoch iterator of Keras; `fit` resets it afterwards.
    _, _, batches = next(iter(iterator))
    return keras.tree.map_structure(lambda value: strategy.experimental_local_results(value)[0], next(batches))


def _loop(steps: int, one_step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function that takes up to `steps` steps, one a batch of an iterator, and returns the last results.

    Keras calls a `tf.function` from within the loop, and TensorFlow loses the keys of the collectives in it on the way
    in ("You must feed a value for placeholder"). Here the loop holds the step itself.
    """
    import tensorflow

    @tensorflow.autograph.experimental.do_not_convert
    def loop(iterator: Any) -> Any:
        def go_on(done: Any, batch: Any, _: Any) -> Any:
            return tensorflow.logical_and(done < steps, batch.has_value())

        def step(done: Any, batch: Any, _: Any) -> tuple[Any, Any, Any]:
            results = one_step(batch.get_value())
            # What is taken from the iterator must be used: no batch beyond the last step.
            batch = tensorflow.cond(done + 1 < steps, iterator.get_next_as_optional, lambda: batch)
            return done + 1, batch, results

        first = one_step(iterator.get_next())
        _, _, results = tensorflow.while_loop(go_on, step, (1, iterator.get_next_as_optional(), first))
        return results

    return tensorflow.function(loop, reduce_retracing=True)
