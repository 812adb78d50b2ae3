from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from backend import BACKEND, modes, needs_tensorflow, tf
from thorough import covering

import tfmixed
from tfmixed import LossScaleOptimizer, records
from tfmixed.callbacks import LossScaleLogger, run_log
from tfmixed.errors import LossScaleExhausted
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
    return [change.step for change in records.read_changes(path)]


@pytest.mark.parametrize("modes", modes({}, {"steps_per_execution": 5}, {"jit_compile": True}), ids=str)
def test_log_holds_every_change_with_its_exact_step_and_epoch(tmp_path, modes):
    """One JSON line a change, in the documented form, whatever runs the steps."""
    path = tmp_path / "run" / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0), epochs=2, **modes)
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
    """loss_scale, skipped_steps and gradient_norm stand beside the other metrics."""
    csv = tmp_path / "log.csv"
    model, history = fit(LossScaleLogger(verbose=0), keras.callbacks.CSVLogger(csv), epochs=2, verbose=1)
    assert history.history["loss_scale"] == [16.0, 32.0]
    assert history.history["skipped_steps"] == [1.0, 2.0]
    assert history.history["gradient_norm"][-1] == float(model.optimizer.gradient_norm)
    assert csv.read_text().startswith("epoch,gradient_norm,loss,loss_scale,skipped_steps")
    assert "loss_scale: 32.0000" in capsys.readouterr().out


def test_other_callbacks_can_use_the_values_of_a_batch(tmp_path):
    """Each batch has its own, and they format like numbers, as ModelCheckpoint needs them. On JAX who asks has them."""
    seen = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(dict(logs)))
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "at_{loss_scale:.0f}.keras", save_freq=6)
    fit(LossScaleLogger(every=1 if BACKEND == "jax" else None, verbose=0), keep, checkpoint)
    assert [float(logs["loss_scale"]) for logs in seen] == [8.0] * 3 + [16.0] * 2 + [8.0] * 4 + [16.0] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"at_8.keras", "at_16.keras"}


@pytest.mark.skipif(BACKEND != "jax", reason="where Keras moves variables for whoever looks at them")
@pytest.mark.parametrize(("every", "batches"), [(None, []), (4, [3, 7, 11])])
def test_on_jax_batches_are_looked_at_where_asked(every, batches):
    """A look at the optimizer costs more than a small step."""
    seen = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((batch, dict(logs))))
    fit(LossScaleLogger(every=every, verbose=0), keep)
    assert [batch for batch, logs in seen if "loss_scale" in logs] == batches


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

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.reads = 0

    def on_epoch_end(self, epoch, logs=None):
        self.in_epoch, self.reads = self.reads, 0


@needs_tensorflow
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
        self.lines.append(len(records.read_changes(self.path)))


def test_every_writes_within_the_epoch(tmp_path):
    """`every=4` has the changes of steps 0 to 7 in the file after step 7."""
    path = tmp_path / "scale.jsonl"
    seen = Seen(path)
    fit(LossScaleLogger(path, every=4, verbose=0), seen)
    assert seen.lines == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


@needs_tensorflow
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


@pytest.mark.parametrize(
    ("optimizer", "advice"),
    [
        ("sgd", "the optimizer is a SGD, which does not scale the loss. Wrap it"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "is Keras's own LossScaleOptimizer.*from_keras"),
    ],
)
def test_an_optimizer_that_is_not_ours_is_said_once_and_logs_nothing(tmp_path, optimizer, advice):
    """The message says what to do; no file appears."""
    path = tmp_path / "scale.jsonl"
    with pytest.warns(UserWarning, match=f"logs nothing: .*{advice}") as caught:
        _, history = fit(LossScaleLogger(path), optimizer=optimizer, bad=(), epochs=3)
    assert len([warning for warning in caught if "logs nothing" in str(warning.message)]) == 1
    assert "loss_scale" not in history.history
    assert not path.exists()


