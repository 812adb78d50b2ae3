"""The example of docs/report.md. `test_docs.py` runs the code blocks of the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "report.md"
sys.path.insert(0, str(ROOT / "examples"))
import ranges  # noqa: E402

from tfmixed.report import read  # noqa: E402


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:policy .* is slow here")
def test_the_example_chooses_a_scale_and_reports_a_run(tmp_path, monkeypatch, capsys):
    """The suggested scale works, one that is 2^6 times larger does not, and the figures are those of the page."""
    monkeypatch.setattr(sys, "argv", ["ranges.py", "--epochs", "32", "--run-dir", str(tmp_path)])
    ranges.main()
    output = capsys.readouterr().out
    assert re.search(r"One epoch with the constant scale 2\^\d+: 0 of 3 steps overflow", output)
    assert re.search(r"One epoch with the constant scale 2\^\d+: 3 of 3 steps overflow", output)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == set(re.findall(r"\]\((\w+\.png)\)", PAGE.read_text(encoding="utf-8")))
    assert all((ROOT / "docs" / name).exists() for name in drawn)
    run = read(tmp_path)
    assert run.skipped > 0
    assert run.overflow_counts.keys() == {change.variable for change in run.history.overflows()}
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
