"""Support for `Model.fit` on several workers, which Keras's trainer lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tfmixed._utils import user_warnings
from tfmixed._utils.patching import do_not_convert

# Versions of Keras whose `Model.fit` on several workers lacks just what `enable_multi_worker_fit` adds.
_TESTED = ("3.14", "3.15")


def enable_multi_worker_fit() -> Callable[[], None]:
    """Makes `Model.fit` and `evaluate` work under `tf.distribute.MultiWorkerMirroredStrategy`, for the whole process.

    Keras 3 fails there in three places (keras#20585), which this function replaces. Keras reduces two things over the
    workers in a way that does not work: the first batch, from which it builds the model, and the results of each step.
    With `steps_per_execution` it calls the step in a way that loses its collectives. Other strategies are unchanged.

    With an unknown version of Keras it warns and changes nothing.

    Returns:
        A function that restores Keras.

    Raises:
        RuntimeError: If the Keras backend is not TensorFlow.

    Example:
    >>> undo = enable_multi_worker_fit()
    >>> undo()
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "`enable_multi_worker_fit` needs the TensorFlow backend, which has `tf.distribute`. "
            f"Received: backend={keras.backend.backend()}"
        )
    if keras.__version__.rpartition(".")[0] not in _TESTED:
        user_warnings.warn(
            f"`enable_multi_worker_fit` changes nothing, since it supports Keras {', '.join(_TESTED)} only. Try `fit` "
            f"as it is, or train in a loop with `strategy.run`. Received: keras {keras.__version__}"
        )
        return lambda: None
    return _patch()


@functools.cache
def _patch() -> Callable[[], None]:
    """Replaces three functions of Keras's trainer once, and returns a function that restores them."""
    from keras.src.backend.tensorflow import trainer

    kind = trainer.TensorFlowTrainer
    build, make, reduce = kind._maybe_symbolic_build, kind._make_function, trainer.reduce_per_replica

    def undo() -> None:
        kind._maybe_symbolic_build, kind._make_function, trainer.reduce_per_replica = build, make, reduce
        _patch.cache_clear()

    kind._maybe_symbolic_build, kind._make_function = _from_local_batch(build), _in_one_loop(make)
    trainer.reduce_per_replica = _over_workers(reduce)
    return undo


def _has_workers(strategy: Any) -> bool:
    from keras.src.backend.tensorflow import trainer

    return bool(trainer._collective_all_reduce_multi_worker(strategy))


def _from_local_batch(build: Any) -> Any:
    """Returns a `_maybe_symbolic_build` that builds a model from a batch of this worker."""

    @functools.wraps(build)
    def build_from_local_batch(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None and _has_workers(self._distribute_strategy):
            data_batch, iterator = _first_local_batch(iterator, self._distribute_strategy), None
        build(self, iterator, data_batch)
        if _has_workers(self._distribute_strategy):
            _check_metrics(self.metrics)

    return build_from_local_batch


def _in_one_loop(make: Any) -> Any:
    """Returns a `_make_function` that runs the steps of an execution in a loop that keeps its collectives."""

    @functools.wraps(make)
    def make_loop(self: Any, step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        steps, strategy = self.steps_per_execution, self.distribute_strategy
        if steps == 1 or self.run_eagerly or not _has_workers(strategy):
            return make(self, step_function)
        import tensorflow as tf

        one_step = functools.partial(_one_step, strategy, step_function)
        return tf.function(functools.partial(_run_steps, steps=steps, one_step=one_step), reduce_retracing=True)

    return make_loop


def _over_workers(reduce: Any) -> Any:
    """Returns a `reduce_per_replica` that reduces the results of a step over the workers too."""

    @functools.wraps(reduce)
    def reduce_over_workers(values: Any, strategy: Any, reduction: str) -> Any:
        if reduction in ("auto", "mean") and _has_workers(strategy):
            return _mean(values, strategy)
        return reduce(values, strategy, reduction)

    return reduce_over_workers


def _mean(values: Any, strategy: Any) -> Any:
    return keras.tree.map_structure(lambda value: strategy.reduce("MEAN", value, axis=None), values)


def _check_metrics(metrics: Sequence[Any]) -> None:
    """Checks that metrics are shared by all workers. Callbacks that read their own values would make workers diverge.

    Raises:
        ValueError: If a metric was created, or the model compiled, outside of the strategy's scope.
    """
    import tensorflow as tf

    variables = [variable for metric in metrics for variable in metric.variables]
    kind = tf.distribute.DistributedValues
    own = {variable.path for variable in variables if not isinstance(variable.value, kind)}
    if own:
        raise ValueError(
            "Metrics must be created, and `compile` called, within `strategy.scope()`, so that all workers share their "
            f"values. Received variables created outside of it: {', '.join(sorted(own))}"
        )


def _first_local_batch(iterator: Any, strategy: Any) -> Any:
    # An epoch iterator of Keras; `fit` resets it afterwards.
    _, _, batches = next(iter(iterator))
    return keras.tree.map_structure(lambda value: strategy.experimental_local_results(value)[0], next(batches))


def _one_step(strategy: Any, step_function: Callable[[Any], Any], batch: Any) -> Any:
    return _mean(strategy.run(step_function, (batch,)), strategy)


@do_not_convert
def _run_steps(iterator: Any, steps: int, one_step: Callable[[Any], Any]) -> Any:
    """Takes up to `steps` steps, one for each batch of an iterator, and returns the results of the last.

    Keras calls a `tf.function` in the loop, where TensorFlow loses the keys of its collectives ("You must feed a value
    for placeholder"). Here the loop holds the step itself.
    """
    import tensorflow as tf

    def has_next(done: Any, batch: Any, _: Any) -> Any:
        return tf.logical_and(done < steps, batch.has_value())

    def step(done: Any, batch: Any, _: Any) -> tuple[Any, Any, Any]:
        results = one_step(batch.get_value())
        # A batch taken from the iterator must be used, so none is taken after the last step.
        batch = tf.cond(done + 1 < steps, iterator.get_next_as_optional, lambda: batch)
        return done + 1, batch, results

    first = one_step(iterator.get_next())
    return tf.while_loop(has_next, step, (1, iterator.get_next_as_optional(), first))[-1]
