from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfmixed import records

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits
import underflow

SMALL = {"steps": 90, "widths": (20, 12, 20)}


@pytest.fixture(scope="module")
def float32():
    return underflow.train("float32", None, **SMALL)


def test_float16_without_scaling_underflows_and_does_not_learn(float32):
    """A third of the gradient entries are 0, and the model stays at the mean image where float32 learns."""
    plain = underflow.train("mixed_float16", None, **SMALL)
    mean_image = underflow.load_data().var(axis=0).mean()
    assert plain.zeros_last > 5 * float32.zeros_last
    assert plain.after == pytest.approx(mean_image, rel=0.01)
    assert float32.after < 0.8 * mean_image


def test_float16_with_scaling_matches_float32(float32):
    """With a dynamic scale no more entries are 0 than in float32, and the loss is the same."""
    scaled = underflow.train("mixed_float16", "dynamic", **SMALL)
    assert scaled.zeros_last == pytest.approx(float32.zeros_last, abs=0.01)
    assert scaled.after == pytest.approx(float32.after, rel=0.01)


@pytest.mark.filterwarnings("ignore:policy .* is slow here")
def test_digits_demo_trains_logs_and_draws(tmp_path, monkeypatch, capsys):
    """One epoch of the demo: three rows in the table, a log for each scaled run, and the picture."""
    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs", "1", "--run-dir", str(tmp_path)])
    digits.main()
    out = capsys.readouterr().out
    for word in ("float32", "DynamicScale", "ConstantScale", "loss_scale: ", "float16 is slow on a CPU"):
        assert word in out
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert written == ["float16_constant/loss_scale.jsonl", "float16_dynamic/loss_scale.jsonl", "loss_scale.png"]


def multi_worker(folder, *arguments):
    """Returns what `examples/multi_worker.py` prints, and the weights of each worker at the end."""
    script = Path(__file__).parent.parent / "examples" / "multi_worker.py"
    command = [sys.executable, str(script), "--run-dir", str(folder), "--epochs", "4", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    return output, re.findall(r"^worker \d: weights (\w+), .* 4 of 148 steps skipped$", output, flags=re.MULTILINE)


def test_workers_skip_together_and_a_killed_one_is_started_again(tmp_path):
    """With `fit`: the survivor of a SIGKILL ends too, and after the restart all is as without it."""
    output, weights = multi_worker(tmp_path / "whole")
    again, weights_after_kill = multi_worker(tmp_path / "killed", "--kill")
    assert "attempt 1: exit codes [0, 0]" in output
    assert re.search(r"attempt 1: exit codes \[1, -9\]", again)
    assert "attempt 2: exit codes [0, 0]" in again
    assert len(weights) == len(weights_after_kill) == 2
    assert len({*weights, *weights_after_kill}) == 1
    logs = [records.read_changes(tmp_path / run / "loss_scale.jsonl") for run in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_workers_skip_together_in_a_loop(tmp_path):
    """With `strategy.run`, on three workers."""
    _, weights = multi_worker(tmp_path, "--loop", "--workers", "3")
    assert len(weights) == 3
    assert len(set(weights)) == 1


def test_the_script_of_tensorflow_1_says_what_was_converted():
    """Before and after, in a process of its own: the rewrite is a switch of the whole process."""
    script = Path(__file__).parent.parent / "examples" / "tf1_graph_rewrite.py"
    command = [sys.executable, str(script), "--width", "32", "--steps", "5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"nodes in half precision; casts added: \d+ to it, \d+ back", run.stdout)
    assert re.search(r"^after: +loss \d\.\d+, .* times as fast$", run.stdout, flags=re.MULTILINE)
    assert len(script.read_text().splitlines()) < 80
