"""Keras variables by name that can be created and read in any graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

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
        self.create(initial_values, add_variable)

    def create(self, initial_values: Mapping[str, Any], add_variable: AddVariable) -> None:
        """Creates variables. They replace others of the same names."""
        with outside_of_graphs():
            self.variables |= {name: _variable(add_variable, name, value) for name, value in initial_values.items()}

    def read(self, name: str) -> Any:
        """Returns the present value of a variable as a tensor that later writes leave alone."""
        value = self.variables[name].value
        return tensor(value) if hasattr(value, "assign") else ops.copy(value)

    def assign(self, values: Mapping[str, Any]) -> None:
        """Writes variables by name."""
        for name, value in values.items():
            self.variables[name].assign(value)


def plain_variable(shape: Any, initializer: Any, dtype: str, name: str, layout: Any = None) -> keras.Variable:
    """Creates a variable that belongs to no optimizer: an `AddVariable`."""
    return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=False, name=name, layout=layout)


def _variable(add_variable: AddVariable, name: str, value: Any) -> keras.Variable:
    # "int" as in Keras: int64 on TensorFlow, which would keep int32 variables off the GPU.
    dtype = "int" if value.dtype.kind == "i" else "float32"
    return add_variable(
        shape=value.shape,
        dtype=dtype,
        initializer=lambda _shape, dtype: ops.cast(value, dtype),
        name=name,
        layout=replicated_layout(value.shape),
    )


def replicated_layout(shape: Sequence[int]) -> Any:
    """Returns the layout of a whole copy on each device of the present `keras.distribution`, or None without one.

    Without a layout of its own, a variable takes that of a pattern of `keras.distribution.LayoutMap`, such as
    `".*scale"`, which stands for weights.
    """
    distribution = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or distribution is None:  # Keras ignores it on other backends
        return None
    return keras.distribution.TensorLayout([None] * len(shape), distribution.device_mesh)


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
