"""What docs/report.md says runs."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "report.md"
sys.path.insert(0, str(ROOT / "examples"))
import planted  # noqa: E402


@pytest.mark.filterwarnings("ignore:policy .* is slow here")
def test_the_snippets_print_what_they_say(tmp_path, monkeypatch):
    """In their order, in one process."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        said = re.findall(r"^print\(.*\)  # (.*)$", snippet, flags=re.MULTILINE)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(snippet, "docs/report.md", "exec"), names)
        assert out.getvalue().splitlines() == said


def test_the_example_draws_the_pictures_of_the_page(tmp_path, monkeypatch, capsys):
    """And its log says what was planted: the head overflows, the embedding is lost."""
    monkeypatch.setattr(sys, "argv", ["planted.py", "--run-dir", str(tmp_path)])
    planted.main()
    assert "tfmixed report" in capsys.readouterr().out
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == set(re.findall(r"\]\((\w+\.png)\)", PAGE.read_text(encoding="utf-8")))
    assert all((ROOT / "docs" / name).exists() for name in drawn)
    from tfmixed.report import read, words

    run = read(tmp_path)
    assert set(run.guilty) == {"head/kernel"}
    assert any(
        "`embedding` needs 2^" in sentence and "put `head` in float32" in sentence for sentence in words.advice(run)
    )
