"""Stored forms of weights and optimizer states, and the float32 views through which an optimizer updates them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from tfmixed._core import gradients, rounding


class Rounded:
    """A variable stored in its own dtype.

    Args:
        variable: The variable.
        stream: Stream of random bits for stochastic rounding, or None for rounding to nearest. Defaults to None.
    """

    def __init__(self, variable: Any, stream: int | None = None) -> None:
        self.variables, self._stream = [variable], stream
        self._is_half = keras.backend.standardize_dtype(variable.dtype) == "bfloat16"

    def load(self) -> Any:
        return gradients.widened(ops.convert_to_tensor(self.variables[0]))

    def store(self, values: Any, step: Any = None) -> None:
        """Writes values: rounded to nearest, or stochastically where `step` is given."""
        if self._is_half and self._stream is not None and step is not None:
            values = rounding.to_bfloat16(values, rounding.random_bits(values.shape, step, self._stream))
        self.variables[0].assign(ops.cast(values, self.variables[0].dtype))


class Split:
    """A bfloat16 variable, and the rest of its float32 values in an int16 variable."""

    def __init__(self, variable: Any, lower: keras.Variable) -> None:
        self.variables = [variable, lower]

    def load(self) -> Any:
        upper, lower = self.variables
        return rounding.join(ops.convert_to_tensor(upper), lower)

    def store(self, values: Any, step: Any = None) -> None:
        del step
        for variable, part in zip(self.variables, rounding.split(values), strict=True):
            variable.assign(part)


class Blocks:
    """An optimizer state in blocks of 8-bit codes.

    Args:
        codes: uint8 variable of shape (blocks, 256).
        scales: float32 variable of shape (blocks, 1).
        shape: Shape of the state.
        stream: Stream of random bits.
    """

    def __init__(self, codes: keras.Variable, scales: keras.Variable, shape: Sequence[int], stream: int) -> None:
        self.variables, self._shape, self._stream = [codes, scales], shape, stream

    def load(self) -> Any:
        codes, scales = self.variables
        return rounding.from_blocks(codes, scales, self._shape)

    def store(self, values: Any, step: Any = None) -> None:
        """Writes values: rounded to nearest, or stochastically where `step` is given."""
        codes = self.variables[0]
        bits = None if step is None else rounding.random_bits(codes.shape, step, self._stream)
        for variable, part in zip(self.variables, rounding.to_blocks(values, bits), strict=True):
            variable.assign(part)


class Initial(NamedTuple):
    """The initial values of an optimizer state, before it is stored."""

    shape: Any
    dtype: str
    initializer: Callable[..., Any]

    def load(self) -> Any:
        return self.initializer(self.shape, dtype=self.dtype)


class Update:
    """The views that one update has read or written."""

    def __init__(self) -> None:
        self.views: list[Float32View] | None = None

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[Float32View]]:
        """Keeps the values of views that are read or written within, and lists these views."""
        views: list[Float32View] = []
        self.views = views
        try:
            yield views
        finally:
            self.views = None
            for view in views:
                view.release()


class Float32View(keras.Variable):
    """A float32 variable that stands for a variable or optimizer state in another form.

    Within an update its value is read once and written once. Elsewhere each read decodes what is stored, and each
    write encodes it, rounded to nearest. It holds no memory of its own but one number.

    Args:
        shape: Shape of the variable.
        dtype: Its dtype. A view of a float64 variable is float64.
        path: Its path.
        update: The update that it takes part in.
        storage: The stored form. Defaults to None, to be set before the first read.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, path: str, update: Update, storage: Any = None) -> None:
        wide = "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"
        super().__init__(0.0, dtype=wide, trainable=False, autocast=False, name=path.rpartition("/")[2])
        self._shape, self._ndim, self._path = tuple(shape), len(shape), path
        self.like: Any = None  # the trainable variable that it belongs to
        self.storage, self._update, self._current, self.is_written = storage, update, None, False

    @property
    def value(self) -> Any:
        """The present value, a float32 tensor."""
        if self._current is not None:
            return self._current
        value = self.storage.load()
        if self._update.views is not None:
            self._current = value
            self._update.views.append(self)
        return value

    def assign(self, value: Any) -> Any:
        """Writes a value of the same shape."""
        value = ops.broadcast_to(ops.cast(value, self._dtype), self._shape)
        if self._update.views is None:
            self.storage.store(value)
        else:
            if self._current is None:
                self._update.views.append(self)
            self._current, self.is_written = value, True
        return value

    def store(self, step: Any) -> None:
        """Stores what an update has written."""
        # Fused operations of PyTorch write into the tensors that they read.
        if self.is_written or keras.backend.backend() == "torch":
            self.storage.store(self._current, step)

    def release(self) -> None:
        """Forgets the value that an update has read or written."""
        self._current, self.is_written = None, False

    def _serialize_to_tensors(self) -> dict[str, Any]:
        return {"VARIABLE_VALUE": self.value}

    def _restore_from_tensors(self, restored_tensors: dict[str, Any]) -> None:
        self.assign(restored_tensors["VARIABLE_VALUE"])
