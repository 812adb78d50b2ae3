"""Changes that last as long as a `with` block: of attributes, dtype policies, variables and random states."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy
from keras.src.backend.common import global_state

from tfmixed._utils import layer_tree
from tfmixed.formats import HALF


def put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Gives an object an attribute of its own until the stack is left; Keras and PyTorch do not notice."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    stack.callback(vars(owner).update, before)
    stack.callback(vars(owner).pop, name)
    vars(owner)[name] = value


@contextlib.contextmanager
def global_policy(policy: Any) -> Iterator[None]:
    """Sets the global dtype policy, None leaves it; at the end it is what it was, whoever set it meanwhile."""
    before = keras.config.dtype_policy()
    if policy is not None:
        keras.config.set_dtype_policy(keras.dtype_policies.get(policy))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def with_policy(layers: Iterable[keras.Operation], policy: str) -> Iterator[None]:
    """Gives layers, operations left out, another dtype policy; what is quantized stays so."""
    with contextlib.ExitStack() as stack:
        for each in layers:
            if isinstance(each, keras.layers.Layer):  # not `dtype_policy`, which would write into a DTypePolicyMap
                put(stack, each, "_dtype_policy", layer_tree.policy_for(each, policy))
        yield


@contextlib.contextmanager
def in_float32(layers: Iterable[keras.Operation]) -> Iterator[None]:
    """Makes all layers of a model compute in float32 and give it, and those that they make meanwhile.

    GPUs multiply with all bits of it, too.
    """
    layers = list(layers)
    with with_policy(layers, "float32"), global_policy("float32"), _all_bits(), contextlib.ExitStack() as stack:
        for each in layers:
            for name in ("output_dtype", "_gives"):  # what our own layers cast to
                if vars(each).get(name) is not None:
                    put(stack, each, name, "float32")
        yield


@contextlib.contextmanager
def _all_bits() -> Iterator[None]:
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
    """Restores what the code of layers changes even where it is only traced: random states and added losses.

    Args:
        model: The model whose layers are called.
        seeds: Keras's global generator of seeds meanwhile, which a traced function must outlive. Defaults to a new one.
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
    """Restores the losses that a model's layers added in their last call."""
    losses = [(layer._losses, list(layer._losses)) for layer in model._flatten_layers()]
    try:
        yield
    finally:
        for held, old in losses:
            held[:] = old


@contextlib.contextmanager
def losses_in_float32(layers: Iterable[keras.Operation]) -> Iterator[None]:
    """Makes layers give the losses that they add in float32.

    Keras leaves them in half precision, which TensorFlow refuses to sum with the loss of `compile`.
    """
    with contextlib.ExitStack() as stack:
        for each in layers:
            if isinstance(each, keras.layers.Layer):
                regularization = functools.partial(_in_float32, each._get_regularization_losses)
                put(stack, each, "_get_own_losses", functools.partial(_in_float32, each._get_own_losses))
                put(stack, each, "_get_regularization_losses", regularization)
        yield


def _in_float32(losses: Callable[[], list[Any]]) -> list[Any]:
    return [
        keras.ops.cast(loss, "float32") if keras.backend.standardize_dtype(loss.dtype) in HALF else loss
        for loss in losses()
    ]


def seed_generator() -> keras.random.SeedGenerator:
    """Returns a generator of seeds that draws its own from nothing, and takes no name from others."""
    return keras.random.SeedGenerator(0, name="looking")


@contextlib.contextmanager
def variables(model: keras.Model, traced: Any = None) -> Iterator[None]:
    """Restores what a step assigns even where no optimizer acts: statistics, metrics, states of layers and generators.

    Args:
        model: The model that is run. On JAX a step is a function of its variables, and nothing is to be restored.
        traced: On TensorFlow the `tf.ConcreteFunction` that runs, whose captures are restored. None for a step that
            runs eagerly: then all variables that the attributes of the model lead to are.
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

    held = [*tensorflow.train.TrackableView(model).descendants(), *model.variables, *model.metrics_variables]
    found = [each.value if isinstance(each, keras.Variable) else each for each in held]
    found = [each for each in found if isinstance(each, tensorflow.Variable)]
    for variable in {id(each): each for each in found}.values():
        yield from (part.handle for part in model.distribute_strategy.experimental_local_results(variable))


@contextlib.contextmanager
def _resources(handles: Iterable[Any]) -> Iterator[None]:
    """Restores the variables among the tensors that a function captures."""
    import tensorflow
    from tensorflow.python.ops.handle_data_util import get_handle_data

    values = []
    for handle in handles:
        data = get_handle_data(handle) if handle.dtype == tensorflow.resource else None
        if data is not None and data.is_set:  # else a table or an iterator
            dtype = tensorflow.as_dtype(data.shape_and_type[0].dtype)
            # Shares the memory of the variable until that is written to.
            values.append((handle, tensorflow.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)))
    try:
        yield
    finally:
        for handle, value in values:
            tensorflow.raw_ops.AssignVariableOp(resource=handle, value=value)


@contextlib.contextmanager
def _modules(model: keras.Model) -> Iterator[None]:
    """Restores parameters, buffers, modes and gradients of a model and of all PyTorch modules inside it."""
    tensors = [each.value for each in (*model.variables, *model.metrics_variables)]
    modules = [module for layer in model._flatten_layers() for module in layer.modules()]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(setattr, module, "training", module.training)
            stack.callback(module._buffers.update, dict(module._buffers))
            tensors += [*module.parameters(), *module.buffers()]
        for tensor in {id(each): each for each in tensors}.values():
            stack.callback(tensor.data.copy_, tensor.detach().clone())
            stack.callback(setattr, tensor, "grad", tensor.grad)
            tensor.grad = None
        yield


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Restores the states that a user's layers and datasets may draw from: of Python, numpy, TensorFlow and PyTorch."""
    backend = keras.backend.backend()
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        if backend == "tensorflow":
            from tensorflow.python.eager import context

            # Seeds of its own: a kernel that has drawn from one of the script's would go on from there.
            put(stack, context.context(), "_rng", random.Random("tfmixed"))
        elif backend == "torch":
            import torch

            stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        yield