def test_a_constant_scale_logs_skips_and_no_change(tmp_path):
    """No change, no line of one; the skip is in the metrics and in the line of the epoch."""
    path = tmp_path / "scale.jsonl"
    _, history = fit(LossScaleLogger(path), optimizer=LossScaleOptimizer("sgd", ConstantScale(4.0)))
    run, progress = records.read_log(path)
    assert (run.rule, progress.skipped_steps) == (ConstantScale(4.0).get_config(), 1)
    assert history.history["skipped_steps"] == [1.0]


def test_the_log_says_what_runs_where_and_how_far_it_came(tmp_path):
    """One line at the begin, one after each epoch; a run that goes on says so with its step."""
    path = tmp_path / "scale.jsonl"
    model, history = fit(LossScaleLogger(path, verbose=0), epochs=2)
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=[LossScaleLogger(path, verbose=0)])
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


def test_a_norm_and_a_loss_that_are_not_finite_are_left_out(tmp_path):
    """JSON has no NaN; the last step of the epoch overflowed."""
    path = tmp_path / "scale.jsonl"
    fit(LossScaleLogger(path, verbose=0), bad=(11,))
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert records.read_log(path)[-1].gradient_norm is None


def test_going_on_appends_and_starting_anew_replaces(tmp_path):
    """A second fit of the same optimizer goes on in the file; a new run starts it again."""
    path = tmp_path / "scale.jsonl"
    model, _ = fit(LossScaleLogger(path, verbose=0))
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=[LossScaleLogger(path, verbose=0)])
    assert steps(path) == [3, 5, 9, 13, 17, 21]
    fit(LossScaleLogger(path, verbose=0))
    assert steps(path) == [3, 5, 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scale.jsonl"]


class Killed(BaseException):
    """Ends a fit at once, as a killed process would."""


class KillAt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Killed


@pytest.mark.parametrize(("frequency", "backup_first"), covering(1, {"epoch": "epoch", "5": 5}, [False, True]))
def test_a_restored_run_has_the_log_of_an_uninterrupted_one(tmp_path, backup_first, frequency):
    """In whatever order logger and backup are listed: no hole, no duplicate."""
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


def test_changes_of_an_interrupted_fit_carry_no_wrong_epoch(tmp_path):
    """They are logged by the next one, which does not know when they happened."""
    path = tmp_path / "scale.jsonl"
    optimizer = LossScaleOptimizer("sgd", RULE)
    model, _ = fit(optimizer=optimizer)
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=[LossScaleLogger(path, verbose=0)])
    assert [(record.step, record.epoch) for record in records.read_changes(path)] == [
        *((step, None) for step in (3, 5, 9)),
        *((step, 0) for step in (13, 17, 21)),
    ]


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    """The error names the argument and the file, and nothing is overwritten."""
    path = tmp_path / "notes.txt"
    path.write_text("precious\n")
    with pytest.raises(ValueError, match="must be a log"):
        fit(LossScaleLogger(path))
    assert path.read_text() == "precious\n"


STUCK = DynamicScale(initial_scale=4.0, min_scale=1.0)


def test_a_stuck_run_stops_with_advice(tmp_path, capsys):
    """At the floor for max_consecutive_skips steps: the log is written and printed, then fit raises."""
    path = tmp_path / "scale.jsonl"
    optimizer = LossScaleOptimizer("sgd", STUCK, max_consecutive_skips=5)
    with pytest.raises(LossScaleExhausted, match=r"since step 3 .* stands at 1 .*kernel \(9 times\).*") as raised:
        fit(LossScaleLogger(path), optimizer=optimizer, bad=range(3, 12), epochs=5)
    assert capsys.readouterr().out.count("(overflow)") == 2
    assert (raised.value.scale, raised.value.since_step, raised.value.skips) == (1.0, 3, 9)
    assert steps(path) == [3, 4]


