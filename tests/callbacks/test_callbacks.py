"""`LossScaleLogger`: the log file, the metrics, the console and TensorBoard, and when it stops or warns."""

from __future__ import annotations

import copy
import cProfile
import dataclasses
import functools
import json
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from backend import BACKEND, modes, needs_tensorflow, tf
from thorough import thorough

import tfmixed
from tfmixed import LossScaleOptimizer, records
from tfmixed.callbacks import LossScaleLogger
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import log_file
from tfmixed.scaling import ConstantScale, DynamicScale

slow = pytest.mark.slow
RULE = DynamicScale(initial_scale=8.0, growth_interval=4)


def data(bad=(5,), batches=12):
    x = np.random.default_rng(0).normal(size=(batches * 8, 4)).astype("float32")
    for batch in bad:
        x[batch * 8] = np.inf
    return x, x.sum(axis=1, keepdims=True)


def new_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="only")])


@functools.cache
def compiled(rule, optimizer_options, compile_options):
    """Returns a compiled model and its initial state; tests share its train function."""
    model = new_model()
    optimizer = LossScaleOptimizer("sgd", rule, **dict(optimizer_options))
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, loss="mse", **dict(compile_options))
    state = {}
    optimizer.save_own_variables(state)
    return model, model.get_weights(), state


def fresh_model(rule=RULE, compile_options=None, **optimizer_options):
    """Returns a compiled model in its initial state."""
    options = tuple(optimizer_options.items())
    model, weights, state = compiled(rule, options, tuple((compile_options or {}).items()))
    model.set_weights(weights)
    model.optimizer.load_own_variables(state)
    model._initial_epoch = None  # BackupAndRestore sets it
    return model


def train(model, *callbacks, bad=(5,), epochs=1, verbose=0):
    arguments = {"batch_size": 8, "shuffle": False, "verbose": verbose, "epochs": epochs}
    return model.fit(*data(bad), callbacks=list(callbacks), **arguments)


def fit(*callbacks, bad=(5,), epochs=1, verbose=0, **options):
    model = fresh_model(**options)
    return model, train(model, *callbacks, bad=bad, epochs=epochs, verbose=verbose)


def steps(path):
    return [change.step for change in records.read_changes(path)]


MODES = [
    pytest.param(mode, id=str(mode), marks=[slow][: bool(mode)])
    for mode in modes({}, {"steps_per_execution": 5}, {"jit_compile": True})
]


@pytest.mark.parametrize("mode", MODES)
def test_log_holds_every_change_with_its_exact_step_and_epoch(tmp_path, mode):
    """One JSON line for each change, in the documented form."""
    path = tmp_path / "run" / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0), epochs=2, compile_options=mode)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "scale_change"]
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
    """Shows loss_scale, skipped_steps and gradient_norm with the other metrics."""
    csv = tmp_path / "log.csv"
    model, history = fit(LossScaleLogger(verbose=0), keras.callbacks.CSVLogger(csv), epochs=2, verbose=1)
    assert history.history["loss_scale"] == [16.0, 32.0]
    assert history.history["skipped_steps"] == [1.0, 2.0]
    assert history.history["gradient_norm"][-1] == float(model.optimizer.gradient_norm)
    assert csv.read_text().startswith("epoch,gradient_norm,loss,loss_scale,skipped_steps")
    assert "loss_scale: 32.0000" in capsys.readouterr().out


def test_other_callbacks_can_use_the_values_of_a_batch(tmp_path):
    """The logs of each batch format like numbers, as ModelCheckpoint requires; on JAX they need `every`."""
    batches = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: batches.append(dict(logs)))
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "at_{loss_scale:.0f}.keras", save_freq=6)
    fit(LossScaleLogger(every=1 if BACKEND == "jax" else None, verbose=0), keep, checkpoint)
    assert [float(logs["loss_scale"]) for logs in batches] == [8.0] * 3 + [16.0] * 2 + [8.0] * 4 + [16.0] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"at_8.keras", "at_16.keras"}


