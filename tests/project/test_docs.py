"""README.md and docs/: code blocks run, every public name is in the reference, tables agree with the tests."""

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

import tfmixed
from tfmixed._cli import main

DOCS = pages.ROOT / "docs"
PORTING = DOCS / "porting.md"  # test_porting.py runs its right column
# Pages that run in a new process: as pasted by a user, or because they depend on settings of the process.
FRESH = {"README.md", "run.md", "tf1.md", "distributed.md", "fidelity.md", "islands.md"}
# Pages that do not train, or train in a second. The others run in CI.
QUICK = {"comparison.md", "how_it_works.md", "index.md", "policy.md", "speed.md"}
ON_FAULTS = {code for codes in pages.sections(DOCS / "nan.md").values() for code in codes}  # test_nan.py runs them


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.name in QUICK else pytest.mark.slow, id=page.stem)
        for page in pages.PAGES
        if page != PORTING
    ],
)
@pytest.mark.filterwarnings("ignore:policy .* is slow here", "ignore:policy .* keeps variables in")
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """In an empty folder. What the page says they print, they print."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    if page.name not in FRESH:
        keras.utils.clear_session()  # restarts the numbering of layer names
        pages.run(page, without=ON_FAULTS if page.name == "nan.md" else ())
        return
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # for Keras's progress bar
    command = [sys.executable, pages.__file__, str(page)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_every_block_has_a_language_that_is_run(page):
    """Only code of other projects, in the left column of docs/porting.md, may have another one."""
    blocks = pages.blocks(page.read_text(encoding="utf-8"))
    unknown = {block.language for block in blocks} - pages.LANGUAGES - pages.COMMANDS
    assert unknown <= ({"py"} if page == PORTING else set())
    for block in blocks:
        for command in pages.commands(block.code) if block.language in pages.COMMANDS else ():
            assert not pages.is_run_here(command) or command.startswith(("tfmixed ", "python -m ")), command


def test_exceptions_for_pages_are_used():
    """Each command in `ELSEWHERE` and each preparation in `BEFORE` is for code that is on a page."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    assert [command for command in pages.ELSEWHERE if f"\n{command}" not in text] == []
    for name, preparations in pages.BEFORE.items():
        page = (DOCS / name).read_text(encoding="utf-8")
        assert [start for start in preparations if f"```python\n{start}" not in page] == []


def test_wrong_pages_are_errors(tmp_path, monkeypatch):
    """Pages with wrong output, a wrong exit code, an unknown command or code without a language."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for text, message in [
        ("```python\nprint(1 + 1)  # 3\n```\n", "expected '3'"),
        ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n", "expected '3'"),
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


# Public names that only other modules of the package use.
INTERNAL = {
    "auditing": "specs is_traceable unsafe",
    "compat.keras2": "Policy global_policy",
    "compat.experimental": "global_policy",
    "ranges": "share_of_zeros span",
    "scaling": "RULES",
    "records": "to_line from_line short Change Kind Reason Record",
}


def public_names(module):
    """Yields the public names of a module and their values."""
    listed = getattr(module, "__all__", None)
    names = vars(module).items() if listed is None else [(name, getattr(module, name)) for name in listed]
    for name, value in names:
        is_own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        is_listed = listed is not None and not isinstance(value, types.ModuleType) and name != "__version__"
        if is_listed or (is_own and callable(value)):
            yield name, value


def resolve(path):
    """Returns the object of a dotted path."""
    parent, _, name = path.rpartition(".")
    return getattr(importlib.import_module(parent), name)


def test_every_public_name_is_in_the_reference():
    """Once, and all names in the reference exist."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("reference/*.md")))
    paths = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(paths) == len(set(paths))
    documented = [resolve(path) for path in paths]
    modules = [name for name in tfmixed.__all__ if isinstance(getattr(tfmixed, name), types.ModuleType)]
    for name in ["", *modules, "compat.keras2", "compat.experimental", "compat.v1", "auditing", "report"]:
        module = importlib.import_module(f"tfmixed.{name}".rstrip("."))
        members = re.findall(
            rf"^::: {re.escape(module.__name__)}\n.*?members: \[(.*?)\]", text, re.DOTALL | re.MULTILINE
        )
        known = {*INTERNAL.get(name, "").split(), *", ".join(members).split(", ")}
        missing = [
            public
            for public, value in public_names(module)
            if public not in known and not any(value is found for found in documented)
        ]
        assert missing == [], name


def test_every_command_is_on_a_page():
    """In a block that runs it."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    commands = [command.name or command.callback.__name__ for command in main.app.registered_commands]
    assert [name for name in commands if not re.search(rf"^tfmixed {name}\b", text, flags=re.MULTILINE)] == []


def test_the_maps_name_files_that_exist():
    """CONTRIBUTING.md, and the tree in docs/how_it_works.md."""
    contributing = (pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:\.ci|tfmixed|tests|docs|benchmarks)/[\w./]*)", contributing)
    how_it_works = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^tfmixed/\n(.*?)^```", how_it_works, flags=re.DOTALL | re.MULTILINE)
    paths += [f"tfmixed/{name}" for name in re.findall(r"\b\w+\.py\b|(?<=^  )\w+/", tree, flags=re.MULTILINE)]
    paths += [f"tfmixed/{name}" for name in re.findall(r"\b_core/\w+\.py", how_it_works)]
    assert len(paths) > 40
    site = Path(tfmixed.__file__).parents[1]  # the installed wheel is not in the checkout
    assert [path for path in paths if not ((site if path.startswith("tfmixed/") else pages.ROOT) / path).exists()] == []


CELL = re.compile(r"^- \*\*(.+?):\*\* (yes|no|part)\. (.+)$", flags=re.MULTILINE)


def named_tests(text):
    """Returns the tests that a text names: a file, or a file and a function."""
    return re.findall(r"`(tests/\w+/test_\w+\.py)(?:::(\w+))?`", text)


def test_the_comparison_names_tests_and_sources():
    """README.md and docs/comparison.md have the same table. Each cell of tfmixed names tests that exist."""
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
            code = (pages.ROOT / file).read_text(encoding="utf-8")
            assert not function or f"\ndef {function}(" in code, f"{title}: {file}::{function}"
