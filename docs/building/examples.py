"""Reads the `Example:` of the docstrings here, which is not indented, as a Google-style section."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^Example:\n+(>>> .*?)(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


class IndentExamples(Extension):
    """Indents what follows `Example:`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = EXAMPLE.sub(lambda found: "Examples:\n" + indent(found[1], "    "), text)