@needs_tensorflow
def test_values_of_a_batch_are_numbers():
    """In arithmetic, comparisons and conversions, and in copies."""
    found = []

    class Use(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            scale = logs["loss_scale"]
            found.append([scale / 2, 2 * scale, max(scale, 4.0), np.mean([scale, scale]), f"{scale:.1f}"])
            found[-1] += [scale == 8.0, bool(scale), int(scale), repr(scale), float(scale.numpy())]
            found[-1] += [float(keras.ops.convert_to_tensor(scale)), copy.deepcopy(scale)]

    fit(LossScaleLogger(verbose=0), Use())
    assert found[0] == [4.0, 16.0, 8.0, 8.0, "8.0", True, True, 8, "8.0", 8.0, 8.0, 8.0]
    assert found[3] == [8.0, 32.0, 16.0, 16.0, "16.0", False, True, 16, "16.0", 16.0, 16.0, 16.0]


@needs_tensorflow
def test_a_batch_reads_only_what_is_used():
    """A few calls without a read. The only read of the measurements is that at the end of the epoch."""
    model, logger, profile = fresh_model(), LossScaleLogger(verbose=0), cProfile.Profile()
    profile.runcall(train, model, logger)
    calls = {entry.code: entry.callcount for entry in profile.getstats()}
    assert calls[tfmixed.GradScaler.measured.__code__] == 1
    profile = cProfile.Profile()
    for batch in range(10):
        profile.runcall(logger.on_train_batch_begin, batch)
        profile.runcall(logger.on_train_batch_end, batch, {})
    assert sum(entry.callcount for entry in profile.getstats()) < 10 * 35


@pytest.mark.skipif(BACKEND != "jax", reason="only there Keras copies variables when a callback reads the optimizer")
@pytest.mark.parametrize(("every", "expected"), [(None, []), (4, [3, 7, 11])])
def test_jax_batches_have_the_scale_only_if_requested(every, expected):
    """Reading the optimizer costs more than a small step."""
    batches = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append((batch, dict(logs))))
    fit(LossScaleLogger(every=every, verbose=0), keep)
    assert [batch for batch, logs in batches if "loss_scale" in logs] == expected


def test_console_has_one_line_for_each_change(capsys):
    """`verbose=0` prints nothing."""
    model, _ = fit(LossScaleLogger())
    assert capsys.readouterr().out.splitlines() == [
        "step 3: loss scale 2^3 -> 2^4 (growth)",
        f"step 5: loss scale 2^4 -> 2^3 (overflow)  {model.layers[0].kernel.path}",
        "step 9: loss scale 2^3 -> 2^4 (growth)",
    ]
    fit(LossScaleLogger(verbose=0))
    assert capsys.readouterr().out == ""