def test_every_stops_a_stuck_run_within_the_epoch():
    """Five skips from step 3, looked at after each fourth step."""
    optimizer = LossScaleOptimizer("sgd", STUCK, max_consecutive_skips=5)
    with pytest.raises(LossScaleExhausted):
        fit(LossScaleLogger(every=4, verbose=0), optimizer=optimizer, bad=range(3, 12))
    assert int(optimizer.attempted_steps) == 8


def test_a_loss_that_is_nan_is_told_apart():
    """No scale mends it, and the advice says so."""
    optimizer = LossScaleOptimizer("sgd", STUCK, max_consecutive_skips=5)
    with pytest.raises(
        LossScaleExhausted,
        match=r"loss itself is (nan|inf) .*a batch of this epoch\): no loss scale fixes",
    ):
        fit(LossScaleLogger(verbose=0), optimizer=optimizer, bad=range(12))


def test_without_a_logger_fit_raises_at_its_end():
    """A run that was in vain never ends in silence."""
    optimizer = LossScaleOptimizer("sgd", STUCK, max_consecutive_skips=5)
    with pytest.raises(LossScaleExhausted):
        fit(optimizer=optimizer, bad=range(12))


@pytest.mark.parametrize(
    ("rule", "bad", "words"),
    [
        (RULE, range(12), "^12 of the 12 steps since step 0 .* most often: .*kernel .12 times.* learning rate"),
        (RULE, range(3, 12), "^9 of the 12 .* last 9 of them in a row since step 3.*kernel .9 times"),
        (RULE, (*range(6), 9, 10), r"^8 of the 12 .* and were skipped\. .* most often: [^ ]*kernel\. .* learning rate"),
        (DynamicScale(2.0**12), (*range(6), 9, 10), r"^8 of the 12 .* last 2 of them in a row since step 9.*kernel\."),
        (16, range(1, 11), "^10 of the 12 steps since step 0 .* constant scale below 16"),
        (DynamicScale(2.0**24), range(8), "too high at first.*initial_scale=65536"),
    ],
    ids=str,
)
@pytest.mark.parametrize("logger", [True, False])
def test_a_fit_that_mostly_skipped_warns_at_its_end(rule, bad, words, logger):
    """With the steps, the last row of skips, the variable and a remedy."""
    with pytest.warns(UserWarning, match=words):
        fit(*[LossScaleLogger(verbose=0)] * logger, optimizer=LossScaleOptimizer("sgd", rule), bad=bad)


@pytest.mark.parametrize("bad", [range(4), range(6), (1, 3, 5, 7, 9, 11)], ids=str)
def test_a_scale_that_finds_its_place_is_no_warning(bad):
    """Half of the steps, as at the start of a short run."""
    fit(bad=bad)


def test_each_fit_is_looked_at_by_itself():
    """Steps of an earlier one, or of a file, are none of its own."""
    optimizer, store = LossScaleOptimizer("sgd", RULE), {}
    with pytest.warns(UserWarning, match="of the 12 steps since step 0"):
        model, _ = fit(optimizer=optimizer, bad=range(12))
    model.fit(*data(bad=()), batch_size=8, verbose=0)
    optimizer.save_own_variables(store)
    fresh = LossScaleOptimizer("sgd", RULE)
    fresh.build(model.trainable_variables)
    fresh.load_own_variables(store)
    model.compile(fresh, loss="mse")
    model.fit(*data(bad=(0, 1)), batch_size=8, verbose=0, shuffle=False)


