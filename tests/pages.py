"""Runs the code blocks of a page of README.md or docs/, one after another, in the present folder.

    ```python                  runs, in names that belong to the page
    ```python title="mine.py"  is written to that file; so is any other language that has a title
    ```bash                    a command a line: `tfmixed` and `python -m` run here, ELSEWHERE says what runs the others
    ```text                    right after one of these: what that prints. Elsewhere: what it says beside it

A line `print(...)  # text` prints that text, and a command that ends in `# exits with 1` does. What a page says is
printed must be, line for line and in that order; more may be printed in between.

    python tests/pages.py docs/tf1.md   # in this process, in the present folder
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

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "text", "toml"}
COMMANDS = {"bash", ""}

# Commands that no page runs, and what runs them instead.
ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "pip install '.[tensorflow,plot]'": "the Makefile installs the package with more extras than these",
    "tfmixed bench mlp --rounds 3 --seconds 1": "tests/cli/test_bench.py, with shorter turns",
    "tfmixed bench --model mine:train --policy mixed_bfloat16 --plot times.png": "the same",
    "export TF_CONFIG='{"
    '"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'
    "'": "tests/core/test_multi_worker.py sets it for hosts that are there",
}

# What a page takes for granted: run before the block that begins with the key.
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
plain = [each for each in tf.global_variables() if not each.name.startswith("tfmixed")]
tf.train.Saver(plain).save(session, "run/model.ckpt", global_step=1000)
"""
    },
}


class Block(NamedTuple):
    """One fence.

    Args:
        language: The first word behind it.
        title: The file that it is written to, if any.
        code: What it holds.
        line: Its first line in the page, counted from 1.
        follows: Whether nothing stands between it and the block before.
    """

    language: str
    title: str | None
    code: str
    line: int
    follows: bool


def blocks(text: str) -> list[Block]:
    """Returns the fences of a page; code that is merely indented is an error."""
    found, end = [], None
    for token in MarkdownIt().parse(text):
        assert token.type != "code_block", f"line {token.map[0] + 1}: indented code tells no language: use a fence"
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="(.*?)"', rest)
            between = text.splitlines()[end : token.map[0]] if end is not None else ["a page's begin"]
            follows = not "".join(between).strip()
            found.append(Block(language, title and title[1], token.content, token.map[0] + 1, follows))
            end = token.map[1]
    return found


@contextlib.contextmanager
def _importing_from_here():
    """As in a session in this folder; what was imported from it is forgotten."""
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
    """Runs the blocks of a page but those whose code is `without`; raises where one does not do what the page says."""
    names, printed = {"__name__": "__main__"}, ""
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        if block.code in without:
            continue
        for begin, code in BEFORE.get(page.name, {}).items():
            if block.code.startswith(begin):
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
    """Returns the lines of a block of commands without what is no command."""
    return [line for line in code.splitlines() if line.strip() and not line.startswith("#")]


def is_run_here(command: str) -> bool:
    """Tells whether a command is run, and not another test's affair."""
    return shlex.split(command, comments=True) not in [shlex.split(each) for each in ELSEWHERE]


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


def _output(act) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        act()
    return out.getvalue()


def _check(said: list[str], printed: str, where: str) -> None:
    """Finds each line that is said in what was printed, in order."""
    lines = [line.rstrip() for line in printed.splitlines()]
    for line in (each.rstrip() for each in said if each.strip()):
        assert line in lines, f"{where}: it says {line!r}, and what is printed is\n{printed}"
        lines = lines[lines.index(line) + 1 :]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