class CountReads(keras.callbacks.Callback):
    """Counts the values that are copied to the host during an epoch, by calls of `numpy`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = 0
        tensor = type(tf.constant(0.0))
        original = tensor._numpy

        def counted(self_):
            self.reads += 1
            return original(self_)

        monkeypatch.setattr(tensor, "_numpy", counted)

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.reads = 0

    def on_epoch_end(self, epoch, logs=None):
        self.in_epoch, self.reads = self.reads, 0


@needs_tensorflow
@pytest.mark.parametrize(("every", "more"), [(None, False), pytest.param(4, True, marks=slow)])
def test_it_reads_the_device_within_an_epoch_only_with_every(monkeypatch, every, more):
    """Without `every`, only Keras itself reads."""
    counter = CountReads(monkeypatch)
    fit(counter)
    bare = counter.in_epoch
    fit(counter, LossScaleLogger(every=every, verbose=0))
    assert bare > 0
    assert (counter.in_epoch > bare) is more


class CountLines(keras.callbacks.Callback):
    """Counts the lines of a log after each batch."""

    def __init__(self, path):
        super().__init__()
        self.path, self.lines = path, []

    def on_train_batch_end(self, batch, logs=None):
        self.lines.append(len(records.read_changes(self.path)))


def test_every_writes_within_the_epoch(tmp_path):
    """With `every=4`, the file has the changes of steps 0 to 7 after step 7."""
    path = tmp_path / "scale.jsonl"
    counter = CountLines(path)
    fit(LossScaleLogger(path, every=4, verbose=0), counter)
    assert counter.lines == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


@needs_tensorflow
def test_tensorboard_has_the_exact_steps(tmp_path):
    """Read back with the event reader of TensorFlow."""
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


@pytest.mark.parametrize(
    ("optimizer", "advice"),
    [
        ("sgd", "SGD.*Wrap"),
        pytest.param(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "from_keras", marks=slow),
    ],
)
def test_another_optimizer_warns_once_and_logs_nothing(tmp_path, optimizer, advice):
    """The warning names the remedy; no file is written."""
    path, model = tmp_path / "scale.jsonl", new_model()
    model.compile(optimizer, loss="mse")
    with pytest.warns(UserWarning, match=f"logs nothing: .*{advice}") as caught:
        history = train(model, LossScaleLogger(path), bad=(), epochs=3)
    assert len([warning for warning in caught if "logs nothing" in str(warning.message)]) == 1
    assert "loss_scale" not in history.history
    assert not path.exists()


def test_a_constant_scale_logs_skips_but_no_change(tmp_path):
    """The skip is in the metrics and in the line of the epoch."""
    path = tmp_path / "scale.jsonl"
    _, history = fit(LossScaleLogger(path), rule=ConstantScale(4.0))
    run, progress = records.read_log(path)
    assert (run.rule, progress.skipped_steps) == (ConstantScale(4.0).get_config(), 1)
    assert history.history["skipped_steps"] == [1.0]


def test_the_log_describes_the_run_and_its_progress(tmp_path):
    """One line at the start and one after each epoch; a continued run begins with its step."""
    path = tmp_path / "scale.jsonl"
    model, history = fit(LossScaleLogger(path, verbose=0), epochs=2)
    train(model, LossScaleLogger(path, verbose=0))
    log = records.read_log(path)
    runs = [record for record in log if isinstance(record, records.RunRecord)]
    assert [(run.step, run.loss_scale, run.model, run.optimizer) for run in runs] == [
        (0, 8.0, model.name, "SGD"),
        (24, 32.0, model.name, "SGD"),
    ]
    assert runs[0].rule == RULE.get_config()
    assert runs[0].policy == model.dtype_policy.name
    assert runs[0].versions["Keras"] == keras.version()
    assert runs[0].devices[0] == tfmixed.hardware.describe().main.name
    progress = [record for record in log if isinstance(record, records.Progress)]
    assert [(record.step, record.epoch, record.skipped_steps) for record in progress] == [
        (11, 0, 1),
        (23, 1, 2),
        (35, 0, 3),
    ]
    assert [record.loss_scale for record in progress[:2]] == history.history["loss_scale"]


def test_nonfinite_norms_and_losses_are_omitted(tmp_path):
    """JSON has no NaN; the last step of the epoch overflows."""
    path = tmp_path / "scale.jsonl"
    fit(LossScaleLogger(path, verbose=0), bad=(11,))
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert records.read_log(path)[-1].gradient_norm is None


def test_a_continued_run_appends_and_a_new_run_replaces(tmp_path):
    """A second `fit` of the same optimizer appends to the file."""
    path = tmp_path / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0))
    train(model, LossScaleLogger(path, verbose=0))
    assert steps(path) == [3, 5, 9, 13, 17, 21]
    fit(LossScaleLogger(path, verbose=0))
    assert steps(path) == [3, 5, 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scale.jsonl"]


class Killed(BaseException):
    """Ends a `fit` like a killed process."""


class KillAt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Killed


@pytest.mark.parametrize(
    ("frequency", "backup_first"),
    [
        ("epoch", False),
        pytest.param(5, True, marks=slow),
        pytest.param("epoch", True, marks=thorough),
        pytest.param(5, False, marks=thorough),
    ],
)
def test_a_restored_run_has_the_log_of_an_uninterrupted_one(tmp_path, backup_first, frequency):
    """Without gaps and duplicates, in either order of logger and backup."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "scale.jsonl"
    fit(LossScaleLogger(whole, verbose=0), epochs=4)

    def again(*more):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=frequency)
        pair = [LossScaleLogger(path, verbose=0), backup]
        fit(*(pair[::-1] if backup_first else pair), *more, epochs=4)

    with pytest.raises(Killed):
        again(KillAt(2))
    again()
    read, wanted = (
        [dataclasses.replace(record, epoch=None, variable=None) for record in records.read_changes(log)]
        for log in (path, whole)
    )
    if frequency == "epoch":
        assert read == wanted
    # A backup within an epoch restores the optimizer and begins the epoch's data again.
    numbers = [record.step for record in read]
    assert numbers == sorted(set(numbers))
    assert [record.old_scale for record in read] == [8.0, *(record.new_scale for record in read[:-1])]


