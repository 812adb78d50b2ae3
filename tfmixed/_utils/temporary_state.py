"""Context managers that restore attributes, dtype policies, variables and random states on exit."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy
from keras.src.backend.common import global_state

from tfmixed._utils import layer_tree
from tfmixed.formats import HALF


def put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an instance attribute until the stack is closed, bypassing the attribute tracking of Keras and PyTorch."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    stack.callback(vars(owner).update, before)
    stack.callback(vars(owner).pop, name)
    vars(owner)[name] = value


@contextlib.contextmanager
def global_policy(policy: Any) -> Iterator[None]:
    """Sets the global dtype policy unless it is None, and restores the previous one on exit in any case."""
    before = keras.config.dtype_policy()
    if policy is not None:
        keras.config.set_dtype_policy(keras.dtype_policies.get(policy))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def with_policy(layers: Iterable[keras.Operation], policy: str) -> Iterator[None]:
    """Gives layers another dtype policy with the same quantization mode; operations are ignored."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, keras.layers.Layer):  # not `dtype_policy`, which would write into a DTypePolicyMap
                put(stack, layer, "_dtype_policy", layer_tree.policy_for(layer, policy))
        yield


@contextlib.contextmanager
def in_float32(layers: Iterable[keras.Operation]) -> Iterator[None]:
    """Makes layers, and sublayers that they create, compute in float32 and return it.

    GPUs multiply with full float32 precision.
    """
    layers = list(layers)
    with (
        with_policy(layers, "float32"),
        global_policy("float32"),
        _full_precision(),
        contextlib.ExitStack() as stack,
    ):
        for layer in layers:
            for name in ("output_dtype", "_gives"):  # output dtypes of our own layers and of rewritten ones
                if vars(layer).get(name) is not None:
                    put(stack, layer, name, "float32")
        yield


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    backend = keras.backend.backend()
    with contextlib.ExitStack() as stack:
        if backend == "tensorflow":
            from tensorflow import config

            before = config.experimental.tensor_float_32_execution_enabled()
            stack.callback(config.experimental.enable_tensor_float_32_execution, before)
            config.experimental.enable_tensor_float_32_execution(False)
        elif backend == "jax":
            import jax

            stack.enter_context(jax.default_matmul_precision("highest"))
        yield


@contextlib.contextmanager
def states(model: keras.Model, seeds: keras.random.SeedGenerator | None = None) -> Iterator[None]:
    """Restores what tracing layers may change: random states and added losses.

    Args:
        model: The model whose layers are called.
        seeds: The global seed generator of Keras within the context. It has to outlive functions traced there.
            Defaults to a new one.
    """
    before = global_state.get_global_attribute("global_seed_generator")
    with random_states(), added_losses(model):
        global_state.set_global_attribute("global_seed_generator", seeds or seed_generator())
        try:
            yield
        finally:
            global_state.set_global_attribute("global_seed_generator", before)


@contextlib.contextmanager
def added_losses(model: keras.Model) -> Iterator[None]:
    """Restores the losses that the layers of a model added in their last call."""
    losses = [(layer._losses, list(layer._losses)) for layer in model._flatten_layers()]
    try:
        yield
    finally:
        for current, before in losses:
            current[:] = before


@contextlib.contextmanager
def losses_in_float32(layers: Iterable[keras.Operation]) -> Iterator[None]:
    """Casts the losses that layers add to float32.

    Keras leaves them in half precision, and TensorFlow refuses to add them to the loss of `compile`.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, keras.layers.Layer):
                regularization = functools.partial(_float32_losses, layer._get_regularization_losses)
                put(stack, layer, "_get_own_losses", functools.partial(_float32_losses, layer._get_own_losses))
                put(stack, layer, "_get_regularization_losses", regularization)
        yield


def _float32_losses(losses: Callable[[], list[Any]]) -> list[Any]:
    return [
        keras.ops.cast(loss, "float32") if keras.backend.standardize_dtype(loss.dtype) in HALF else loss
        for loss in losses()
    ]


@contextlib.contextmanager
def random_layers_in_inference(layers: Iterable[keras.Operation]) -> Iterator[None]:
    """Calls layers that draw random numbers with `training=False`: half precision would draw other numbers."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if hasattr(layer, "seed_generator") and "training" in inspect.signature(layer.call).parameters:
                put(stack, layer, "call", functools.partial(_in_inference, layer.call))
        yield


def _in_inference(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **{**kwargs, "training": False})


def seed_generator() -> keras.random.SeedGenerator:
    """Returns a seed generator with a fixed seed, whose name does not affect the names of later objects."""
    return keras.random.SeedGenerator(0, name="looking")


@contextlib.contextmanager
def variables(model: keras.Model, traced: Any = None) -> Iterator[None]:
    """Restores variables that a training step assigns: weights, statistics, metrics, states of layers and generators.

    On JAX nothing is restored, since a step is a pure function of its variables.

    Args:
        model: The model that runs.
        traced: On TensorFlow, the `tf.ConcreteFunction` that runs; its captured variables are restored. Defaults to
            None, for a step that runs eagerly: then all variables reachable from the model are restored.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        handles = _handles(model) if traced is None else traced.captured_inputs
        with _resources(handles):
            yield
    elif backend == "torch":
        with _modules(model):
            yield
    else:
        yield


def _handles(model: keras.Model) -> Iterator[Any]:
    import tensorflow

    tracked = [*tensorflow.train.TrackableView(model).descendants(), *model.variables, *model.metrics_variables]
    found = [held.value if isinstance(held, keras.Variable) else held for held in tracked]
    found = [variable for variable in found if isinstance(variable, tensorflow.Variable)]
    for variable in {id(variable): variable for variable in found}.values():
        yield from (part.handle for part in model.distribute_strategy.experimental_local_results(variable))


@contextlib.contextmanager
def _resources(handles: Iterable[Any]) -> Iterator[None]:
    """Restores the variables among the tensors that a function captured."""
    import tensorflow
    from tensorflow.python.ops.handle_data_util import get_handle_data

    values = []
    for handle in handles:
        data = get_handle_data(handle) if handle.dtype == tensorflow.resource else None
        if data is not None and data.is_set:  # otherwise a table or an iterator
            dtype = tensorflow.as_dtype(data.shape_and_type[0].dtype)
            # Shares the memory of the variable until the next assignment.
            values.append((handle, tensorflow.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)))
    try:
        yield
    finally:
        for handle, value in values:
            tensorflow.raw_ops.AssignVariableOp(resource=handle, value=value)


@contextlib.contextmanager
def _modules(model: keras.Model) -> Iterator[None]:
    """Restores parameters, buffers, training modes and gradients of a model and all PyTorch modules inside."""
    tensors = [variable.value for variable in (*model.variables, *model.metrics_variables)]
    modules = [module for layer in model._flatten_layers() for module in layer.modules()]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(setattr, module, "training", module.training)
            stack.callback(module._buffers.update, dict(module._buffers))
            tensors += [*module.parameters(), *module.buffers()]
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            stack.callback(tensor.data.copy_, tensor.detach().clone())
            stack.callback(setattr, tensor, "grad", tensor.grad)
            tensor.grad = None
        yield


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Restores the random states of Python, NumPy, TensorFlow and PyTorch, which layers and datasets may use."""
    backend = keras.backend.backend()
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        if backend == "tensorflow":
            from tensorflow.python.eager import context

            # Separate seeds: a kernel that has drawn from a seed of the script would continue its sequence.
            put(stack, context.context(), "_rng", random.Random("tfmixed"))
        elif backend == "torch":
            import torch

            stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        yield
