"""Dry run of a model's training step: its optimizers pass the gradients on and update nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras import tree

from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import temporary_state

GradientConsumer = Callable[[Iterable[Any], Iterable[Any], Any], None]  # takes gradients, variables and optimizer


def compiled_step(model: keras.Model) -> Callable[[Any, Any], Any]:
    """Returns a function that runs the training step on a batch as `fit` does, and restores the variables.

    Its second argument is the state of all variables on JAX within `fit`, and None otherwise.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _jax_step(model)
    if backend == "torch" or model.run_eagerly:
        return functools.partial(_eager_step, model)
    import tensorflow

    function = tensorflow.function(model.train_step, autograph=False, reduce_retracing=True)
    return functools.partial(_graph_step, model, function)


def _eager_step(model: keras.Model, batch: Any, _: Any) -> None:
    with temporary_state.variables(model):
        model.train_step(batch)


def _graph_step(model: keras.Model, function: Any, batch: Any, _: Any) -> None:
    traced = function.get_concrete_function(batch)
    with temporary_state.variables(model, traced):
        traced(batch)


def _jax_step(model: keras.Model) -> Callable[..., Any]:
    import jax

    def step(state: Any, batch: Any) -> Any:  # not the method itself, for which jit would use the trainer's cache
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
def dry_run(model: keras.Model, consume: GradientConsumer, scale: float) -> Iterator[None]:
    """Makes the optimizers multiply the loss by `scale` and pass gradients to `consume`; metrics are not computed."""
    with contextlib.ExitStack() as stack:
        for optimizer in _optimizers(model):
            for name, method in _dry_run_methods(optimizer, model, consume, scale).items():
                if hasattr(optimizer, name):
                    temporary_state.put(stack, optimizer, name, method)
        temporary_state.put(stack, model, "compute_metrics", lambda *_, **__: {})
        yield


def _dry_run_methods(
    optimizer: Any, model: keras.Model, consume: GradientConsumer, scale: float
) -> dict[str, Callable[..., Any]]:
    def scaled(losses: Any) -> Any:
        return tree.map_structure(lambda loss: loss * scale, losses)

    def apply(grads: Any, trainable_variables: Any = None) -> None:
        consume(
            grads, optimizer._trainable_variables if trainable_variables is None else trainable_variables, optimizer
        )

    def apply_gradients(grads_and_vars: Iterable[Any], **_: Any) -> None:
        grads, variables = zip(*grads_and_vars, strict=True)
        consume(grads, variables, optimizer)

    def stateless_apply(optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
        consume(grads, model.trainable_variables, optimizer)
        return trainable_variables, optimizer_variables

    return {
        "apply": apply,
        "apply_gradients": apply_gradients,
        "stateless_apply": stateless_apply,
        "scale_loss": scaled,
        "get_scaled_loss": scaled,
        "get_unscaled_gradients": lambda grads: grads,
        "build": lambda _: None,
    }


def loss_scale(model: keras.Model) -> Any:
    """Returns the current scale of the model's optimizer; 1 without a loss-scale optimizer."""
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return 1.0
    return optimizer.dynamic_scale.value if optimizer.built else float(optimizer.initial_scale)


def holds_grad_scaler(model: keras.Model) -> bool:
    """Returns whether an attribute of the model holds a `GradScaler`, which its `train_step` would update."""
    attributes = _leaves(vars(model).values())
    return any(isinstance(value, ScalerBase) and not _is_optimizer(value) for value in attributes)


def _optimizers(model: keras.Model) -> list[Any]:
    """Returns the distinct optimizers that a model and its layers hold, including those in lists and dictionaries."""
    held = [value for layer in model._flatten_layers() for value in vars(layer).values()]
    return list({id(leaf): leaf for leaf in _leaves([model.optimizer, *held]) if _is_optimizer(leaf)}.values())


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple, set)):
            yield from _leaves(value)
        elif isinstance(value, dict):
            yield from _leaves(value.values())
        else:
            yield value


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, keras.optimizers.Optimizer)
