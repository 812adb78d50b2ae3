"""A user's own models, named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def function_of(spec: str) -> Callable[..., Any]:
    """Returns the function that `"module:function"` names; modules of the current folder are found too.

    Raises:
        ValueError: There is no such module or function, with what is wrong.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f'model must be "module:function", received {spec!r}')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"model names a module that does not import, received {spec!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"model must name a function of {module_name}, received {spec!r}: it has no {name}")
    return function  # type: ignore[no-any-return]  # whatever a user wrote
