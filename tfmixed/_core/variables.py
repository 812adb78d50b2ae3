"""Keras variables by name, that can be made and read in any graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

# Makes a variable, with the arguments of `keras.optimizers.Optimizer.add_variable`.
AddVariable = Callable[..., keras.Variable]


class Variables:
    """Keras variables by name, made outside of any graph.

    Args:
        start: Their first values, of numpy.
        add_variable: Makes a variable.
    """

    def __init__(self, start: Mapping[str, Any], add_variable: AddVariable) -> None:
        self.variables: dict[str, keras.Variable] = {}
        self.make(start, add_variable)

    def make(self, start: Mapping[str, Any], add_variable: AddVariable) -> None:
        """Makes variables; another one of the same name is given up."""
        with _outside_of_graphs():
            self.variables |= {name: _variable(add_variable, name, value) for name, value in start.items()}

    def read(self, name: str) -> Any:
        """Returns the present value of a variable, as a tensor of its own."""
        value = self.variables[name].value
        return tensor(value) if hasattr(value, "assign") else ops.copy(value)

    def assign(self, values: Mapping[str, Any]) -> None:
        """Writes variables."""
        for name, value in values.items():
            self.variables[name].assign(value)


def plain_variable(shape: Any, initializer: Any, dtype: str, name: str) -> keras.Variable:
    """Makes a variable that belongs to no optimizer: an `AddVariable`."""
    return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=False, name=name)


def _variable(add_variable: AddVariable, name: str, value: Any) -> keras.Variable:
    # "int" as in Keras: int64 on TensorFlow, which would keep int32 variables off the GPU.
    dtype = "int" if value.dtype.kind == "i" else "float32"
    return add_variable(
        shape=value.shape, dtype=dtype, initializer=lambda _shape, dtype: ops.cast(value, dtype), name=name
    )


def _outside_of_graphs() -> contextlib.AbstractContextManager[Any]:
    # A variable made while a tf.function is traced would belong to that trace alone.
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow

    return tensorflow.init_scope()


def tensor(variable: Any) -> Any:
    """Returns the value of a `tf.Variable`: no copy, and yet a later write leaves it alone."""
    import tensorflow

    if hasattr(variable, "values") or not tensorflow.executing_eagerly():
        return variable.value()
    # What the variable's own method ends in, without three quarters of the time: the logger reads in each step.
    return tensorflow.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
