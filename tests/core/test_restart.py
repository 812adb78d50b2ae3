from __future__ import annotations

import kill_and_resume
import pytest


# The keeper of the state is listed before the logger where the seed is even, after it where it is odd.
@pytest.mark.parametrize(("how", "seed"), [("checkpoint", 0), ("backup", 1)])
def test_a_killed_process_goes_on_as_if_nothing_had_happened(tmp_path, how, seed):
    """SIGKILL at a random moment: the same states after each epoch, and a log without hole, double or torn line."""
    report = kill_and_resume.compare(how, kills=1, seed=seed, folder=tmp_path)
    assert report.lines > report.epochs