def test_a_run_that_goes_on_after_it_was_stuck_gets_its_chance():
    """The counts of before do not stop it before its first step."""
    optimizer = LossScaleOptimizer("sgd", STUCK, max_consecutive_skips=5)
    with pytest.raises(LossScaleExhausted):
        model, _ = fit(optimizer=optimizer, bad=range(12))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="only")])
    fresh = LossScaleOptimizer("sgd", STUCK, max_consecutive_skips=5)
    fresh.build(model.trainable_variables)
    store = {}
    optimizer.save_own_variables(store)
    fresh.load_own_variables(store)
    assert int(fresh.consecutive_skips) == 12
    model.compile(fresh, loss="mse")
    model.fit(*data(bad=()), batch_size=8, verbose=0, callbacks=[LossScaleLogger(verbose=0)])
    assert int(fresh.consecutive_skips) == 0


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
        sys.path[:0] = [str(path) for path in __import__("pathlib").Path({__file__!r}).parents[:2]]
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
def test_bad_arguments_are_named(arguments):
    """Every refusal names the argument and the value."""
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be a whole number.*received {value}"):
        LossScaleLogger(**arguments)


ALL = [3, 5, 9]  # the steps of one epoch that change the scale


def test_each_of_two_loggers_logs_every_change(tmp_path):
    """However often the other one collects; and who drains the changes meanwhile gets them all too."""

    class Drains(keras.callbacks.Callback):
        drained = ()

        def on_epoch_end(self, epoch, logs=None):
            self.drained += tuple(each.step for each in self.model.optimizer.drain_events())

    paths, drains = [tmp_path / "often.jsonl", tmp_path / "rarely.jsonl"], Drains()
    often, rarely = LossScaleLogger(paths[0], every=2, verbose=0), LossScaleLogger(paths[1], verbose=0)
    model, _ = fit(often, drains, rarely)
    assert [steps(path) for path in paths] == [ALL, ALL]
    assert list(drains.drained) == ALL
    assert model.optimizer.drain_events() == []


def test_what_was_logged_can_still_be_drained():
    """`drain_events` tells of the changes since its own last call."""
    model, _ = fit(LossScaleLogger(verbose=0))
    assert [each.step for each in model.optimizer.drain_events()] == ALL


def test_a_logger_that_starts_later_starts_there(tmp_path):
    """Nothing of an earlier `fit` that was logged is in its log, and no change is lost between them."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    model, _ = fit(LossScaleLogger(first, verbose=0))
    model.optimizer.loss_scale = 4.0
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=[LossScaleLogger(second, verbose=0)])
    assert steps(first) == ALL
    assert steps(second)[0] == 12
    assert records.read_changes(second)[0].reason == "set"


def test_lost_changes_are_counted_for_each_reader(tmp_path):
    """A logger that collects often enough has lost none."""
    optimizer = LossScaleOptimizer("sgd", RULE, event_capacity=2)
    fit(LossScaleLogger(tmp_path / "log.jsonl", every=4, verbose=0), optimizer=optimizer)
    assert steps(tmp_path / "log.jsonl") == ALL
    lost, *kept = optimizer.drain_events()
    assert (lost.count, [each.step for each in kept]) == (1, ALL[1:])


def test_a_restored_optimizer_tells_of_what_nobody_had_read():
    """Of those that were read before it was saved, nothing."""
    optimizer = LossScaleOptimizer("sgd", RULE)
    model, _ = fit(LossScaleLogger(verbose=0), optimizer=optimizer)
    optimizer.loss_scale = 4.0
    store = {}
    optimizer.save_own_variables(store)
    assert [each.step for each in optimizer.drain_events()] == [*ALL, 12]
    for new in (LossScaleOptimizer("sgd", RULE), optimizer):  # in a new process, and in this one
        new.build(model.trainable_variables)
        new.load_own_variables(store)
        assert [each.step for each in new.drain_events()] == [12]


def test_two_trainings_on_one_path_keep_a_whole_log_each(tmp_path):
    """The second one, in another process, starts while the first one runs."""
    path = tmp_path / "log.jsonl"
    script = f"""
        import sys
        sys.path[:0] = [str(path) for path in __import__("pathlib").Path({__file__!r}).parents[:2]]
        from test_callbacks import fit
        from tfmixed.callbacks import LossScaleLogger

        fit(LossScaleLogger({str(path)!r}, verbose=0))
    """

    class Other(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120, check=True)

    fit(LossScaleLogger(path, every=1, verbose=0), Other())
    for each in (path, tmp_path / "log-2.jsonl"):
        assert [record.event for record in records.read_log(each)] == ["run", *["scale_change"] * 3, "progress"]
        assert steps(each) == ALL


class Save(keras.callbacks.Callback):
    """Keeps the state of the optimizer as it was before a step, and ends the training there if asked."""

    def __init__(self, step, kill=False):
        super().__init__()
        self.step, self.kill, self.store = step, kill, {}

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.attempted_steps) == self.step:
            self.model.optimizer.save_own_variables(self.store)
            if self.kill:
                raise Killed


def go_on(store, *callbacks):
    """Trains an epoch from a saved state."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="only")])
    optimizer = LossScaleOptimizer("sgd", RULE)
    optimizer.build(model.trainable_variables)
    optimizer.load_own_variables(store)
    model.compile(optimizer, loss="mse")
    model.fit(*data(), batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks))


