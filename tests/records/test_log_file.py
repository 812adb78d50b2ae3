from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tfmixed import records
from tfmixed.callbacks import run_log
from tfmixed.records import EventsLost, RangesRecord, ScaleChange, log_file

HALVED = [ScaleChange(step, 2.0**-step, 2.0 ** -(step + 1), "overflow", "a", 0) for step in range(6)]
COLLECTED = [dataclasses.replace(change, epoch=None) for change in HALVED]  # from the optimizer, which has no epochs
MEASURED = [RangesRecord(step, None, "float32", 1.0, 1, "net", []) for step in (None, 3, 4)]


@pytest.fixture
def path(tmp_path):
    """A log of five changes and three measurements, one of which belongs to no step."""
    log_file.append(tmp_path / "log.jsonl", [*HALVED[:5], *MEASURED])
    return tmp_path / "log.jsonl"


@pytest.mark.parametrize(
    ("kinds", "left"),
    [((ScaleChange,), [*HALVED[:3], *MEASURED]), ((RangesRecord,), [*HALVED[:5], MEASURED[0]])],
    ids=["changes", "ranges"],
)
def test_repeated_lines_are_removed(path, kinds, left):
    """Lines of the next step and later are removed. Other kinds, earlier steps and lines without a step stay."""
    assert log_file.continue_at(path, 3, kinds) == []
    assert records.read_log(path) == left


def test_lines_that_agree_with_the_run_stay(path):
    """They keep their epoch. Only changes that the log does not hold are returned."""
    assert log_file.continue_at(path, 6, (ScaleChange,), COLLECTED[2:]) == COLLECTED[5:]
    assert records.read_changes(path) == HALVED[:5]


def test_lines_that_disagree_with_the_run_are_removed(path):
    """The changes of the run replace the log from there on."""
    changes = [COLLECTED[2], EventsLost(2, 5), COLLECTED[5]]
    assert log_file.continue_at(path, 6, (ScaleChange,), changes) == changes[1:]
    assert records.read_changes(path) == HALVED[:3]


def test_a_missing_file_is_created(tmp_path):
    """With its folder."""
    assert log_file.continue_at(tmp_path / "new" / "log.jsonl", 6, (ScaleChange,), COLLECTED) == COLLECTED
    assert records.read_log(tmp_path / "new" / "log.jsonl") == []


@pytest.mark.parametrize("content", ["precious notes", "notes\n", '{"a": 1}', "\x7fELF"])
def test_a_file_that_is_not_a_log_stays(tmp_path, content):
    """Also if its only line is incomplete, as in the log of a killed run."""
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="log"):
        run_log.begin(path, 0, (ScaleChange,))
    assert path.read_text() == content


def test_lines_that_stay_are_not_rewritten(path):
    """Fields of a later version stay in the file."""
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace("}", ', "device": "GPU:0"}')
    path.write_text("".join(f"{line}\n" for line in lines) + '{"event": "sca')
    log_file.continue_at(path, 4, (ScaleChange, RangesRecord))
    assert path.read_text().splitlines() == [*lines[:4], *lines[5:7]]


def test_events_of_a_later_version_stay(path):
    """Also where lines around them are removed. A last line without a line feed gets one."""
    news = '{"event": "news", "step": 4}'
    path.write_text(f"{path.read_text()}{news}\n{records.to_line(HALVED[5])}")
    log_file.continue_at(path, 6, (ScaleChange, RangesRecord))
    assert path.read_text().splitlines()[-2:] == [news, records.to_line(HALVED[5])]
    assert path.read_text().endswith("\n")
    log_file.continue_at(path, 3, (ScaleChange, RangesRecord))
    assert path.read_text().splitlines()[-1] == news


def test_a_run_of_unknown_state_deletes_nothing(path):
    """It continues a log without later steps, and replaces any log from step 0."""
    content = path.read_bytes()
    with pytest.warns(UserWarning, match="later steps"):
        own, _ = run_log.begin(path, 3, (RangesRecord,))
    assert (own.name, path.read_bytes()) == ("log-2.jsonl", content)
    assert run_log.begin(path, 5, (RangesRecord,)) == (path, [])
    assert path.read_bytes() == content
    assert run_log.begin(path, 0, (RangesRecord,)) == (path, [])
    assert records.read_log(path) == [*HALVED[:5], MEASURED[0]]
    for log in (own, path):
        log_file.release(log)


def test_a_log_of_a_newer_format_is_not_touched(path):
    """The error names the format."""
    path.write_text(old := path.read_text() + '{"event": "run", "format": 2}\n')
    with pytest.raises(ValueError, match="format=2"):
        log_file.continue_at(path, 3, (ScaleChange,))
    assert path.read_text() == old


