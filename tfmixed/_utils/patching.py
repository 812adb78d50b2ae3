"""Functions put around the methods and properties of a framework's classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tfmixed._utils.autograph import do_not_convert


def around(kind: Any, name: str, function: Callable[..., Any], traced: bool = False) -> None:
    """Has `function(plain, self, *arguments, **named)` called instead of a method or property, for subclasses too.

    The method is replaced where it is defined: Keras compares it with its base's to see whether a user overrode it.

    Args:
        kind: The class.
        name: The name of the method or property.
        function: What is called instead.
        traced: Whether scripts call it within a `tf.function`, where AutoGraph is to leave it alone.
    """
    home = next(each for each in kind.__mro__ if name in vars(each))
    plain = vars(home)[name]
    if isinstance(plain, property):
        setattr(home, name, property(functools.partial(function, plain.fget), plain.fset, plain.fdel, plain.__doc__))
        return

    @functools.wraps(plain)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        return function(plain, self, *arguments, **named)

    # Keras asks constructors for their arguments, and does not look behind a decorator.
    method.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    setattr(home, name, do_not_convert(method) if traced else method)
