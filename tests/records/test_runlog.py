from __future__ import annotations

import contextlib
import dataclasses
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
from tfmixed.records import EventsLost, RangesRecord, ScaleChange, run_log

HALVED = [ScaleChange(step, 2.0**-step, 2.0 ** -(step + 1), "overflow", "a", 0) for step in range(6)]
TOLD = [dataclasses.replace(change, epoch=None) for change in HALVED]  # as the optimizer tells them: it knows no epoch
MEASURED = [RangesRecord(step, None, "float32", 1.0, 1, "net", []) for step in (None, 3, 4)]


@pytest.fixture
def path(tmp_path):
    """A log of five changes and three measurements, one of which belongs to no step."""
    run_log.append(tmp_path / "log.jsonl", [*HALVED[:5], *MEASURED])
    return tmp_path / "log.jsonl"


@pytest.mark.parametrize(
    ("kinds", "left"),
    [((ScaleChange,), [*HALVED[:3], *MEASURED]), ((RangesRecord,), [*HALVED[:5], MEASURED[0]])],
    ids=["changes", "ranges"],
)
def test_what_a_restored_run_does_again_goes(path, kinds, left):
    """The line of the very step that comes next too; those of other kinds, earlier ones and those of no step stay."""
    assert run_log.continue_at(path, 3, kinds) == []
    assert records.read_log(path) == left


def test_what_log_and_run_agree_on_stays_with_its_epoch(path):
    """Only what the log does not hold is returned, for whoever appends it."""
    assert run_log.continue_at(path, 6, (ScaleChange,), TOLD[2:]) == TOLD[5:]
    assert records.read_changes(path) == HALVED[:5]


def test_what_log_and_run_disagree_on_is_the_runs(path):
    """From there on, and nothing before it."""
    changes = [TOLD[2], EventsLost(2, 5), TOLD[5]]
    assert run_log.continue_at(path, 6, (ScaleChange,), changes) == changes[1:]
    assert records.read_changes(path) == HALVED[:3]


def test_a_file_that_is_not_there_is_an_empty_log(tmp_path):
    """It is made with its folder."""
    assert run_log.continue_at(tmp_path / "new" / "log.jsonl", 6, (ScaleChange,), TOLD) == TOLD
    assert records.read_log(tmp_path / "new" / "log.jsonl") == []


@pytest.mark.parametrize("content", ["precious notes", "notes\n", '{"a": 1}', "\x7fELF"])
def test_a_file_that_is_no_log_stays(tmp_path, content):
    """Also where it has one line without an end, as a log of a killed run may have."""
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a log"):
        run_log.begin(path, 0, (ScaleChange,))
    assert path.read_text() == content


def test_lines_that_stay_are_not_rewritten(path):
    """What a later version added to them stays in the file."""
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace("}", ', "device": "GPU:0"}')
    path.write_text("".join(f"{line}\n" for line in lines) + '{"event": "sca')
    run_log.continue_at(path, 4, (ScaleChange, RangesRecord))
    assert path.read_text().splitlines() == [*lines[:4], *lines[5:7]]


def test_events_of_a_later_version_stay(path):
    """Whatever goes around them; a last line that lacks its line feed gets one."""
    news = '{"event": "news", "step": 4}'
    path.write_text(f"{path.read_text()}{news}\n{records.to_line(HALVED[5])}")
    run_log.continue_at(path, 6, (ScaleChange, RangesRecord))
    assert path.read_text().splitlines()[-2:] == [news, records.to_line(HALVED[5])]
    assert path.read_text().endswith("\n")
    run_log.continue_at(path, 3, (ScaleChange, RangesRecord))
    assert path.read_text().splitlines()[-1] == news


def test_a_run_of_which_nothing_is_known_deletes_nothing(path):
    """It goes on where nothing is to be deleted, and replaces all when it begins."""
    content = path.read_bytes()
    with pytest.warns(UserWarning, match="nothing shows"):
        own, _ = run_log.begin(path, 3, (RangesRecord,))
    assert (own.name, path.read_bytes()) == ("log-2.jsonl", content)
    assert run_log.begin(path, 5, (RangesRecord,)) == (path, [])
    assert path.read_bytes() == content
    assert run_log.begin(path, 0, (RangesRecord,)) == (path, [])
    assert records.read_log(path) == [*HALVED[:5], MEASURED[0]]
    for each in (own, path):
        run_log.release(each)


