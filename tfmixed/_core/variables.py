"""Keras variables by name that can be created and read in any graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from tfmixed._core import scalar_ops

# Creates a variable, with the arguments of `keras.optimizers.Optimizer.add_variable`.
AddVariable = Callable[..., keras.Variable]


class Variables:
    """Keras variables by name, created outside of any graph.

    Args:
        initial_values: Initial values by name, of NumPy.
        add_variable: Function that creates a variable.
    """

    def __init__(self, initial_values: Mapping[str, Any], add_variable: AddVariable) -> None:
        self.variables: dict[str, keras.Variable] = {}
        # On PyTorch, values on the host by name, with the tensor and the number of its last write.
        self._on_host: dict[str, tuple[Any, int, Any]] = {}
        self.create(initial_values, add_variable)

    def create(self, initial_values: Mapping[str, Any], add_variable: AddVariable) -> None:
        """Creates variables. They replace others of the same names."""
        with outside_of_graphs():
            self.variables |= {name: _variable(add_variable, name, value) for name, value in initial_values.items()}

    def read(self, name: str) -> Any:
        """Returns the present value of a variable that later writes leave alone: a tensor, or a NumPy array on PyTorch.

        On PyTorch the device is read only if something else has written the variable.
        """
        value = self.variables[name].value
        if not scalar_ops.ON_HOST:
            return tensor(value) if hasattr(value, "assign") else ops.copy(value)
        known = self._on_host.get(name)
        if known is None or known[0] is not value or known[1] != value._version:
            known = self._on_host[name] = value, value._version, scalar_ops.copy(ops.convert_to_numpy(value))
        return known[2]

    def assign(self, values: Mapping[str, Any]) -> None:
        """Writes variables by name. On PyTorch, only those that change."""
        for name, value in values.items():
            if scalar_ops.ON_HOST and not ops.is_tensor(value):
                self._assign_from_host(name, value)
            else:
                self.variables[name].assign(value)

    def _assign_from_host(self, name: str, value: Any) -> None:
        old, variable = self.read(name), self.variables[name]
        new = scalar_ops.cast(value, old.dtype)
        if new.ndim:
            variable.assign(new)
        elif new != old and not (new != new and old != old):  # NaN
            held = variable.value
            held.detach().fill_(new.item())
            self._on_host[name] = held, held._version, new


def plain_variable(shape: Any, initializer: Any, dtype: str, name: str) -> keras.Variable:
    """Creates a variable that belongs to no optimizer: an `AddVariable`."""
    return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=False, name=name)


def _variable(add_variable: AddVariable, name: str, value: Any) -> keras.Variable:
    # "int" as in Keras: int64 on TensorFlow, which would keep int32 variables off the GPU.
    dtype = "int" if value.dtype.kind == "i" else "float32"
    return add_variable(
        shape=value.shape, dtype=dtype, initializer=lambda _shape, dtype: ops.cast(value, dtype), name=name
    )


def outside_of_graphs() -> contextlib.AbstractContextManager[Any]:
    """Returns a context for creating variables. Those created in a `tf.function` would belong to its trace alone."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def tensor(variable: Any) -> Any:
    """Returns the value of a `tf.Variable` without a copy, as a tensor that later writes leave alone."""
    import tensorflow as tf

    if hasattr(variable, "values") or not tf.executing_eagerly():
        return variable.value()
    # The variable's own method ends in this call after three times its time. The logger reads in every step.
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
