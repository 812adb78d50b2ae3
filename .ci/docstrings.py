"""Checks the first words of docstrings: noun phrases or third-person verbs, not question words."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

QUESTION_WORDS = {"What", "Whether", "Which", "How", "Where", "Who"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def findings(path: Path) -> Iterator[str]:
    """Yields a message for each docstring of a file that starts with a question word."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if docstring and docstring.split()[0] in QUESTION_WORDS:
            yield f"{path}:{node.body[0].lineno}: docstring starts with {docstring.split()[0]!r}"


if __name__ == "__main__":
    paths = [path for folder in sys.argv[1:] for path in sorted(Path(folder).rglob("*.py"))]
    messages = [message for path in paths for message in findings(path)]
    print(*messages, sep="\n", end="\n" * bool(messages))
    sys.exit(bool(messages))
