"""Patches of methods and properties of framework classes, and protection from TensorFlow's AutoGraph."""

from __future__ import annotations

import functools
import inspect
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


def around(cls: Any, name: str, function: Callable[..., Any], traced: bool = False) -> None:
    """Replaces a method or property by one that calls `function(original, self, *args, **kwargs)`.

    The class that defines the method is patched, so subclasses are affected too. Keras compares methods with those of
    the base class to detect overrides.

    Args:
        cls: The class.
        name: The name of the method or property.
        function: The function to call instead.
        traced: Whether scripts call the method within a `tf.function`, where AutoGraph must not convert it. Defaults
            to False.
    """
    owner = next(base for base in cls.__mro__ if name in vars(base))
    original = vars(owner)[name]
    if isinstance(original, property):
        getter = functools.partial(function, original.fget)
        setattr(owner, name, property(getter, original.fset, original.fdel, original.__doc__))
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(original, self, *args, **kwargs)

    # Keras inspects the arguments of constructors, and does not look behind a decorator.
    method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]  # functions take attributes
    setattr(owner, name, do_not_convert(method) if traced else method)
