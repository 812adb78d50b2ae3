"""What the examples print holds. Each runs here as its user runs it; `examples/ranges.py` in test_report_docs.py."""

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
pytestmark = pytest.mark.filterwarnings("ignore:policy .* is slow here")


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that runs an example with arguments and returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)  # as if it were the script of a process
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def rows(text, mark="│"):
    """Returns the rows of a table, by the text of their first cells, as lists of the numbers in the others."""
    cells = (
        [cell.strip() for cell in line.strip(f"{mark} ").split(mark)] for line in text.splitlines() if mark in line
    )
    return {first: [float(each) for each in re.findall(r"\d+\.?\d*", " ".join(others))] for first, *others in cells}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_less_than_80_lines(path):
    """So that it is read at one go."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_float16_underflows_without_a_scale_and_not_with_one(printed):
    """Unscaled, it stays at the loss of the mean image; scaled, it does what float32 does; so says the README."""
    text = printed("underflow")
    mean_image = float(re.search(r"mean image has a loss of (\d\.\d+)", text)[1])
    table = np.array(list(rows(text).values()))
    before, after, *zeros = table.T
    assert after[0] < 0.9 * mean_image
    assert before[0] > mean_image
    np.testing.assert_allclose(after, [after[0], mean_image, after[0], after[0]], rtol=0.01)
    assert min(zeros[0][1], zeros[1][1]) > 30
    assert np.delete(zeros, 1, axis=1).max() < 3
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = np.array(list(rows(readme.split("**Underflow.**")[1].split("\n\n**")[0], "|").values())[2:])
    np.testing.assert_allclose(told[:, :2], table[:, :2], rtol=0.01)
    np.testing.assert_allclose(told[:, 2], table[:, 3], atol=1)


def test_digits_are_learned_in_each_precision_logged_and_drawn(tmp_path, printed):
    """One epoch: accuracies that are alike, skipped steps where the scale starts too high, logs and the picture."""
    text = printed("digits", "--epochs", 1, "--run-dir", tmp_path)
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


def test_the_transformer_learns_more_than_pairs_of_characters(printed):
    """In float16, on text that it was not trained on, and it goes on with the text in its own letters."""
    text = printed("transformer", "--steps", 250)
    said = re.search(r"\nbits per character: characters (.*), pairs (.*), Transformer (.*)\n", text)
    characters, pairs, transformer = map(float, said.groups())
    assert 1 < transformer < pairs - 0.1 < characters - 0.5
    assert len(text[: said.start()]) == 32 + 80


def test_the_transformer_sees_nothing_of_what_it_is_to_tell(monkeypatch):
    """Other characters from a place on change what it expects from that place on, and nothing before."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import transformer

    text = np.stack([transformer.HELD_OUT[: transformer.CONTEXT]] * 2)
    text[1, 20:] = (text[0, 20:] + 1) % len(transformer.LETTERS)
    one, other = transformer.build().predict_on_batch(text)
    np.testing.assert_allclose(one[:20], other[:20], atol=1e-5)
    assert (np.abs(one[20:] - other[20:]).max(axis=-1) > 1e-3).all()


def test_loops_of_keras_give_the_losses_of_fit(printed):
    """Step by step, those of the first steps included, which overflow and change nothing."""
    losses = np.array([numbers for first, numbers in rows(printed("custom_loop")).items() if first.isdigit()])
    assert losses.shape == (12, 3)
    np.testing.assert_allclose(losses, losses[:, :1].repeat(3, axis=1), atol=1.5e-4)
    assert losses[0, 0] == losses[5, 0] > losses[6, 0] > losses[10, 0]


def test_loops_of_pytorch_clip_add_up_and_punish(printed):
    """Plain, as `fit`; clipped, slower; in parts, the same steps with fewer skipped; punished, from a higher loss."""
    table = rows(printed("grad_scaler"))
    fit, plain, clipped, parts, penalized = np.array([table[str(step)] for step in range(12)]).T
    np.testing.assert_allclose(plain, fit, atol=1.5e-4)
    assert fit[-1] < clipped[-1] < clipped[0]
    # The gradients of a part are smaller, so the scale is found sooner.
    taken = [list(dict.fromkeys(losses)) for losses in (fit, parts)]
    assert len(taken[1]) > len(taken[0])
    np.testing.assert_allclose(taken[0], taken[1][: len(taken[0])], atol=3e-4)
    assert max(fit[0], penalized[-1]) < penalized[0]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # one of its faults on purpose
def test_islands_in_float32_save_what_float16_breaks(printed):
    """The accuracies are those that docs/islands.md tells, and float16 takes no step."""
    pattern = r"^(float\S+(?: force_float32)?) +(\d+\.\d)% right, (\d+) steps applied"
    said = re.findall(pattern, printed("islands"), flags=re.MULTILINE)
    told = re.findall(pattern, (ROOT / "docs" / "islands.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(said) == len(told) == 3
    for (name, right, _), (same, expected, _) in zip(said, told, strict=True):
        assert name == same
        assert float(right) == pytest.approx(float(expected), abs=4)
    assert [int(steps) for _, _, steps in said] == pytest.approx([450, 0, 450], abs=10)


def multi_worker(folder, *arguments):
    """Returns what `examples/multi_worker.py` prints, and the weights of each worker at the end."""
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


def test_workers_skip_together_and_a_killed_one_is_started_again(tmp_path):
    """With `fit`: the survivor of a SIGKILL ends too, and all go on with the same weights."""
    output, weights = multi_worker(tmp_path, "--kill")
    assert re.search(r"attempt 1: exit codes \[1, -9\]", output)
    assert "attempt 2: exit codes [0, 0]" in output
    assert len(weights) == 2
    assert len(set(weights)) == 1
    steps = [change.step for change in records.read_changes(tmp_path / "loss_scale.jsonl")]
    assert steps == sorted(set(steps))


@thorough
def test_after_a_restart_all_is_as_without_it(tmp_path):
    """Weights and log."""
    (_, whole), (_, killed) = multi_worker(tmp_path / "whole"), multi_worker(tmp_path / "killed", "--kill")
    assert len({*whole, *killed}) == 1
    logs = [records.read_changes(tmp_path / run / "loss_scale.jsonl") for run in ("whole", "killed")]
    assert logs[0] == logs[1]


@thorough
def test_workers_skip_together_in_a_loop(tmp_path):
    """With `strategy.run`, on three workers."""
    _, weights = multi_worker(tmp_path, "--loop", "--workers", "3")
    assert len(weights) == 3
    assert len(set(weights)) == 1


def test_the_script_of_tensorflow_1_says_what_was_converted():
    """Before and after, in a process of its own: the rewrite is a switch of the whole process."""
    script = EXAMPLES / "tf1_graph_rewrite.py"
    command = [sys.executable, str(script), "--width", "32", "--steps", "5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"nodes in half precision; casts added: \d+ to it, \d+ back", run.stdout)
    assert re.search(r"^after: +loss \d\.\d+, .* times as fast$", run.stdout, flags=re.MULTILINE)
