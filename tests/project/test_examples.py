"""Output of the examples. `examples/ranges.py` is tested in test_report_docs.py. Those that train are `slow`."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from thorough import thorough

from tfmixed import records

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:policy .* is slow here")


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns a function that runs an example with arguments and returns its output."""

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def rows(text, mark="│"):
    """Returns the rows of a table: a mapping from the first cell to the numbers in the others."""
    cells = (
        [cell.strip() for cell in line.strip(f"{mark} ").split(mark)] for line in text.splitlines() if mark in line
    )
    return {first: [float(number) for number in re.findall(r"\d+\.?\d*", " ".join(rest))] for first, *rest in cells}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    """Fewer than 80 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


@slow
def test_underflow(run):
    """Unscaled float16 predicts the mean image; scaled float16 follows float32. The README shows the same numbers."""
    text = run("underflow")
    mean_image = float(re.search(r"mean image has a loss of (\d\.\d+)", text)[1])
    table = np.array(list(rows(text).values()))
    before, after, *zeros = table.T
    assert after[0] < 0.9 * mean_image
    assert before[0] > mean_image
    np.testing.assert_allclose(after, [after[0], mean_image, after[0], after[0]], rtol=0.01)
    assert min(zeros[0][1], zeros[1][1]) > 30
    assert np.delete(zeros, 1, axis=1).max() < 3
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = np.array(list(rows(readme.split("**Underflow.**")[1].split("\n\n**")[0], "|").values())[2:])
    np.testing.assert_allclose(shown[:, :2], table[:, :2], rtol=0.01)
    np.testing.assert_allclose(shown[:, 2], table[:, 3], atol=1)


@pytest.mark.thorough
def test_digits(tmp_path, run):
    """One epoch: similar accuracies, skipped steps while the scale is too high, logs and the figure."""
    text = run("digits", "--epochs", 1, "--run-dir", tmp_path)
    table = rows(text)
    accuracies = [numbers[0] for numbers in (table["float32"], table["float16_dynamic"], table["float16_constant"])]
    assert min(accuracies) > 60
    assert accuracies[2] == pytest.approx(accuracies[0], abs=3)
    _, scale, skipped, _ = table["float16_dynamic"]
    assert scale == 2 ** (24 - skipped)
    assert skipped > 2
    assert table["float16_constant"][1:3] == [1024, 0]
    assert text.count("(overflow)") == skipped
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert written == ["float16_constant/loss_scale.jsonl", "float16_dynamic/loss_scale.jsonl", "loss_scale.png"]


@pytest.mark.thorough
def test_transformer(run):
    """In float16, on held-out text, it needs fewer bits than counting pairs of characters. It prints a sample."""
    text = run("transformer", "--steps", 250)
    numbers = re.search(r"\nbits per character: characters (.*), pairs (.*), Transformer (.*)\n", text)
    characters, pairs, transformer = map(float, numbers.groups())
    assert 1 < transformer < pairs - 0.1 < characters - 0.5
    assert len(text[: numbers.start()]) == 32 + 80


def test_transformer_is_causal(monkeypatch):
    """A change of the text changes predictions from that position on, and none before."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import transformer

    text = np.stack([transformer.HELD_OUT[: transformer.CONTEXT]] * 2)
    text[1, 20:] = (text[0, 20:] + 1) % len(transformer.LETTERS)
    original, changed = transformer.build().predict_on_batch(text)
    np.testing.assert_allclose(original[:20], changed[:20], atol=1e-5)
    assert (np.abs(original[20:] - changed[20:]).max(axis=-1) > 1e-3).all()


@slow
def test_custom_loops(run):
    """The losses equal those of `fit` in each step. The first steps overflow and change nothing."""
    losses = np.array([numbers for first, numbers in rows(run("custom_loop")).items() if first.isdigit()])
    assert losses.shape == (12, 3)
    np.testing.assert_allclose(losses, losses[:, :1].repeat(3, axis=1), atol=1.5e-4)
    assert losses[0, 0] == losses[5, 0] > losses[6, 0] > losses[10, 0]


