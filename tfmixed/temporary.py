"""Changes that last as long as a `with` block: of attributes, dtype policies, variables and random states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy
from keras import ops
from keras.src.backend.common import global_state

from tfmixed import structure


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
                put(stack, each, "_dtype_policy", structure.policy_for(each, policy))
        yield


@contextlib.contextmanager
def in_float32(layers: Iterable[keras.Operation]) -> Iterator[None]:
    """Makes all layers of a model compute in float32 and give it, and those that they make meanwhile."""
    layers = list(layers)
    with with_policy(layers, "float32"), global_policy("float32"), contextlib.ExitStack() as stack:
        for each in layers:
            for name in ("output_dtype", "_gives"):  # what our own layers cast to
                if vars(each).get(name) is not None:
                    put(stack, each, name, "float32")
        yield


@contextlib.contextmanager
def restored(model: keras.Model) -> Iterator[None]:
    """Gives back what a step changes even where no optimizer acts: statistics, metrics, states of random generators."""
    backend, variables = keras.backend.backend(), []
    if backend != "jax":  # there a step is a function of them, and `fit` may hold the values
        variables = [*model.variables, *model.metrics_variables]
    if variables and (generator := global_state.get_global_attribute("global_seed_generator")) is not None:
        variables.append(generator.state)
    values = [ops.copy(variable.value) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        if backend == "torch":
            model.zero_grad()


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Gives back the states that a user's layers and datasets may draw from: Python's, numpy's and PyTorch's."""
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        if keras.backend.backend() == "torch":
            import torch

            stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        yield
