"""Runs the code blocks of README.md or a page of docs/ in order, in the current directory.

    ```python                  Runs. All blocks of a page share one namespace.
    ```python title="mine.py"  Is written to that file, as is a block of any other language with a title.
    ```bash                    One command per line. `tfmixed` and `python -m` run here; ELSEWHERE lists the others.
    ```text                    Directly after one of these: its expected output. Otherwise not checked.

`print(...)  # text` must print that text, and a command that ends in `# exits with 1` must exit with 1. All expected
lines must be printed, in order; other lines may be printed between them.

    python tests/helpers/pages.py docs/tf1.md   # in this process, in the current directory
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "text", "toml"}
COMMANDS = {"bash", ""}

# Commands that are not run as part of a page, and what runs them instead.
ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "pip install '.[tensorflow,plot]'": "the Makefile installs the package with more extras than these",
    "tfmixed bench mlp --rounds 3 --seconds 1": "tests/cli/test_bench.py, with shorter runs",
    "tfmixed bench --model mine:train --policy mixed_bfloat16 --plot times.png": "tests/cli/test_bench.py",
    "export TF_CONFIG='{"
    '"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'
    "'": "tests/core/test_multi_worker.py sets it for local processes",
}

# Code that a page assumes, by page and by the start of the block that it is run before.
BEFORE = {
    "distributed.md": {
        "import keras": """
import os
job = {"PROCID": "0", "STEP_NUM_TASKS": "1", "STEP_NODELIST": "localhost", "STEP_TASKS_PER_NODE": "1"}
os.environ |= {f"SLURM_{name}": value for name, value in job.items()}
"""
    },
    "tf1.md": {
        "report = tfmixed.compat.v1.conversion_report(session": """
import numpy as np
graph = tf.Graph().as_default()
graph.__enter__()
inputs, weight = tf.placeholder(tf.float32, [None, 8]), tf.get_variable("weight", [8, 1])
train_op, feed_dict = opt.minimize(tf.reduce_mean(tf.matmul(inputs, weight) ** 2)), {inputs: np.ones((4, 8))}
session = tf.Session()
session.run(tf.global_variables_initializer())
plain = [variable for variable in tf.global_variables() if not variable.name.startswith("tfmixed")]
tf.train.Saver(plain).save(session, "run/model.ckpt", global_step=1000)
"""
    },
}


class Block(NamedTuple):
    """Fenced code block.

    Args:
        language: The first word of the info string.
        title: The file that the block is written to, or `None`.
        code: The content.
        line: The line number of the opening fence, from 1.
        follows: `True` if only blank lines separate it from the previous block.
    """

    language: str
    title: str | None
    code: str
    line: int
    follows: bool


def blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a page. Indented code is an error."""
    found, end = [], None
    for token in MarkdownIt().parse(text):
        assert token.type != "code_block", f"line {token.map[0] + 1}: indented code has no language, use a fence"
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="(.*?)"', rest)
            between = text.splitlines()[end : token.map[0]] if end is not None else ["start of page"]
            follows = not "".join(between).strip()
            found.append(Block(language, title and title[1], token.content, token.map[0] + 1, follows))
            end = token.map[1]
    return found


def sections(page: Path) -> dict[str, list[str]]:
    """Returns the Python blocks of each third-level section of a page, by the anchor of its title."""
    headings = re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-"): re.findall(r"```python\n(.*?)```", body, re.DOTALL)
        for title, body in headings
    }


@contextlib.contextmanager
def _importing_from_here():
    """Makes modules of the current directory importable, and forgets them afterwards."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(here):
                del sys.modules[name]


@_importing_from_here()
def run(page: Path, without: Collection[str] = ()) -> None:
    """Runs the blocks of a page, except those with code in `without`. Raises if the output differs from the page."""
    names, printed = {"__name__": "__main__"}, ""
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        if block.code in without:
            continue
        for start, code in BEFORE.get(page.name, {}).items():
            if block.code.startswith(start):
                exec(code, names)
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            printed = _output(lambda code=block.code, where=where: exec(compile(code, where, "exec"), names))
            _check(re.findall(r"^ *print\(.*\)  # (.*)$", block.code, flags=re.MULTILINE), printed, where)
        elif block.language in COMMANDS:
            printed = "".join(_command(line, where) for line in commands(block.code))
        elif block.language == "text" and block.follows:
            _check(block.code.splitlines(), printed, where)


def commands(code: str) -> list[str]:
    """Returns the commands of a block, without blank lines and comments."""
    return [line for line in code.splitlines() if line.strip() and not line.startswith("#")]


def is_run_here(command: str) -> bool:
    """Returns `True` unless `ELSEWHERE` lists the command."""
    return shlex.split(command, comments=True) not in [shlex.split(listed) for listed in ELSEWHERE]


def _command(line: str, where: str) -> str:
    words = shlex.split(line, comments=True)
    if not is_run_here(line):
        return ""
    assert words[0] == "tfmixed" or words[:2] == ["python", "-m"], f"{where}: nothing runs {line!r}"
    module, arguments = ("tfmixed", words[1:]) if words[0] == "tfmixed" else (words[2], words[3:])
    expected = re.search(r"# exits with (\d+)", line)
    before, sys.argv = sys.argv, [words[0], *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    assert code == int(expected[1] if expected else 0), f"{where}: {line!r} exits with {code}: {out.getvalue()}"
    return out.getvalue()


def _output(function) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function()
    return out.getvalue()


def _check(expected: list[str], printed: str, where: str) -> None:
    """Finds the expected lines in the printed ones, in order."""
    lines = [line.rstrip() for line in printed.splitlines()]
    for line in (line.rstrip() for line in expected if line.strip()):
        assert line in lines, f"{where}: expected {line!r}, printed\n{printed}"
        lines = lines[lines.index(line) + 1 :]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
