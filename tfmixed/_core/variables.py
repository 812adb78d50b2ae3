"""Keras variables by name that can be created and read in any graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy
from keras import ops
from keras.src.backend.common.stateless_scope import in_stateless_scope

from tfmixed._core import scalar_ops

# Creates a variable, with the arguments of `keras.optimizers.Optimizer.add_variable`.
AddVariable = Callable[..., keras.Variable]


class _Place(NamedTuple):
    """The vector that holds the values of a name beside others, their first index in it, and their shape."""

    vector: str
    start: int
    shape: tuple[int, ...]


class _HostCopy(NamedTuple):
    """PyTorch's tensor of a variable, the number of its last write, and its value then."""

    held: Any
    version: int
    value: Any


class Variables:
    """Variables that are read and written by name.

    Args:
        initial_values: NumPy integers and float32 values, scalars or arrays, by name.
        add_variable: Function that creates a variable.
        apart: Names that must be variables of their own, if the others may share one for each dtype. A compiled
            function of JAX takes microseconds for each argument. Defaults to None, for a variable for each name.
    """

    def __init__(
        self, initial_values: Mapping[str, Any], add_variable: AddVariable, apart: Container[str] | None = None
    ) -> None:
        self.variables: dict[str, keras.Variable] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # by name
        self._apart = apart
        self._places: dict[str, _Place] = {}
        self._on_host: dict[str, _HostCopy] = {}
        self.create(initial_values, add_variable)

    def create(self, initial_values: Mapping[str, Any], add_variable: AddVariable) -> None:
        """Adds variables to those that there are."""
        self.shapes |= {name: value.shape for name, value in initial_values.items()}
        values = initial_values if self._apart is None else self._packed(initial_values, self._apart)
        with outside_of_graphs():
            self.variables |= {name: _variable(add_variable, name, value) for name, value in values.items()}

    def _packed(self, values: Mapping[str, Any], apart: Container[str]) -> dict[str, Any]:
        """Returns values to store: those that are apart, and for each dtype a vector of scalars and one of arrays."""
        stored = {name: value for name, value in values.items() if name in apart}
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in stored:
                kind = f"{value.dtype}_{'arrays' if value.ndim else 'scalars'}_{len(self.variables)}"
                groups.setdefault(kind, {})[name] = value
        for vector, group in groups.items():
            starts = numpy.cumsum([0, *(value.size for value in group.values())]).tolist()
            for (name, value), start in zip(group.items(), starts[:-1], strict=True):
                self._places[name] = _Place(vector, start, value.shape)
            stored[vector] = numpy.concatenate([value.ravel() for value in group.values()])
        return stored

    def read(self, name: str) -> Any:
        """Returns the present value of a name that later writes leave alone: a tensor, or a NumPy array on PyTorch.

        On PyTorch the device is read only if something else has written the variable. A write to `tensor.data`, which
        PyTorch does not count, is not noticed.
        """
        place = self._places.get(name)
        if place is not None:
            value = self.variables[place.vector].value
            return ops.reshape(value[place.start : place.start + math.prod(place.shape)], place.shape)
        if scalar_ops.ON_HOST and not in_stateless_scope():
            return self._host_copy(name).value
        value = self.variables[name].value
        if scalar_ops.ON_HOST:
            return scalar_ops.copy(ops.convert_to_numpy(value))
        return tensor(value) if hasattr(value, "assign") else ops.copy(value)

    def _host_copy(self, name: str) -> _HostCopy:
        held = self.variables[name]._value  # `value` takes longer than the rest of a read
        known = self._on_host.get(name)
        if known is None or known.held is not held or known.version != held._version:
            known = _HostCopy(held, held._version, scalar_ops.copy(held.detach().cpu().numpy()))
            self._on_host[name] = known
        return known

    def assign(self, values: Mapping[str, Any]) -> None:
        """Writes values by name. On PyTorch, only those that change."""
        scalars: dict[str, dict[int, Any]] = {}
        for name, value in values.items():
            place = self._places.get(name)
            if place is not None and place.shape:
                self._assign_at(place, 0, value)
            elif place is not None:
                scalars.setdefault(place.vector, {})[place.start] = value
            elif scalar_ops.ON_HOST and not (ops.is_tensor(value) or in_stateless_scope()):
                self._assign_from_host(name, value)
            else:
                self.variables[name].assign(value)
        for vector, changed in scalars.items():
            variable = self.variables[vector]
            elements = dict(enumerate(ops.unstack(variable.value))) | changed
            variable.assign(ops.stack([ops.cast(element, variable.dtype) for element in elements.values()]))

    def assign_row(self, name: str, row: Any, value: Any, is_written: Any) -> None:
        """Writes one row of an array, or leaves it as it is.

        Args:
            name: Name of the array.
            row: Integer scalar.
            value: Scalar or vector.
            is_written: Boolean scalar.
        """
        place = self._places.get(name)
        if place is not None:
            self._assign_at(place, row * math.prod(place.shape[1:]), value, is_written)
            return
        shape, old = self.shapes[name], self.read(name)
        is_row = scalar_ops.logical_and(is_written, scalar_ops.equal(scalar_ops.arange(shape[0], dtype="int32"), row))
        is_row = scalar_ops.reshape(is_row, (-1, *(1 for _ in shape[1:])))
        self.assign({name: scalar_ops.where(is_row, scalar_ops.cast(value, old.dtype), old)})

    def _assign_at(self, place: _Place, offset: Any, value: Any, is_written: Any = True) -> None:
        variable, start = self.variables[place.vector], [place.start + offset]
        value = ops.reshape(ops.cast(value, variable.dtype), (-1,))
        value = ops.where(is_written, value, ops.slice(variable.value, start, value.shape))
        variable.assign(ops.slice_update(variable.value, start, value))

    def _assign_from_host(self, name: str, value: Any) -> None:
        held, _, old = self._host_copy(name)
        new = scalar_ops.cast(value, old.dtype)
        if new.ndim:
            if not numpy.array_equal(new, old):
                self.variables[name].assign(new)
                self._on_host[name] = _HostCopy(held, held._version, scalar_ops.copy(new))
        elif new != old and not (new != new and old != old):  # NaN
            held.detach().fill_(new.item())
            self._on_host[name] = _HostCopy(held, held._version, new)


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
