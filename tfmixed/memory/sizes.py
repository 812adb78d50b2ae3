"""Bytes of the variables that training holds, counted from shapes and dtypes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes  # noqa: F401  # adds bfloat16 to NumPy's dtypes
import numpy

from tfmixed.formats import HALF

_SMALL = 4096  # elements, below which states stay in float32 instead of int8
_STATE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}  # a float32 scale for each block of 256
_WEIGHTS = ("stochastic", "nearest", "split")


@dataclass(frozen=True)
class Held:
    """A variable that training holds.

    Args:
        shape: The shape.
        itemsize: The bytes of an element.
        trainable: If True, training also holds a gradient of the same size. Defaults to False.
        cast: If True, its layer computes with a half-precision copy. Defaults to False.
        embedding: If True, it is the table of an embedding. Defaults to False.
    """

    shape: tuple[int, ...]
    itemsize: float
    trainable: bool = False
    cast: bool = False
    embedding: bool = False

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """The bytes of all elements."""
        return self.size * self.itemsize


@dataclass(frozen=True)
class Sizes:
    """The variables of a training.

    Args:
        model: The variables of the model.
        optimizer: The variables of the optimizer.
    """

    model: tuple[Held, ...]
    optimizer: tuple[Held, ...]

    @property
    def weights(self) -> int:
        """Bytes of the variables of the model."""
        return int(sum(held.bytes for held in self.model))

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, which have the dtypes of their variables."""
        return int(sum(held.bytes for held in self.model if held.trainable))

    @property
    def states(self) -> int:
        """Bytes of the variables of the optimizer."""
        return int(sum(held.bytes for held in self.optimizer))

    @property
    def copies(self) -> int:
        """Bytes of the half-precision copies of float32 weights, if all are held at once."""
        return sum(2 * held.size for held in self.model if held.cast)

    @property
    def total(self) -> int:
        """Bytes of all of these."""
        return self.weights + self.gradients + self.states + self.copies


def sizes_of(model: keras.Model) -> Sizes:
    """Counts the variables of a model and of its optimizer, which must be built.

    Raises:
        ValueError: If the model or its optimizer is not built.

    Example:
    >>> model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(500, use_bias=False)])
    >>> model.compile("adam", loss="mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> sizes = sizes_of(model)
    >>> sizes.weights, sizes.gradients, sizes.states
    (2000000, 2000000, 4000012)
    """
    optimizer = getattr(model, "optimizer", None)
    if not model.built or optimizer is None or not optimizer.built:
        raise ValueError(
            "The model must be built and compiled, and its optimizer built: call `model.optimizer.build("
            f"model.trainable_variables)`. Received: {model.name!r}"
        )
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Layer)]
    owners = {id(variable): layer for layer in layers for variable in layer._trainable_variables}
    found = {id(variable): variable for variable in model.variables}.values()
    states = {id(variable): variable for variable in optimizer.variables}.values()
    return Sizes(
        tuple(_held(variable, owners.get(id(variable))) for variable in found),
        tuple(_held(variable, None) for variable in states if id(variable) not in {id(weight) for weight in found}),
    )


def with_option(sizes: Sizes, weights: str = "stochastic", states: str = "bfloat16") -> Sizes:
    """Returns the sizes with bfloat16 weights and a `LowPrecisionOptimizer`.

    Args:
        sizes: Sizes with float32 weights and states.
        weights: `"stochastic"`, `"nearest"` or `"split"`, which holds the other 16 bits in the optimizer. Defaults to
            `"stochastic"`.
        states: `"float32"`, `"bfloat16"` or `"int8"`, which keeps states of embeddings and of variables below 4,096
            elements in float32. Defaults to `"bfloat16"`.

    Raises:
        ValueError: If an argument is unknown.

    Example:
    >>> with_option(Sizes((Held((1000, 1000), 4, trainable=True),), (Held((1000, 1000), 4),) * 2)).total
    8000000
    """
    if weights not in _WEIGHTS or states not in _STATE_BYTES:
        raise ValueError(
            f"`weights` must be one of {', '.join(_WEIGHTS)}, and `states` one of {', '.join(_STATE_BYTES)}. Received: "
            f"weights={weights!r}, states={states!r}"
        )
    tables = {held.shape for held in sizes.model if held.embedding}

    def state(held: Held) -> Held:
        if not held.shape or (states == "int8" and (held.size < _SMALL or held.shape in tables)):
            return held
        return dataclasses.replace(held, itemsize=min(held.itemsize, _STATE_BYTES[states]))

    def weight(held: Held) -> Held:
        is_wide = held.trainable and held.itemsize == 4
        return dataclasses.replace(held, itemsize=2.0, cast=False) if is_wide else held

    remainders = [Held(held.shape, 2.0) for held in sizes.model if held.trainable and held.itemsize == 4]
    return Sizes(
        tuple(map(weight, sizes.model)),
        (*map(state, sizes.optimizer), *(remainders if weights == "split" else ())),
    )


def _held(variable: Any, layer: Any) -> Held:
    itemsize = numpy.dtype(keras.backend.standardize_dtype(variable.dtype)).itemsize
    is_cast = layer is not None and variable._autocast and itemsize == 4 and layer.compute_dtype in HALF
    is_embedding = isinstance(layer, keras.layers.Embedding)
    trainable = layer is not None and variable.trainable
    return Held(tuple(variable.shape), itemsize, trainable, is_cast, is_embedding)
