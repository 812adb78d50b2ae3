from __future__ import annotations

import dataclasses

import pytest

from tfmixed import records, runlog
from tfmixed.records import EventsLost, RangesRecord, ScaleChange

HALVED = [ScaleChange(step, 2.0**-step, 2.0 ** -(step + 1), "overflow", "a", 0) for step in range(6)]
TOLD = [dataclasses.replace(change, epoch=None) for change in HALVED]  # as the optimizer tells them: it knows no epoch
MEASURED = [RangesRecord(step, None, "float32", 1.0, 1, "net", []) for step in (None, 3, 4)]


@pytest.fixture
def path(tmp_path):
    """A log of five changes and three measurements, one of which belongs to no step."""
    runlog.append(tmp_path / "log.jsonl", [*HALVED[:5], *MEASURED])
    return tmp_path / "log.jsonl"


@pytest.mark.parametrize(
    ("kinds", "left"),
    [((ScaleChange,), [*HALVED[:3], *MEASURED]), ((RangesRecord,), [*HALVED[:5], MEASURED[0]])],
    ids=["changes", "ranges"],
)
def test_what_a_restored_run_does_again_goes(path, kinds, left):
    """The line of the very step that comes next too; those of other kinds, earlier ones and those of no step stay."""
    assert runlog.continue_at(path, 3, kinds) == []
    assert records.read_log(path) == left


def test_what_log_and_run_agree_on_stays_with_its_epoch(path):
    """Only what the log does not hold is returned, for whoever appends it."""
    assert runlog.continue_at(path, 6, (ScaleChange,), TOLD[2:]) == TOLD[5:]
    assert records.read_changes(path) == HALVED[:5]


def test_what_log_and_run_disagree_on_is_the_runs(path):
    """From there on, and nothing before it."""
    changes = [TOLD[2], EventsLost(2, 5), TOLD[5]]
    assert runlog.continue_at(path, 6, (ScaleChange,), changes) == changes[1:]
    assert records.read_changes(path) == HALVED[:3]


def test_a_file_that_is_not_there_is_an_empty_log(tmp_path):
    """It is made with its folder."""
    assert runlog.continue_at(tmp_path / "new" / "log.jsonl", 6, (ScaleChange,), TOLD) == TOLD
    assert records.read_log(tmp_path / "new" / "log.jsonl") == []
