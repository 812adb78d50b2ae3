from __future__ import annotations

import kill_and_resume
import pytest


# With even seeds the callback that saves the state comes before the logger, with odd ones after it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "seed"),
    [
        ("checkpoint", 0),
        ("backup", 1),
        pytest.param("low_precision_checkpoint", 1, marks=pytest.mark.thorough),
        pytest.param("low_precision_backup", 0, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_process_continues(tmp_path, how, seed):
    """SIGKILL at a random moment leaves the same states after each epoch, and no gap, duplicate or torn line."""
    report = kill_and_resume.compare(how, kills=1, seed=seed, folder=tmp_path)
    assert report.lines > report.epochs
