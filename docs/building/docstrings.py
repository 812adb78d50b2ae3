"""A griffe extension for the docstrings and signatures of this package."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

from griffe import Attribute, Extension, Function, Object

EXAMPLE = re.compile(r"^Example:\n+(>>> .*?)(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


class KerasStyle(Extension):
    """Turns the unindented `Example:` of Keras into a section, and shows constants in signatures as numbers."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = EXAMPLE.sub(lambda found: "Examples:\n" + indent(found[1], "    "), text)

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Replaces defaults that are module constants with their values."""
        for parameter in func.parameters:
            constant = func.module.members.get(str(parameter.default))
            if isinstance(constant, Attribute):
                parameter.default = str(constant.value)
