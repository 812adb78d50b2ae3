"""Stored forms of weights and optimizer states, and the float32 views through which an optimizer updates them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from tfmixed._core import gradients, rounding
from tfmixed._core.variables import replicated_layout

# Returns random bits of a shape.
Draw = Callable[[Sequence[int]], Any]


class Rounded:
    """A variable stored in its own dtype.

    Args:
        variable: The variable.
        is_random: If True, an update is rounded stochastically, to bfloat16. Defaults to False.
    """

    def __init__(self, variable: Any, is_random: bool = False) -> None:
        self.variables, self._is_random = [variable], is_random

    def load(self) -> Any:
        return gradients.widened(ops.convert_to_tensor(self.variables[0]))

    def store(self, values: Any, draw: Draw | None = None) -> None:
        """Writes values: rounded to nearest, or stochastically where `draw` is given."""
        if self._is_random and draw is not None:
            values = rounding.to_bfloat16(values, draw(values.shape))
        self.variables[0].assign(ops.cast(values, self.variables[0].dtype))


class Split:
    """A bfloat16 variable, and the rest of its float32 values in an int16 variable."""

    def __init__(self, variable: Any, lower: keras.Variable) -> None:
        self.variables = [variable, lower]

    def load(self) -> Any:
        upper, lower = self.variables
        return rounding.join(ops.convert_to_tensor(upper), lower)

    def store(self, values: Any, draw: Draw | None = None) -> None:
        """Writes values."""
        del draw
        for variable, part in zip(self.variables, rounding.split(values), strict=True):
            variable.assign(part)


class Blocks:
    """An optimizer state in blocks of 8-bit codes.

    Args:
        codes: uint8 variable of shape (blocks, 256).
        scales: float32 variable of shape (blocks, 1).
        shape: Shape of the state.
    """

    def __init__(self, codes: keras.Variable, scales: keras.Variable, shape: Sequence[int]) -> None:
        self.variables, self._shape = [codes, scales], shape

    def load(self) -> Any:
        codes, scales = self.variables
        return rounding.from_blocks(codes, scales, self._shape)

    def store(self, values: Any, draw: Draw | None = None) -> None:
        """Writes values: rounded to nearest, or stochastically where `draw` is given."""
        bits = None if draw is None else draw(self.variables[0].shape)
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
    """The views that one update has read or written.

    `stream` is the first stream of random bits of the updated variable, if it is a tensor of a compiled function.
    """

    def __init__(self) -> None:
        self.views: list[Float32View] | None = None
        self.stream: Any = None

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
    """

    def __init__(self, shape: Sequence[int], dtype: Any, path: str, update: Update) -> None:
        wide = "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"
        name, layout = path.rpartition("/")[2], replicated_layout(())
        super().__init__(0.0, dtype=wide, trainable=False, autocast=False, name=name, layout=layout)
        self._shape, self._ndim, self._path = tuple(shape), len(shape), path
        self.like: Any = None  # the trainable variable that it belongs to
        self.stream, self.place = 0, 0  # the first stream of random bits of that variable, and its own from there
        self.storage: Any = None  # the stored form, set before the first read
        self._update, self._current, self.is_written = update, None, False

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
            stream = self.place + (self.stream if self._update.stream is None else self._update.stream)
            self.storage.store(self._current, functools.partial(rounding.random_bits, step=step, stream=stream))

    def release(self) -> None:
        """Forgets the value that an update has read or written."""
        self._current, self.is_written = None, False
