"""Bytes of the variables that training holds, counted from shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes  # noqa: F401  # adds bfloat16 to NumPy's dtypes
import numpy

from tfmixed.formats import HALF


@dataclass(frozen=True)
class Sizes:
    """Bytes of the variables of a training.

    Args:
        weights: Of the variables of the model.
        gradients: Of the gradients, which have the dtypes of their variables.
        states: Of the variables of the optimizer.
        copies: Of the half-precision copies of float32 weights, if all are held at once.
    """

    weights: int
    gradients: int
    states: int
    copies: int


def sizes_of(model: keras.Model) -> Sizes:
    """Counts the variables of a model and of its optimizer, which must be built.

    Raises:
        ValueError: If the model or its optimizer is not built.

    Example:
    >>> model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(500, use_bias=False)])
    >>> model.compile("adam", loss="mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> sizes_of(model)
    Sizes(weights=2000000, gradients=2000000, states=4000012, copies=0)
    """
    optimizer = getattr(model, "optimizer", None)
    if not model.built or optimizer is None or not optimizer.built:
        raise ValueError(
            "The model must be built and compiled, and its optimizer built: call `model.optimizer.build("
            f"model.trainable_variables)`. Received: {model.name!r}"
        )
    weights = {id(variable): variable for variable in model.variables}
    states = {id(variable): variable for variable in optimizer.variables if id(variable) not in weights}
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Layer)]
    wide = {
        id(variable): variable
        for layer in layers
        if layer.compute_dtype in HALF
        for variable in layer._trainable_variables
        if variable._autocast and variable.dtype == "float32"
    }
    return Sizes(
        weights=_bytes(weights.values()),
        gradients=_bytes(model.trainable_variables),
        states=_bytes(states.values()),
        copies=_bytes(wide.values()) // 2,
    )


def _bytes(variables: Iterable[Any]) -> int:
    items = ((v.shape, numpy.dtype(keras.backend.standardize_dtype(v.dtype)).itemsize) for v in variables)
    return sum(math.prod(shape) * size for shape, size in items)
