from __future__ import annotations

import kill_and_resume
import pytest


@pytest.mark.parametrize("seed", [0, 1], ids=["backup_listed_first", "logger_listed_first"])
@pytest.mark.parametrize("how", ["checkpoint", "backup"])
def test_a_killed_process_goes_on_as_if_nothing_had_happened(tmp_path, how, seed):
    """SIGKILL at two random moments: the same states after each epoch, and a log without hole, double or torn line."""
    report = kill_and_resume.compare(how, kills=2, seed=seed, folder=tmp_path)
    assert report.lines > report.epochs
