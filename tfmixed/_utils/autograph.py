"""Protection of this package's functions from TensorFlow's AutoGraph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import keras

_F = TypeVar("_F", bound=Callable[..., Any])


def do_not_convert(function: _F) -> _F:
    """Keeps AutoGraph from rewriting `function` and what it calls, which would take a second for each trace."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return cast("_F", tf.autograph.experimental.do_not_convert(function))