def test_changes_of_an_earlier_fit_have_no_epoch(tmp_path):
    """The next `fit` logs them, without knowing their epoch."""
    path = tmp_path / "scale.jsonl"
    model, _ = fit()
    train(model, LossScaleLogger(path, verbose=0))
    assert [(record.step, record.epoch) for record in records.read_changes(path)] == [
        *((step, None) for step in (3, 5, 9)),
        *((step, 0) for step in (13, 17, 21)),
    ]


def test_a_file_that_is_not_a_log_is_refused(tmp_path):
    """Nothing is overwritten."""
    path = tmp_path / "notes.txt"
    path.write_text("precious\n")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        fit(LossScaleLogger(path))
    assert path.read_text() == "precious\n"


STUCK = {"rule": DynamicScale(initial_scale=4.0, min_scale=1.0), "max_consecutive_skips": 5}


def test_a_stuck_run_stops_with_advice(tmp_path, capsys):
    """After max_consecutive_skips steps at the floor, `fit` raises; the log is complete."""
    path = tmp_path / "scale.jsonl"
    with pytest.raises(LossScaleExhausted, match=r"kernel \(9 times\)") as raised:
        fit(LossScaleLogger(path), bad=range(3, 12), epochs=2, **STUCK)
    assert capsys.readouterr().out.count("(overflow)") == 2
    assert (raised.value.scale, raised.value.since_step, raised.value.skips) == (1.0, 3, 9)
    assert steps(path) == [3, 4]


def test_every_stops_a_stuck_run_within_the_epoch():
    """Five skips from step 3, checked after every fourth step."""
    model = fresh_model(**STUCK)
    with pytest.raises(LossScaleExhausted):
        train(model, LossScaleLogger(every=4, verbose=0), bad=range(3, 12))
    assert int(model.optimizer.attempted_steps) == 8


def test_a_nonfinite_loss_gets_other_advice():
    """No loss scale can help there."""
    with pytest.raises(LossScaleExhausted, match=r"loss itself is (nan|inf)"):
        fit(LossScaleLogger(verbose=0), bad=range(12), **STUCK)


def test_without_a_logger_fit_raises_at_its_end():
    """A run in which every step is skipped never ends silently."""
    with pytest.raises(LossScaleExhausted):
        fit(bad=range(12), **STUCK)


@pytest.mark.parametrize(
    ("rule", "bad", "words", "logger"),
    [
        pytest.param(RULE, range(12), r"^12 of the 12 .*kernel .12 times", True, id="all"),
        pytest.param(RULE, range(3, 12), r"^9 of the 12 .*last 9 .*step 3.*kernel .9 times", False, id="from step 3"),
        pytest.param(RULE, (*range(6), 9, 10), r"^8 of the 12 .*kernel\.", True, id="two rows", marks=slow),
        pytest.param(
            *(DynamicScale(2.0**12), (*range(6), 9, 10), r"^8 of the 12 .*last 2 .*step 9.*kernel\.", False),
            id="last two",
            marks=slow,
        ),
        pytest.param(ConstantScale(16), range(1, 11), r"^10 of the 12 .*below 16", True, id="constant", marks=slow),
        pytest.param(DynamicScale(2.0**24), range(8), r"initial_scale=65536", True, id="too high", marks=slow),
    ],
)
def test_a_fit_that_mostly_skipped_warns_at_its_end(rule, bad, words, logger):
    """With the steps, the last row of skips, the variable and a remedy."""
    with pytest.warns(UserWarning, match=words):
        fit(*[LossScaleLogger(verbose=0)] * logger, rule=rule, bad=bad)


@pytest.mark.parametrize(
    "bad", [pytest.param(range(4), marks=slow), range(6), pytest.param((1, 3, 5, 7, 9, 11), marks=slow)], ids=str
)
def test_skipping_half_of_the_steps_is_not_a_warning(bad):
    """As at the start of a short run."""
    fit(bad=bad)


