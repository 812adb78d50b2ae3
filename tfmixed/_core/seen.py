"""Tensors that passed by, known again by identity."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any


class Seen:
    """A set of objects by identity that keeps none of them alive.

    Args:
        objects: The first ones. What has no weak references, such as a number, and None are left out.
    """

    def __init__(self, objects: Iterable[Any] = ()) -> None:
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.add(objects)

    def add(self, objects: Iterable[Any]) -> None:
        """Adds more."""
        for each in objects:
            if each is not None:
                with contextlib.suppress(TypeError):
                    self._objects[id(each)] = each

    def __contains__(self, wanted: Any) -> bool:
        return wanted is not None and self._objects.get(id(wanted)) is wanted
