"""A model's own training step, run without being taken: its optimizers hand the gradients over, and do nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras import tree

from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import temporary_state

# Takes gradients and their variables.
Count = Callable[[Iterable[Any], Iterable[Any]], None]


def compiled(model: keras.Model) -> Callable[[Any, Any], Any]:
    """Returns what runs the training step of a batch, as `fit` would run it, and restores the variables.

    Its second argument is, on JAX within `fit`, the values of all variables, and None else.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _jax_step(model)
    if backend == "torch" or model.run_eagerly:
        return functools.partial(_eager_step, model)
    import tensorflow

    function = tensorflow.function(model.train_step, autograph=False, reduce_retracing=True)
    return functools.partial(_traced_step, model, function)


def _eager_step(model: keras.Model, batch: Any, _: Any) -> None:
    with temporary_state.variables(model):
        model.train_step(batch)


def _traced_step(model: keras.Model, function: Any, batch: Any, _: Any) -> None:
    traced = function.get_concrete_function(batch)
    with temporary_state.variables(model, traced):
        traced(batch)


def _jax_step(model: keras.Model) -> Callable[..., Any]:
    import jax

    def step(state: Any, batch: Any) -> Any:  # of our own: jit would take the trainer's cache for an equal method
        return model.train_step(state, batch)

    compiled = step if model.run_eagerly else jax.jit(step)

    def run(batch: Any, state: Any) -> None:
        parts = [model.trainable_variables, model.non_trainable_variables]
        parts += [model.optimizer.variables, model.metrics_variables]
        values = tuple([variable.value for variable in part] for part in parts) if state is None else state
        jax.block_until_ready(compiled(values, batch))
        jax.effects_barrier()

    return run


@contextlib.contextmanager
def untaken(model: keras.Model, count: Count, scale: float) -> Iterator[None]:
    """Has a model's optimizers multiply the loss by `scale`, give its gradients to `count`, and do nothing else.

    Metrics are not asked for.
    """
    with contextlib.ExitStack() as stack:
        for optimizer in _optimizers(model):
            for name, function in _instead_of(optimizer, model, count, scale).items():
                if hasattr(optimizer, name):
                    temporary_state.put(stack, optimizer, name, function)
        temporary_state.put(stack, model, "compute_metrics", lambda *_, **__: {})
        yield


def _instead_of(optimizer: Any, model: keras.Model, count: Count, scale: float) -> dict[str, Callable[..., Any]]:
    def scaled(loss: Any) -> Any:
        return tree.map_structure(lambda each: each * scale, loss)

    def apply(grads: Any, trainable_variables: Any = None) -> None:
        count(grads, optimizer._trainable_variables if trainable_variables is None else trainable_variables)

    def apply_gradients(grads_and_vars: Iterable[Any], **_: Any) -> None:
        count(*zip(*grads_and_vars, strict=True))

    def stateless_apply(state: Any, grads: Any, values: Any) -> Any:
        count(grads, model.trainable_variables)
        return values, state

    return {
        "apply": apply,
        "apply_gradients": apply_gradients,
        "stateless_apply": stateless_apply,
        "scale_loss": scaled,
        "get_scaled_loss": scaled,
        "get_unscaled_gradients": lambda grads: grads,
        "build": lambda _: None,
    }


def holds_grad_scaler(model: keras.Model) -> bool:
    """Returns whether a `GradScaler` is among a model's attributes, whose `train_step` then steps it."""
    return any(isinstance(each, ScalerBase) and not _is_optimizer(each) for each in _leaves(vars(model).values()))


def _optimizers(model: keras.Model) -> list[Any]:
    """Returns the optimizers that a model and its layers hold, in lists and dictionaries too, each once."""
    held = [each for layer in model._flatten_layers() for each in vars(layer).values()]
    found = [each for each in _leaves([model.optimizer, *held]) if _is_optimizer(each)]
    return list({id(each): each for each in found}.values())


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for each in values:
        if isinstance(each, (list, tuple, set)):
            yield from _leaves(each)
        elif isinstance(each, dict):
            yield from _leaves(each.values())
        else:
            yield each


def _is_optimizer(each: Any) -> bool:
    return isinstance(each, keras.optimizers.Optimizer)