def test_only_the_steps_of_the_same_fit_count():
    """Neither those of an earlier one, nor those of a file."""
    store = {}
    with pytest.warns(UserWarning, match="of the 12 steps since step 0"):
        model, _ = fit(bad=range(12))
    train(model, bad=())
    model.optimizer.save_own_variables(store)
    train(restored(store), bad=(0, 1))


def restored(store, **options):
    """Returns a model whose optimizer has a saved state."""
    model = fresh_model(**options)
    model.optimizer.load_own_variables(store)
    return model


def test_a_run_that_continues_after_it_was_stuck_can_train():
    """Earlier skips do not stop it before its first step."""
    model, store = fresh_model(**STUCK), {}
    with pytest.raises(LossScaleExhausted):
        train(model, bad=range(12))
    model.optimizer.save_own_variables(store)
    model = restored(store, **STUCK)
    assert int(model.optimizer.consecutive_skips) == 12
    train(model, LossScaleLogger(verbose=0), bad=())
    assert int(model.optimizer.consecutive_skips) == 0


def test_a_continued_run_drops_an_incomplete_last_line(tmp_path):
    """As a killed process may leave it."""
    path = tmp_path / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0))
    with path.open("a") as file:
        file.write('{"event": "scale_ch')
    train(model, LossScaleLogger(path, verbose=0))
    assert steps(path) == [3, 5, 9, 13, 17, 21]


@slow
def test_a_killed_process_keeps_its_log(tmp_path):
    """SIGKILL in the middle of an epoch leaves complete lines for everything collected."""
    path = tmp_path / "scale.jsonl"
    script = f"""
        import os, signal, sys
        sys.path[:] = {sys.path!r}
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
    assert [record.step for record in records.read_changes(path)] == [3, 5]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": True}, {"verbose": -1}], ids=str)
def test_bad_arguments_are_refused(arguments):
    """The error names the argument."""
    (name, _), *_ = arguments.items()
    with pytest.raises(ValueError, match=name):
        LossScaleLogger(**arguments)


ALL = [3, 5, 9]  # the steps of one epoch that change the scale


def test_each_of_two_loggers_logs_every_change(tmp_path):
    """However often the other one collects; `drain_events` returns all changes, too."""

    class Drains(keras.callbacks.Callback):
        drained = ()

        def on_epoch_end(self, epoch, logs=None):
            self.drained += tuple(change.step for change in self.model.optimizer.drain_events())

    paths, drains = [tmp_path / "often.jsonl", tmp_path / "rarely.jsonl"], Drains()
    often, rarely = LossScaleLogger(paths[0], every=2, verbose=0), LossScaleLogger(paths[1], verbose=0)
    model, _ = fit(often, drains, rarely)
    assert [steps(path) for path in paths] == [ALL, ALL]
    assert list(drains.drained) == ALL
    assert model.optimizer.drain_events() == []


def test_logged_changes_can_still_be_drained():
    """`drain_events` returns the changes since its own last call."""
    model, _ = fit(LossScaleLogger(verbose=0))
    assert [change.step for change in model.optimizer.drain_events()] == ALL


def test_a_later_logger_starts_with_its_own_fit(tmp_path):
    """It does not repeat logged changes of an earlier `fit`, and no change is lost between them."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    model, _ = fit(LossScaleLogger(first, verbose=0))
    model.optimizer.loss_scale = 4.0
    train(model, LossScaleLogger(second, verbose=0))
    assert steps(first) == ALL
    assert steps(second)[0] == 12
    assert records.read_changes(second)[0].reason == "set"


def test_lost_changes_are_counted_for_each_reader(tmp_path):
    """A logger that collects often enough loses none."""
    model, _ = fit(LossScaleLogger(tmp_path / "log.jsonl", every=4, verbose=0), event_capacity=2)
    assert steps(tmp_path / "log.jsonl") == ALL
    lost, *kept = model.optimizer.drain_events()
    assert (lost.count, [change.step for change in kept]) == (1, ALL[1:])


