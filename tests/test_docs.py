"""README.md and docs/: every code block runs, every public name has its place, and tables say what is so."""

from __future__ import annotations

import ast
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
from test_architecture import FLOORS, PACKAGE

import tfmixed
from tfmixed import cli

DOCS = pages.ROOT / "docs"
PORTING = DOCS / "porting.md"  # test_porting.py runs its right column
# As a stranger pastes it; what is of the whole process: a switch of TensorFlow, a strategy of workers.
FRESH = {"README.md", "tf1.md", "distributed.md"}
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
    assert [each for each in begins if f"```python\n{each[1]}" not in (DOCS / each[0]).read_text(encoding="utf-8")] == []


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


def public():
    """Yields each name that is for users, as (where, name)."""
    for name in tfmixed.__all__:
        found = getattr(tfmixed, name)
        if not isinstance(found, types.ModuleType):
            yield "tfmixed", name
            continue
        names = getattr(found, "__all__", None) or [
            name
            for name, each in vars(found).items()
            if not name.startswith("_") and getattr(each, "__module__", None) == found.__name__ and callable(each)
        ]
        yield from ((found.__name__, each) for each in names if (found.__name__, each) not in FOR_OTHER_MODULES)
    for name in ("compat.keras2", "compat.experimental", "compat.v1", "report"):
        module = importlib.import_module(f"tfmixed.{name}")
        yield from ((module.__name__, each) for each in module.__all__)


FOR_OTHER_MODULES = {
    (f"tfmixed.{module}", name)
    for module, names in {
        "auditing": "specs is_traceable unsafe",
        "compat": "keras2 v1",
        "distribute": "check_supported replicas replica is_chief works_with_others decide_together once current",
        "doctor": "warnings",
        "islands": "force_own_code",
        "ranges": "share_of_zeros span",
        "records": "to_line from_line short complete_lines",
    }.items()
    for name in names.split()
}


def test_every_public_name_is_in_the_reference():
    """Itself or its module, and what is listed there exists."""
    listed = [
        line for page in sorted(DOCS.glob("reference/*.md")) for line in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(listed) == len(set(listed))
    found, whole = [], set()
    for path in listed:
        parent, _, name = path.rpartition(".")
        each = importlib.import_module(path) if name[0].islower() and is_module(path) else None
        whole |= {path} if each else set()
        found.append(each or getattr(importlib.import_module(parent), name))
    missing = [
        f"{where}.{name}"
        for where, name in public()
        if name not in ("__version__", "experimental")
        and where not in whole & {"tfmixed.compat.keras2", "tfmixed.compat.experimental"}
        and not any(getattr(importlib.import_module(where), name) is each for each in found)
    ]
    assert missing == []


def is_module(path):
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def test_every_command_is_on_a_page():
    """With a block that shows it."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    commands = [each.name or each.callback.__name__ for each in cli.app.registered_commands]
    assert [each for each in commands if not re.search(rf"^tfmixed {each}\b", text, flags=re.MULTILINE)] == []


HOW = DOCS / "how_it_works.md"
MODULES = re.compile(r"(?<=<!-- modules -->\n\n).*?(?=\n\n<!-- end of modules -->)", re.DOTALL)


def table_of_modules():
    """Returns it as Markdown: the first lines of the docstrings, floor by floor."""
    rows = ["| floor | module | what it does |", "|---|---|---|"]
    for floor, modules in FLOORS.items():
        for name in sorted(modules):
            path = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
            line = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
            rows.append(f"| {floor} | `{name}` | {line} |")
    return "\n".join(rows)


def test_the_table_of_modules_is_that_of_the_docstrings():
    """`python tests/test_docs.py` writes it anew."""
    assert MODULES.search(HOW.read_text(encoding="utf-8"))[0] == table_of_modules()


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
            code = (Path(__file__).parent / file).read_text(encoding="utf-8")
            assert not function or f"\ndef {function}(" in code, f"{title}: {file}::{function}"


if __name__ == "__main__":
    HOW.write_text(MODULES.sub(lambda _: table_of_modules(), HOW.read_text(encoding="utf-8")), encoding="utf-8")
