from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfmixed import LossScaleOptimizer, records
from tfmixed.callbacks import LossScaleLogger
from tfmixed.scaling import ConstantScale, DynamicScale

RULE = DynamicScale(initial_scale=8.0, growth_interval=4)


def data(bad=(5,), batches=12):
    x = np.random.default_rng(0).normal(size=(batches * 8, 4)).astype("float32")
    for batch in bad:
        x[batch * 8] = np.inf
    return x, x.sum(axis=1, keepdims=True)


def fit(*callbacks, optimizer=None, bad=(5,), epochs=1, verbose=0, **compile_arguments):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="only")])
    model.compile(optimizer or LossScaleOptimizer("sgd", RULE), loss="mse", **compile_arguments)
    arguments = {"batch_size": 8, "shuffle": False, "verbose": verbose, "epochs": epochs}
    history = model.fit(*data(bad), callbacks=list(callbacks), **arguments)
    return model, history


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("modes", [{}, {"steps_per_execution": 5}, {"jit_compile": True}], ids=str)
def test_log_holds_every_change_with_its_exact_step_and_epoch(tmp_path, modes):
    """One JSON line a change, in the documented form, whatever runs the steps."""
    path = tmp_path / "run" / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0), epochs=2, **modes)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["epoch"], line["reason"]) for line in lines] == [
        (3, 0, "growth"),
        (5, 0, "overflow"),
        (9, 0, "growth"),
        (13, 1, "growth"),
        (17, 1, "overflow"),
        (21, 1, "growth"),
    ]
    assert lines[1] == {
        "event": "scale_change",
        "step": 5,
        "epoch": 0,
        "old_scale": 16.0,
        "new_scale": 8.0,
        "reason": "overflow",
        "variable": model.layers[0].kernel.path,
    }


def test_metrics_reach_history_csv_and_progress_bar(tmp_path, capsys):
    """loss_scale, skipped_steps and gradient_norm stand beside the other metrics."""
    csv = tmp_path / "log.csv"
    model, history = fit(LossScaleLogger(verbose=0), keras.callbacks.CSVLogger(csv), epochs=2, verbose=1)
    assert history.history["loss_scale"] == [16.0, 32.0]
    assert history.history["skipped_steps"] == [1.0, 2.0]
    assert history.history["gradient_norm"][-1] == float(model.optimizer.gradient_norm)
    assert csv.read_text().startswith("epoch,gradient_norm,loss,loss_scale,skipped_steps")
    assert "loss_scale: 32.0000" in capsys.readouterr().out


def test_console_has_one_row_a_change(capsys):
    """The rows come between the progress bars; verbose=0 prints none."""
    model, _ = fit(LossScaleLogger())
    assert capsys.readouterr().out.splitlines() == [
        "step 3: loss scale 2^3 -> 2^4 (growth)",
        f"step 5: loss scale 2^4 -> 2^3 (overflow)  {model.layers[0].kernel.path}",
        "step 9: loss scale 2^3 -> 2^4 (growth)",
    ]
    fit(LossScaleLogger(verbose=0))
    assert capsys.readouterr().out == ""


