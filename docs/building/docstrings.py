"""Reads docstrings and signatures as they are meant here."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

from griffe import Attribute, Extension, Function, Object

EXAMPLE = re.compile(r"^Example:\n+(>>> .*?)(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


class AsMeant(Extension):
    """Makes a section of what follows `Example:`, which is not indented, and shows constants as numbers."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = EXAMPLE.sub(lambda found: "Examples:\n" + indent(found[1], "    "), text)

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Puts the value of a module's constant where it is a default."""
        for parameter in func.parameters:
            constant = func.module.members.get(str(parameter.default))
            if isinstance(constant, Attribute):
                parameter.default = str(constant.value)
