from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_snippet_runs_as_pasted(tmp_path):
    """The Python of the README, in a fresh process and an empty folder."""
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    command = [sys.executable, "-c", snippet]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # Keras's progress bar needs it
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert b"steps skipped" in run.stdout
    assert (tmp_path / "loss_scale.jsonl").exists()


@pytest.mark.parametrize(("page", "says"), [("islands", b"12,544 terms"), ("ranges", b"no scale is needed")])
def test_the_snippets_of_a_page_run_one_after_another(page, says, tmp_path):
    """In a fresh process and an empty folder, and print what the page is about."""
    text = (README.parent / "docs" / f"{page}.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert says in run.stdout
