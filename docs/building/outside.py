"""Adds files outside docs/ to the site, so that the same link works in the repository and on the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("benchmarks", "configs", "examples")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of `FOLDERS` under their paths."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.*")):
            name = path.relative_to(ROOT).as_posix()
            if "__pycache__" not in name:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links from docs/page.md to ../folder/file for the site."""
    inside = rf"\]\(\.\./({'|'.join(FOLDERS)})/"
    return re.sub(inside, r"](\1/", markdown) if "/" not in page.file.src_uri else markdown
