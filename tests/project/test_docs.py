"""README.md and docs/: every code block runs, every public name has its place, and tables say what is so."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import keras
import pages
import pytest
import test_nan

import tfmixed
from tfmixed._cli import main

DOCS = pages.ROOT / "docs"
PORTING = DOCS / "porting.md"  # test_porting.py runs its right column
# As a stranger pastes it; what is of the whole process: a switch of TensorFlow, a strategy of workers.
FRESH = {"README.md", "run.md", "tf1.md", "distributed.md"}
ON_FAULTS = {code for codes in test_nan.SECTIONS.values() for code in codes}  # test_nan.py runs them


@pytest.mark.parametrize("page", [each for each in pages.PAGES if each != PORTING], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:policy .* is slow here")
def test_the_blocks_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    """In an empty folder; what a page says they print they do print."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    if page.name not in FRESH:
        keras.utils.clear_session()  # names of layers begin anew
        pages.run(page, without=ON_FAULTS if page.name == "nan.md" else ())
        return
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # Keras's progress bar needs it
    command = [sys.executable, pages.__file__, str(page)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_no_block_is_left_out(page):
    """Each has a language that something runs; only what is ported from may be in another one."""
    found = pages.blocks(page.read_text(encoding="utf-8"))
    others = {block.language for block in found} - pages.LANGUAGES - pages.COMMANDS
    assert others <= ({"py"} if page == PORTING else set())
    for block in found:
        for command in pages.commands(block.code) if block.language in pages.COMMANDS else ():
            assert not pages.is_run_here(command) or command.startswith(("tfmixed ", "python -m ")), command


def test_what_runs_elsewhere_is_on_some_page():
    """Neither a command nor a preparation is kept for a page that has it no more."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    assert [each for each in pages.ELSEWHERE if f"\n{each}" not in text] == []
    begins = [(name, begin) for name, each in pages.BEFORE.items() for begin in each]
    assert [
        each for each in begins if f"```python\n{each[1]}" not in (DOCS / each[0]).read_text(encoding="utf-8")
    ] == []


def test_what_a_page_says_is_compared(tmp_path, monkeypatch):
    """A page that prints something else, fails a command or leaves its code without a language is found out."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for text, message in [
        ("```python\nprint(1 + 1)  # 3\n```\n", "it says '3'"),
        ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n", "it says '3'"),
        ("```bash\ntfmixed simulate --rule nonsense --trace T\n```\n", "exits with 2"),
        ("```bash\ntfmixed simulate --rule 1 --trace T  # exits with 1\n```\n", "exits with 0"),
        ("```bash\nls\n```\n", "nothing runs 'ls'"),
        ("A word.\n\n    print(1 + 1)\n", "use a fence"),
    ]:
        page.write_text(text)
        with pytest.raises(AssertionError, match=re.escape(message)):
            pages.run(page)
    page.write_text('```python title="a.py"\nb = 3\n```\n\n```python\nfrom a import b\n\nprint(b)  # 3\n```\n')
    pages.run(page)
    assert "a" not in sys.modules


FOR_OTHER_MODULES = {
    "auditing": "specs is_traceable unsafe",
    "compat": "keras2 v1",
    "compat.keras2": "Policy experimental global_policy",
    "compat.experimental": "global_policy",
    "distribute": "check_supported replicas replica is_chief works_with_others decide_together once current",
    "doctor": "warnings",
    "ranges": "share_of_zeros span",
    "scaling": "RULES",
    "records": "to_line from_line short Change Kind Reason Record",
}


def public(module):
    """Yields the names of a module that are for users, with what they stand for."""
    listed = getattr(module, "__all__", None)
    for name, each in vars(module).items() if listed is None else [(name, getattr(module, name)) for name in listed]:
        is_own = getattr(each, "__module__", None) == module.__name__ and not name.startswith("_")
        is_named = listed is not None and not isinstance(each, types.ModuleType) and name != "__version__"
        if is_named or (is_own and callable(each)):
            yield name, each


def resolved(path):
    """Returns what a dotted path stands for."""
    parent, _, name = path.rpartition(".")
    return getattr(importlib.import_module(parent), name)


def test_every_public_name_is_in_the_reference():
    """And what is listed there exists, once."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("reference/*.md")))
    listed = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    found = [resolved(path) for path in listed]
    modules = [name for name in tfmixed.__all__ if isinstance(getattr(tfmixed, name), types.ModuleType)]
    for name in ["", *modules, "compat.keras2", "compat.experimental", "compat.v1", "auditing", "report"]:
        module = importlib.import_module(f"tfmixed.{name}".rstrip("."))
        shown = re.findall(rf"^::: {re.escape(module.__name__)}\n.*?members: \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
        known = {*FOR_OTHER_MODULES.get(name, "").split(), *", ".join(shown).split(", ")}
        missing = [
            each for each, value in public(module) if each not in known and not any(value is one for one in found)
        ]
        assert missing == [], name


def test_every_command_is_on_a_page():
    """With a block that shows it."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    commands = [each.name or each.callback.__name__ for each in main.app.registered_commands]
    assert [each for each in commands if not re.search(rf"^tfmixed {each}\b", text, flags=re.MULTILINE)] == []


CELL = re.compile(r"^- \*\*(.+?):\*\* (yes|no|part)\. (.+)$", flags=re.MULTILINE)


def named_tests(text):
    """Returns the tests that a text names: a file, or a file and a function."""
    return re.findall(r"`tests/(test_\w+\.py)(?:::(\w+))?`", text)


def test_the_table_of_features_rests_on_tests_and_sources():
    """README and docs/comparison.md have one table; each of its words is explained, ours by tests that exist."""
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| \| tfmixed .*?(?=\n\n)", page, flags=re.DOTALL | re.MULTILINE)
    assert f"\n{table}\n" in pages.PAGES[0].read_text(encoding="utf-8")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", page, flags=re.DOTALL | re.MULTILINE))
    assert [row[0] for row in rows] == list(sections)
    for title, *words in rows:
        cells = CELL.findall(sections[title])
        assert [(name, word) for name, word, _ in cells] == list(zip(head[1:], words, strict=True)), title
        (_, ours, why), *others = cells
        assert ours == "no" or named_tests(why), title
        assert all("](https://" in why or named_tests(why) for *_, why in others), title
        for file, function in named_tests(sections[title]):
            code = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
            assert not function or f"\ndef {function}(" in code, f"{title}: {file}::{function}"