def test_a_log_behind_a_link_keeps_link_and_mode(path):
    """Also when lines are removed."""
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path.name)
    log_file.claim(link)
    log_file.continue_at(link, 3, (ScaleChange,))
    log_file.append(link, [HALVED[5]])
    log_file.release(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert records.read_changes(path) == [*HALVED[:3], HALVED[5]]


def test_a_log_can_be_a_pipe(tmp_path):
    """It is not read, and stays open from the start of the run to its end."""
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert run_log.begin(pipe, 0, (ScaleChange,), COLLECTED[:1]) == (pipe, COLLECTED[:1])
    for change in HALVED[:2]:
        log_file.append(pipe, [change])
    log_file.release(pipe)
    reader.join(timeout=60)
    assert [records.from_line(line) for line in received[0].splitlines()] == HALVED[:2]


def test_a_locked_log_is_not_touched(path):
    """The later training gets a new file with a number, and a warning."""
    content = path.read_bytes()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="being written"):
            own = log_file.claim(path)
        log_file.append(own, HALVED[:1])
    assert (own.name, path.read_bytes()) == ("log-2.jsonl", content)
    assert log_file.claim(path) == path
    for log in (path, own):
        log_file.release(log)


WRITER = """
    import os, sys, time
    from pathlib import Path
    from tfmixed.records import Progress, log_file
    path = log_file.claim(Path(sys.argv[1]))
    log_file.continue_at(path, 1, (Progress,))
    log_file.append(path, [Progress(7, 0, 1.0, 0)])
    if os.fork() == 0:
        print("ready", flush=True)  # the worker's copy of the lock is closed by now
        time.sleep(60)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(path):
    """Runs a training that writes the log, with a forked worker process. Kills both at the end."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_log_of_another_process_is_not_touched(tmp_path):
    """The later training gets a new file with a number. After a killed training the path is free."""
    path = tmp_path / "log.jsonl"
    (tmp_path / "log-2.jsonl").write_text("of an earlier run")
    with another_process(path) as process:
        with pytest.warns(UserWarning, match="being written"):
            own = log_file.claim(path)
        assert own == tmp_path / "log-3.jsonl"
        with pytest.warns(UserWarning, match="being written"):
            assert log_file.claim(path) == own  # a second callback of this training
        log_file.continue_at(own, 0, (ScaleChange,))
        log_file.append(own, HALVED[:1])
        process.kill()
        process.wait(timeout=60)
        assert log_file.claim(path) == path  # although its worker is alive
        log_file.release(path)
    log_file.release(own)
    assert [record.step for record in records.read_log(path)] == [7]
    assert records.read_log(own) == HALVED[:1]
    assert (tmp_path / "log-2.jsonl").read_text() == "of an earlier run"


def test_a_log_of_another_thread_is_not_touched(path):
    """An interrupted training in this thread, or in a thread that has ended, does not hold its log."""
    assert log_file.claim(path) == log_file.claim(path) == path
    taken = []

    def claim():
        taken.append(log_file.claim(path))

    thread = threading.Thread(target=claim)
    with pytest.warns(UserWarning, match="being written"):
        thread.start(), thread.join()
    assert taken == [path.with_name("log-2.jsonl")]
    assert log_file.claim(taken[0]) == taken[0]
    for log in (path, *taken):
        log_file.release(log)


class Scaler:
    """A scaler, compared by identity."""


def test_each_loop_of_a_thread_has_its_own_log(path):
    """Its callbacks share it, also one of `fit`. A loop whose scaler is deleted does not hold its log."""
    first, second = Scaler(), Scaler()
    assert [log_file.claim(path, first), log_file.claim(path), log_file.claim(path, first)] == [path] * 3
    with pytest.warns(UserWarning, match="being written"):
        own = log_file.claim(path, second)
    assert own == path.with_name("log-2.jsonl")
    del first
    assert log_file.claim(path, second) == path
    for log in (path, own):
        log_file.release(log)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_does_not_keep_other_logs_open(path, monkeypatch):
    """All logs are closed at the end of the process."""
    monkeypatch.setattr(log_file, "_open_logs", {})
    log_file.claim(Path("/dev/full"))
    with pytest.raises(OSError, match="No space"):
        log_file.append(Path("/dev/full"), HALVED[:1])
    log_file.claim(path)
    file = log_file._open_logs[str(path)].file
    log_file._release_all()
    assert file.closed


def test_a_removed_log_is_created_again(path):
    """Nothing is written to a deleted file."""
    log_file.claim(path)
    path.unlink()
    log_file.append(path, HALVED[:1])
    log_file.append(path, HALVED[1:2])
    log_file.release(path)
    assert records.read_changes(path) == HALVED[:2]