def test_a_restored_optimizer_returns_changes_not_read_before_it_was_saved():
    """In a new process, and in the same one."""
    model, _ = fit(LossScaleLogger(verbose=0))
    optimizer, store = model.optimizer, {}
    optimizer.loss_scale = 4.0
    optimizer.save_own_variables(store)
    assert [change.step for change in optimizer.drain_events()] == [*ALL, 12]
    for new in (LossScaleOptimizer("sgd", RULE), optimizer):
        new.build(model.trainable_variables)
        new.load_own_variables(store)
        assert [change.step for change in new.drain_events()] == [12]


@slow
def test_two_trainings_on_one_path_keep_a_complete_log_each(tmp_path):
    """The second one, in another process, starts while the first one runs."""
    path = tmp_path / "log.jsonl"
    script = f"""
        import sys
        sys.path[:] = {sys.path!r}
        from test_callbacks import fit
        from tfmixed.callbacks import LossScaleLogger

        fit(LossScaleLogger({str(path)!r}, verbose=0))
    """

    class Other(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120, check=True)

    fit(LossScaleLogger(path, every=1, verbose=0), Other())
    for log in (path, tmp_path / "log-2.jsonl"):
        assert [record.event for record in records.read_log(log)] == ["run", *["scale_change"] * 3, "progress"]
        assert steps(log) == ALL


class Save(keras.callbacks.Callback):
    """Saves the state of the optimizer before a step, and optionally ends the training there."""

    def __init__(self, step, kill=False):
        super().__init__()
        self.step, self.kill, self.store = step, kill, {}

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.attempted_steps) == self.step:
            self.model.optimizer.save_own_variables(self.store)
            if self.kill:
                raise Killed


@pytest.mark.parametrize("step", [pytest.param(12, marks=slow), 16])
def test_a_killed_run_replaces_what_it_repeats(tmp_path, step):
    """From a checkpoint at the end of an epoch, and from one within an epoch."""
    path, save = tmp_path / "log.jsonl", Save(step)
    with pytest.raises(Killed):
        fit(LossScaleLogger(path, every=1, verbose=0), save, Save(20, kill=True), epochs=2)
    assert steps(path) == [3, 5, 9, 13, 17]
    train(restored(save.store), LossScaleLogger(path, verbose=0))
    assert steps(path)[:4] == [3, 5, 9, 13]
    runs = [record.step for record in records.read_log(path) if isinstance(record, records.RunRecord)]
    assert runs == [0, step]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("step", "bad"), [(12, (6,)), *(pytest.param(*case, marks=slow) for case in [(16, (6,)), (16, ()), (12, (5,))])]
)
def test_a_restored_run_leaves_the_log_of_another_training(tmp_path, step, bad):
    """Even of one that is equal up to that step, if the run has its own log beside it."""
    path, own, save = tmp_path / "log.jsonl", tmp_path / "log-2.jsonl", Save(step)
    fit(LossScaleLogger(path, verbose=0), bad=bad, epochs=3)
    other = path.read_bytes()
    with pytest.raises(Killed):
        fit(LossScaleLogger(own, verbose=0), save, Save(20, kill=True), epochs=2)
    log_file.release(own)  # like the end of its process
    killed = own.read_bytes()
    logger = LossScaleLogger(path, verbose=0)
    with pytest.warns(UserWarning, match="later steps"):
        train(restored(save.store), logger)
    assert (path.read_bytes(), own.read_bytes(), logger.path.name) == (other, killed, "log-3.jsonl")
    begins = [record.step for record in records.read_log(logger.path) if isinstance(record, records.RunRecord)]
    assert begins == [step]
    train(restored(save.store), LossScaleLogger(own, verbose=0))
    assert own.read_bytes().startswith(killed)


def test_two_scalers_of_one_loop_have_separate_logs(tmp_path):
    """A second logger of the same scaler shares its log."""
    path, scalers = tmp_path / "gan.jsonl", [tfmixed.GradScaler(), tfmixed.GradScaler()]
    loggers = [LossScaleLogger(path, verbose=0).watch(scaler) for scaler in (*scalers, scalers[0])]
    loggers[0].on_epoch_begin(0)
    with pytest.warns(UserWarning, match="another run"):
        loggers[1].on_epoch_begin(0)
    loggers[2].on_epoch_begin(0)
    assert [logger.path.name for logger in loggers] == ["gan.jsonl", "gan-2.jsonl", "gan.jsonl"]
    for logger in loggers:
        logger.on_train_end()
