from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_the_snippet_of_the_islands_page_runs(tmp_path):
    """And finds the sum that it plants."""
    page = README.parent / "docs" / "islands.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    run = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert b"12,544 terms" in run.stdout
