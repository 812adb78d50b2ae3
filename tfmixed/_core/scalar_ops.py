"""Operations on the scalars and small vectors of a scaler's state: NumPy's on PyTorch, those of `keras.ops` elsewhere.

On PyTorch a step waits for its finite check anyway. What follows from it is computed on the host, where an operation
takes a tenth of the time.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy
from keras.ops import convert_to_numpy, is_tensor

ON_HOST = keras.backend.backend() == "torch"
__all__ = [
    "ON_HOST",
    "cast",
    "convert_to_numpy",
    "convert_to_tensor",
    "copy",
    "is_tensor",
    "quiet",
    "tensor",
    "unstack",
    "where",
]

# Decorates functions in which NumPy may compute with values that are not finite.
quiet = numpy.errstate(all="ignore")


def cast(value: Any, dtype: Any) -> Any:
    """Returns a value in a dtype."""
    return numpy.asarray(value, dtype)[()] if ON_HOST else keras.ops.cast(value, dtype)


def convert_to_tensor(value: Any, dtype: Any = None) -> Any:
    """Returns an array."""
    return numpy.asarray(value, dtype) if ON_HOST else keras.ops.convert_to_tensor(value, dtype)


def copy(value: Any) -> Any:
    """Returns a value that later writes leave alone."""
    return numpy.array(value)[()] if ON_HOST else keras.ops.copy(value)


def tensor(value: Any) -> Any:
    """Returns a value as a tensor of the backend."""
    return keras.ops.convert_to_tensor(value) if ON_HOST else value


def unstack(value: Any, count: int) -> Any:
    """Returns the elements of a vector."""
    return list(value) if ON_HOST else keras.ops.unstack(value, count)


def where(condition: Any, x: Any, y: Any) -> Any:
    """Returns the elements of `x` where `condition` holds, and those of `y` elsewhere."""
    if not ON_HOST:
        return keras.ops.where(condition, x, y)
    return numpy.where(condition, x, y) if numpy.ndim(condition) else x if condition else y


def __getattr__(name: str) -> Any:
    return getattr(numpy if ON_HOST else keras.ops, name)
