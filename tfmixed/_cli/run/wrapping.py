"""Puts functions around the methods of a framework's classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from tfmixed._utils.patching import around

__all__ = ["around", "bound"]


def bound(plain: Callable[..., Any], *arguments: Any, **named: Any) -> inspect.BoundArguments | None:
    """Returns the arguments by name; None where they do not fit, which is for `plain` to say."""
    try:
        return inspect.signature(plain).bind(*arguments, **named)
    except TypeError:
        return None