@slow
def test_grad_scaler_loops(run):
    """Plain equals `fit`, clipped is slower, accumulated skips fewer steps, penalized starts from a higher loss."""
    table = rows(run("grad_scaler"))
    fit, plain, clipped, accumulated, penalized = np.array([table[str(step)] for step in range(12)]).T
    np.testing.assert_allclose(plain, fit, atol=1.5e-4)
    assert fit[-1] < clipped[-1] < clipped[0]
    # The gradients of a quarter are smaller, so fewer steps overflow.
    applied = [list(dict.fromkeys(losses)) for losses in (fit, accumulated)]
    assert len(applied[1]) > len(applied[0])
    np.testing.assert_allclose(applied[0], applied[1][: len(applied[0])], atol=3e-4)
    assert max(fit[0], penalized[-1]) < penalized[0]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # one of its faults
def test_islands(run):
    """The accuracies equal those in docs/islands.md, and unsafe float16 applies no step."""
    pattern = r"^(float\S+(?: force_float32)?) +(\d+\.\d)% \w+, (\d+) steps applied"
    printed = re.findall(pattern, run("islands"), flags=re.MULTILINE)
    shown = re.findall(pattern, (ROOT / "docs" / "islands.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(printed) == len(shown) == 3
    for (name, accuracy, _), (shown_name, shown_accuracy, _) in zip(printed, shown, strict=True):
        assert name == shown_name
        assert float(accuracy) == pytest.approx(float(shown_accuracy), abs=4)
    assert [int(steps) for _, _, steps in printed] == pytest.approx([450, 0, 450], abs=10)


@thorough
def test_low_memory(run):
    """Half the bytes and a loss near that of float32 weights. Keras's own update in bfloat16 does not train."""
    table = np.array(list(rows(run("low_memory")).values()))
    memory, loss = table.T
    np.testing.assert_allclose(memory, [16, 8, 8, 6], atol=0.3)
    assert loss[1] > 2
    np.testing.assert_allclose(loss[2:], loss[0], rtol=0.3)


def run_workers(folder, *arguments):
    """Returns the output of `examples/multi_worker.py` and the digest of each worker's weights."""
    script = EXAMPLES / "multi_worker.py"
    command = [sys.executable, str(script), "--run-dir", str(folder), "--epochs", "4", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=500)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    return output, re.findall(r"^worker \d: weights (\w+), .* 4 of 148 steps skipped$", output, flags=re.MULTILINE)


@slow
def test_workers_restart_after_one_is_killed(tmp_path):
    """With `fit`: the other worker stops too, and both continue with equal weights."""
    output, weights = run_workers(tmp_path, "--kill")
    assert re.search(r"attempt 1: exit codes \[1, -9\]", output)
    assert "attempt 2: exit codes [0, 0]" in output
    assert len(weights) == 2
    assert len(set(weights)) == 1
    steps = [change.step for change in records.read_changes(tmp_path / "loss_scale.jsonl")]
    assert steps == sorted(set(steps))


@thorough
def test_a_restart_changes_neither_weights_nor_log(tmp_path):
    """Compared with a run in which no worker is killed."""
    _, uninterrupted = run_workers(tmp_path / "uninterrupted")
    _, killed = run_workers(tmp_path / "killed", "--kill")
    assert len({*uninterrupted, *killed}) == 1
    logs = [records.read_changes(tmp_path / name / "loss_scale.jsonl") for name in ("uninterrupted", "killed")]
    assert logs[0] == logs[1]


@thorough
def test_workers_skip_together_in_a_custom_loop(tmp_path):
    """With `strategy.run`, on three workers."""
    _, weights = run_workers(tmp_path, "--loop", "--workers", "3")
    assert len(weights) == 3
    assert len(set(weights)) == 1


@pytest.mark.thorough
def test_tensorflow_1_script():
    """Prints the conversion report and the speed. In a new process, since the rewrite affects the whole process."""
    script = EXAMPLES / "tf1_graph_rewrite.py"
    command = [sys.executable, str(script), "--width", "32", "--steps", "5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"nodes in half precision; casts added: \d+ to it, \d+ back", run.stdout)
    assert re.search(r"^after: +loss \d\.\d+, .* times as fast$", run.stdout, flags=re.MULTILINE)