def test_a_log_of_a_newer_format_is_not_touched(path):
    """The error names the format."""
    path.write_text(old := path.read_text() + '{"event": "run", "format": 2}\n')
    with pytest.raises(ValueError, match=r"must be a log.*format=2"):
        run_log.continue_at(path, 3, (ScaleChange,))
    assert path.read_text() == old


def test_a_log_behind_a_link_keeps_link_and_mode(path):
    """When lines of it go."""
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path.name)
    run_log.claim(link)
    run_log.continue_at(link, 3, (ScaleChange,))
    run_log.append(link, [HALVED[5]])
    run_log.release(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert records.read_changes(path) == [*HALVED[:3], HALVED[5]]


def test_a_log_can_be_a_pipe(tmp_path):
    """It is not read, and open from the begin of the run to its end."""
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_text()))
    reader.start()
    assert run_log.begin(pipe, 0, (ScaleChange,), TOLD[:1]) == (pipe, TOLD[:1])
    for change in HALVED[:2]:
        run_log.append(pipe, [change])
    run_log.release(pipe)
    reader.join(timeout=60)
    assert [records.from_line(line) for line in seen[0].splitlines()] == HALVED[:2]


WRITER = """
    import os, sys, time
    from pathlib import Path
    from tfmixed.records import run_log
    from tfmixed.records import Progress
    path = run_log.claim(Path(sys.argv[1]))
    run_log.continue_at(path, 1, (Progress,))
    run_log.append(path, [Progress(7, 0, 1.0, 0)])
    if os.fork() == 0:
        time.sleep(60)
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(path):
    """A training that has the log, and a worker process that it forked; killed at the end."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_log_that_another_process_writes_stays_its_own(tmp_path):
    """The later training gets a new file with a number, whatever files there are; a killed one leaves the path free."""
    path = tmp_path / "log.jsonl"
    (tmp_path / "log-2.jsonl").write_text("of an earlier run")
    with another_process(path) as process:
        with pytest.warns(UserWarning, match="being written by another training"):
            own = run_log.claim(path)
        assert own == tmp_path / "log-3.jsonl"
        with pytest.warns(UserWarning, match="being written"):
            assert run_log.claim(path) == own  # a second callback of this training
        run_log.continue_at(own, 0, (ScaleChange,))
        run_log.append(own, HALVED[:1])
        process.kill()
        process.wait(timeout=60)
        assert run_log.claim(path) == path  # though its worker lives
        run_log.release(path)
    run_log.release(own)
    assert [each.step for each in records.read_log(path)] == [7]
    assert records.read_log(own) == HALVED[:1]
    assert (tmp_path / "log-2.jsonl").read_text() == "of an earlier run"


def test_a_log_that_another_thread_writes_stays_its_own(path):
    """A training that was interrupted in this thread, or in one that has ended, keeps no log."""
    assert run_log.claim(path) == run_log.claim(path) == path
    taken = []

    def claim():
        taken.append(run_log.claim(path))

    thread = threading.Thread(target=claim)
    with pytest.warns(UserWarning, match="being written"):
        thread.start(), thread.join()
    assert taken == [path.with_name("log-2.jsonl")]
    assert run_log.claim(taken[0]) == taken[0]
    for each in (path, *taken):
        run_log.release(each)


class Scaler:
    """Stands for one, which is compared by identity."""


def test_each_loop_of_a_thread_has_its_own_log(path):
    """Its callbacks share it, and so does one of `fit`; a loop whose scaler is deleted has none."""
    first, second = Scaler(), Scaler()
    assert [run_log.claim(path, first), run_log.claim(path), run_log.claim(path, first)] == [path] * 3
    with pytest.warns(UserWarning, match="being written"):
        own = run_log.claim(path, second)
    assert own == path.with_name("log-2.jsonl")
    del first
    assert run_log.claim(path, second) == path
    for each in (path, own):
        run_log.release(each)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_logs_on_a_full_disk_do_not_keep_others_open(path, monkeypatch):
    """At the end of the process."""
    monkeypatch.setattr(run_log, "_open", {})
    run_log.claim(Path("/dev/full"))
    with pytest.raises(OSError, match="No space"):
        run_log.append(Path("/dev/full"), HALVED[:1])
    run_log.claim(path)
    file = run_log._open[str(path)].file
    run_log._release_all()
    assert file.closed


def test_a_log_that_was_removed_is_made_anew(path):
    """Nothing is written to a file that has no name any more."""
    run_log.claim(path)
    path.unlink()
    run_log.append(path, HALVED[:1])
    run_log.append(path, HALVED[1:2])
    run_log.release(path)
    assert records.read_changes(path) == HALVED[:2]