@pytest.mark.parametrize("step", [12, 16])
def test_a_killed_run_replaces_what_it_repeats(tmp_path, step):
    """From a checkpoint at the end of an epoch, and from one within."""
    path, save = tmp_path / "log.jsonl", Save(step)
    with pytest.raises(Killed):
        fit(LossScaleLogger(path, every=1, verbose=0), save, Save(20, kill=True), epochs=2)
    assert steps(path) == [3, 5, 9, 13, 17]
    go_on(save.store, LossScaleLogger(path, verbose=0))
    assert steps(path)[:4] == [3, 5, 9, 13]
    runs = [record.step for record in records.read_log(path) if isinstance(record, records.RunRecord)]
    assert runs == [0, step]
    assert [each.name for each in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(("step", "bad"), [(12, (6,)), (16, (6,)), (16, ()), (12, (5,))])
def test_a_restored_run_leaves_the_log_of_another_training(tmp_path, step, bad):
    """Also of one that is the same up to there, where the run has a log of its own beside it."""
    path, own, save = tmp_path / "log.jsonl", tmp_path / "log-2.jsonl", Save(step)
    fit(LossScaleLogger(path, verbose=0), bad=bad, epochs=3)
    other = path.read_bytes()
    with pytest.raises(Killed):
        fit(LossScaleLogger(own, verbose=0), save, Save(20, kill=True), epochs=2)
    run_log.release(own)  # as the end of its process does
    killed = own.read_bytes()
    logger = LossScaleLogger(path, verbose=0)
    with pytest.warns(UserWarning, match="later steps"):
        go_on(save.store, logger)
    assert (path.read_bytes(), own.read_bytes(), logger.path.name) == (other, killed, "log-3.jsonl")
    begins = [record.step for record in records.read_log(logger.path) if isinstance(record, records.RunRecord)]
    assert begins == [step]
    go_on(save.store, LossScaleLogger(own, verbose=0))
    assert own.read_bytes().startswith(killed)


def test_two_scalers_of_one_loop_have_a_log_each(tmp_path):
    """A second logger of one of them shares its log."""
    path, scalers = tmp_path / "gan.jsonl", [tfmixed.GradScaler(), tfmixed.GradScaler()]
    loggers = [LossScaleLogger(path, verbose=0).watch(scaler) for scaler in (*scalers, scalers[0])]
    loggers[0].on_epoch_begin(0)
    with pytest.warns(UserWarning, match="being written by another training"):
        loggers[1].on_epoch_begin(0)
    loggers[2].on_epoch_begin(0)
    assert [logger.path.name for logger in loggers] == ["gan.jsonl", "gan-2.jsonl", "gan.jsonl"]
    for logger in loggers:
        logger.on_train_end()