class CountReads(keras.callbacks.Callback):
    """Counts the values that reach the host during the batches of an epoch, by the calls of `numpy`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = 0
        tensor = type(tf.constant(0.0))
        original = tensor._numpy

        def counted(self_):
            self.reads += 1
            return original(self_)

        monkeypatch.setattr(tensor, "_numpy", counted)

    def on_epoch_begin(self, epoch, logs=None):
        self.reads = 0

    def on_epoch_end(self, epoch, logs=None):
        self.in_epoch, self.reads = self.reads, 0


@pytest.mark.parametrize(("every", "more"), [(None, False), (4, True)])
def test_it_reads_the_device_within_an_epoch_only_if_asked(monkeypatch, every, more):
    """Without `every` the batches cost exactly the reads that Keras makes by itself."""
    counter = CountReads(monkeypatch)
    fit(counter)
    bare = counter.in_epoch
    fit(counter, LossScaleLogger(every=every, verbose=0))
    assert bare > 0
    assert (counter.in_epoch > bare) is more


class Seen(keras.callbacks.Callback):
    """Notes the lines of a log after each batch."""

    def __init__(self, path):
        super().__init__()
        self.path, self.lines = path, []

    def on_train_batch_end(self, batch, logs=None):
        self.lines.append(len(self.path.read_text().splitlines()))


def test_every_writes_within_the_epoch(tmp_path):
    """`every=4` has the changes of steps 0 to 7 in the file after step 7."""
    path = tmp_path / "scale.jsonl"
    seen = Seen(path)
    fit(LossScaleLogger(path, every=4, verbose=0), seen)
    assert seen.lines == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_tensorboard_has_the_exact_steps(tmp_path):
    """The scalars are read back with TensorFlow's own event reader."""
    fit(LossScaleLogger(tensorboard=tmp_path, verbose=0))
    points = []
    for file in tmp_path.glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            points += [(value.tag, event.step, float(tf.make_ndarray(value.tensor))) for value in event.summary.value]
    assert [point for point in points if point[0] == "loss_scale"] == [
        ("loss_scale", 3, 16.0),
        ("loss_scale", 5, 8.0),
        ("loss_scale", 9, 16.0),
        ("loss_scale", 12, 16.0),
    ]
    assert ("skipped_steps", 12, 1.0) in points


@pytest.mark.parametrize("optimizer", ["sgd", keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())], ids=str)
def test_an_optimizer_that_does_not_scale_is_said_once_and_logs_nothing(tmp_path, optimizer):
    """The message says what to do; no file appears."""
    path = tmp_path / "scale.jsonl"
    with pytest.warns(UserWarning, match=r"logs nothing.*Wrap it") as caught:
        _, history = fit(LossScaleLogger(path), optimizer=optimizer, bad=(), epochs=3)
    assert len([warning for warning in caught if "logs nothing" in str(warning.message)]) == 1
    assert "loss_scale" not in history.history
    assert not path.exists()


def test_a_constant_scale_logs_skips_and_no_change(tmp_path):
    """No change, no line; the skip is in the metrics."""
    path = tmp_path / "scale.jsonl"
    _, history = fit(LossScaleLogger(path), optimizer=LossScaleOptimizer("sgd", ConstantScale(4.0)))
    assert path.read_text() == ""
    assert history.history["skipped_steps"] == [1.0]


def test_going_on_appends_and_starting_anew_replaces(tmp_path):
    """A second fit of the same optimizer goes on in the file; a new run starts it again."""
    path = tmp_path / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0))
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=[LossScaleLogger(path, verbose=0)])
    assert steps(path) == [3, 5, 9, 13, 17, 21]
    fit(LossScaleLogger(path, verbose=0))
    assert steps(path) == [3, 5, 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scale.jsonl"]


def test_a_torn_last_line_is_dropped_when_the_run_goes_on(tmp_path):
    """What a killed process left half-written does not stay in the middle of the file."""
    path = tmp_path / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0))
    with path.open("a") as file:
        file.write('{"event": "scale_ch')
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=[LossScaleLogger(path, verbose=0)])
    assert steps(path) == [3, 5, 9, 13, 17, 21]


def test_a_killed_process_keeps_its_log(tmp_path):
    """SIGKILL in the middle of an epoch leaves every line that was collected, whole."""
    path = tmp_path / "scale.jsonl"
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
        import keras
        from test_callbacks import fit
        from tfmixed.callbacks import LossScaleLogger

        class Kill(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

        fit(LossScaleLogger({str(path)!r}, every=1, verbose=0), Kill())
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL
    assert [record.step for record in records.read_log(path)] == [3, 5]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": True}, {"verbose": -1}], ids=str)
def test_bad_arguments_are_named(arguments):
    """Every refusal names the argument and the value."""
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be a whole number.*received {value}"):
        LossScaleLogger(**arguments)
