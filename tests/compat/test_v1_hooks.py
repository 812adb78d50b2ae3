"""`LossScaleHook`: log and summaries of a session."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1

import tfmixed
from tfmixed import records
from tfmixed.callbacks import LossScaleLogger
from tfmixed.compat.v1 import LossScaleHook, LossScaleOptimizer
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import Progress, RunRecord, ScaleChange
from tfmixed.scaling import DynamicScale

RULE = DynamicScale(initial_scale=8.0, growth_interval=2, min_scale=2.0)


def run(trace, folder=None, checkpoints=None, rule=RULE, **arguments):
    """Trains in a monitored session, and returns the value of the scale tensor in each step."""
    with tf.Graph().as_default():
        given = V1.placeholder(tf.float32, [2])
        weight = V1.get_variable("w", initializer=tf.constant([1.0, 2.0]))
        limit = arguments.pop("max_consecutive_skips", 100)
        optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), rule, max_consecutive_skips=limit)
        train = optimizer.minimize(tf.reduce_sum(weight * given), V1.train.get_or_create_global_step())
        path = None if folder is None else Path(folder) / "loss_scale.jsonl"
        hook = LossScaleHook(optimizer, path, **arguments)
        with V1.train.MonitoredTrainingSession(
            checkpoint_dir=checkpoints and str(checkpoints), hooks=[hook], log_step_count_steps=None
        ) as session:
            feeds = [{given: [1.0, 1.0 if letter == "T" else np.inf]} for letter in trace]
            return [float(session.run([train, "tfmixed/loss_scale:0"], feed)[1]) for feed in feeds]


def log(folder):
    return records.read_log(folder / "loss_scale.jsonl")


CHANGES = [
    ScaleChange(1, 8.0, 16.0, "growth"),
    ScaleChange(2, 16.0, 8.0, "overflow", "w"),
    ScaleChange(3, 8.0, 4.0, "overflow", "w"),
]


@pytest.mark.parametrize("every", tf1.some(["100"], {"1": 1, "2": 2, "100": 100}))
def test_each_change_is_logged_with_its_step(tmp_path, capsys, every):
    """For any interval of the hook. Changes are printed as by the callback."""
    assert run("TTFFT", tmp_path, every=every) == [8.0, 8.0, 16.0, 8.0, 4.0]
    first, *changes, last = log(tmp_path)
    assert isinstance(first, RunRecord)
    assert (first.step, first.loss_scale, first.optimizer) == (0, 8.0, "AdamOptimizer")
    assert changes == CHANGES
    assert last == Progress(4, None, 4.0, 2, pytest.approx(2**0.5))
    assert capsys.readouterr().out.splitlines() == [str(change) for change in CHANGES]


def test_log_equals_that_of_the_callback(tmp_path):
    """`fit` and a session write the same records for the same steps."""
    trace = "TTFFT"
    run(trace, tmp_path / "hook", verbose=0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False, name="dense")])
    model.compile(tfmixed.LossScaleOptimizer("adam", RULE), loss=lambda y, outputs: y * outputs)
    x = np.array([[1.0, 1.0 if letter == "T" else np.inf] for letter in trace])
    logger = LossScaleLogger(tmp_path / "callback" / "loss_scale.jsonl", verbose=0)
    model.fit(x, np.ones((5, 1)), batch_size=1, shuffle=False, verbose=0, callbacks=[logger])
    lines = [
        [json.loads(line) for line in (tmp_path / name / "loss_scale.jsonl").read_text().splitlines()]
        for name in ("hook", "callback")
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert list(ours) == list(theirs)
        for odd in ("epoch", "variable", "started", "model", "gradient_norm", "optimizer"):
            ours.pop(odd, None), theirs.pop(odd, None)
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_each_of_two_hooks_logs_every_change(tmp_path):
    """The hooks collect at different intervals."""
    with tf.Graph().as_default():
        given = V1.placeholder(tf.float32, [2])
        weight = V1.get_variable("w", initializer=tf.constant([1.0, 2.0]))
        optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), RULE)
        train = optimizer.minimize(tf.reduce_sum(weight * given), V1.train.get_or_create_global_step())
        folders = [tmp_path / "often", tmp_path / "rarely"]
        hooks = [
            LossScaleHook(optimizer, folder / "loss_scale.jsonl", every=every, verbose=0)
            for folder, every in zip(folders, (1, 100), strict=True)
        ]
        with V1.train.MonitoredTrainingSession(hooks=hooks, log_step_count_steps=None) as session:
            for letter in "TTFFT":
                session.run(train, {given: [1.0, 1.0 if letter == "T" else np.inf]})
    for folder in folders:
        assert log(folder)[1:-1] == CHANGES


def test_resumed_run_continues_the_log(tmp_path, capsys):
    """From the step of the checkpoint."""
    for trace in ("TTF", "FT"):
        run(trace, tmp_path, checkpoints=tmp_path / "checkpoints", verbose=0)
    steps = [(record.event, record.step) for record in log(tmp_path)]
    changes = [("scale_change", step) for step in (1, 2, 3)]
    assert steps == [("run", 0), *changes[:2], ("progress", 2), ("run", 3), changes[2], ("progress", 4)]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_new_run_replaces_the_log(tmp_path):
    """It starts at step 0."""
    for _ in range(2):
        run("T", tmp_path, verbose=0)
        assert [record.event for record in log(tmp_path)] == ["run", "progress"]


def test_the_summaries_have_the_scale_at_the_step_of_each_change(tmp_path):
    """Each collection adds all three values."""
    run("TTFFT", summary_dir=tmp_path, every=5, verbose=0)
    (file,) = tmp_path.glob("events*")
    values = {
        (value.tag, event.step): value.simple_value
        for event in V1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    assert {step: scale for (tag, step), scale in values.items() if tag == "loss_scale"} == {1: 16, 2: 8, 3: 4, 5: 4}
    assert (values["skipped_steps", 5], values["gradient_norm", 5]) == (2, pytest.approx(2**0.5))


def test_exhausted_scale_stops_the_run(tmp_path):
    """The log is complete up to that step."""
    with pytest.raises(LossScaleExhausted, match=r"w \(4 times\)"):
        run("TFFFFFF", tmp_path, every=5, max_consecutive_skips=3, verbose=0)
    assert [record.step for record in log(tmp_path) if isinstance(record, ScaleChange)] == [1, 2]


def test_lost_changes_are_counted(tmp_path, monkeypatch):
    """The event buffer holds two changes."""
    monkeypatch.setattr("tfmixed.compat.v1.graph_state.EVENT_CAPACITY", 2)
    run("FFFF", tmp_path, rule=DynamicScale(initial_scale=2.0**10), verbose=0)
    lost, *changes = log(tmp_path)[1:-1]
    assert (lost.event, lost.count, lost.before_step) == ("events_lost", 2, 2)
    assert [change.step for change in changes] == [2, 3]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"verbose": -1}])
def test_arguments_out_of_range(arguments):
    """The error names the argument."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LossScaleHook(LossScaleOptimizer(V1.train.AdamOptimizer()), **arguments)


def test_optimizer_without_a_scale():
    """A plain optimizer is an error."""
    with pytest.raises(TypeError, match="optimizer"):
        LossScaleHook(V1.train.AdamOptimizer())


@pytest.mark.slow
def test_custom_hook_fetches_the_scale_by_name():
    """The tensor is `tfmixed/loss_scale:0`."""

    class Own(V1.train.SessionRunHook):
        def before_run(self, run_context):
            return V1.train.SessionRunArgs("tfmixed/loss_scale:0")

        def after_run(self, run_context, run_values):
            scales.append(run_values.results)

    scales = []
    with tf.Graph().as_default():
        weight = V1.get_variable("w", initializer=1.0)
        train = LossScaleOptimizer(V1.train.AdamOptimizer(), RULE).minimize(weight * np.inf)
        with V1.train.MonitoredTrainingSession(hooks=[Own()]) as session:
            for _ in range(3):
                session.run(train)
    assert scales == [8.0, 4.0, 2.0]
