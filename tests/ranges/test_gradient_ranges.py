from __future__ import annotations

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from backend import modes, needs_tensorflow, tf
from keras import layers

from tfmixed import LossScaleOptimizer, measure_gradients, records
from tfmixed.callbacks import GradientRanges, LossScaleLogger
from tfmixed.ranges import GradientRanges as Ranges
from tfmixed.records import RangesRecord
from tfmixed.scaling import DynamicScale

X = np.random.default_rng(0).normal(size=(44, 6)).astype("float32")


def model(optimizer=None, **compile_arguments):
    keras.utils.set_random_seed(1)
    hidden = [layers.Dense(5, activation="tanh"), layers.Dropout(0.3), layers.BatchNormalization()]
    made = keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(2)])
    optimizer = optimizer or LossScaleOptimizer("adam", DynamicScale(initial_scale=8.0, growth_interval=4))
    made.compile(optimizer, loss="mse", metrics=["mae"], **compile_arguments)
    return made


def fit(*callbacks, made=None, x=X, epochs=2, shuffle=True, **compile_arguments):
    made = made or model(**compile_arguments)
    made.fit(x, x[:, :2], batch_size=8, epochs=epochs, verbose=0, shuffle=shuffle, callbacks=list(callbacks))
    return made


def snapshots(path):
    return [record for record in records.read_log(path) if isinstance(record, RangesRecord)]


@pytest.mark.parametrize("mode", modes({}, {"steps_per_execution": 4}), ids=str)
def test_training_goes_as_without_it(tmp_path, mode):
    """Six batches an epoch, the last one smaller: the same weights to the bit, and the steps are those of the log."""
    path = tmp_path / "log.jsonl"
    trained = fit(LossScaleLogger(path, verbose=0), GradientRanges(path, every=4), **mode)
    for value, other in zip(trained.get_weights(), fit(**mode).get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)
    steps = [0, 4, 10] if "steps_per_execution" in mode else [0, 4, 8]
    assert [(record.step, record.epoch) for record in snapshots(path)] == [(step, step // 6) for step in steps]
    assert int(trained.optimizer.attempted_steps) == 12


def test_a_snapshot_is_the_measurement_of_its_batch():
    """What `measure_gradients` says of the untrained model and the first batch."""
    watch = GradientRanges(every=100)
    fit(watch, shuffle=False)
    wanted = measure_gradients(model(), (X[:8], X[:8, :2]), batch_size=8)
    # Behind the dropout, which draws other random numbers, only the number of values is the same.
    for one, other in zip(watch.last, wanted, strict=True):
        assert (one.kind, one.zeros + one.nonzeros) == (other.kind, other.zeros + other.nonzeros)


@needs_tensorflow
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("mode", [{}, {"steps_per_execution": 4}], ids=str)
def test_the_end_of_a_dataset_of_unknown_size_is_no_step(tmp_path, mode):
    """Six batches an epoch, with an optimizer whose own count is one too high after each."""
    path = tmp_path / "log.jsonl"
    data = tf.data.Dataset.from_tensor_slices((X, X[:, :2])).filter(lambda *_: True).batch(8)
    model("sgd", **mode).fit(data, epochs=3, shuffle=False, verbose=0, callbacks=[GradientRanges(path, every=6)])
    assert [record.step for record in snapshots(path)] == [0, 6, 12]


def test_a_run_that_goes_on_appends_and_one_that_repeats_replaces(tmp_path):
    """By the steps of the optimizer, whoever else writes to the log, in either order."""
    path = tmp_path / "log.jsonl"
    made = fit(GradientRanges(path, every=3), LossScaleLogger(path, verbose=0), epochs=1)
    fit(LossScaleLogger(path, verbose=0), GradientRanges(path, every=3), made=made, epochs=1)
    assert [record.step for record in snapshots(path)] == [0, 3, 6, 9]
    assert sum(isinstance(record, records.RunRecord) for record in records.read_log(path)) == 2
    fit(GradientRanges(path, every=3), epochs=1)
    assert [record.step for record in snapshots(path)] == [0, 3]


def test_any_optimizer_will_do(tmp_path):
    """Without loss scaling the steps are its iterations."""
    path = tmp_path / "ranges.jsonl"
    made = fit(GradientRanges(path, every=5), made=model(keras.optimizers.Adam()))
    assert [record.step for record in snapshots(path)] == [0, 5, 10]
    assert int(made.optimizer.iterations) == 12


def test_an_interrupted_fit_leaves_nothing_behind():
    """The next one measures once, not twice, and ends with Keras's own function."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    made, watch = model(), GradientRanges(every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(watch, Stop(), made=made)
    fit(watch, made=made, epochs=1)
    assert watch.last.record.batches == 1
    last = watch.last
    with pytest.raises(KeyboardInterrupt):
        fit(watch, Stop(), made=made)
    interrupted, function = watch.last, made.train_function
    fit(made=made, epochs=1)
    assert watch.last is interrupted is not last
    assert made.train_function is not function
    assert not {"make_train_function", "call"} & vars(made).keys()


def test_two_of_them_measure_side_by_side(tmp_path):
    """Float32 and float16, each at its own steps, into one log."""
    path = tmp_path / "log.jsonl"
    keras.config.set_dtype_policy("mixed_float16")
    made = fit(GradientRanges(path, every=4), GradientRanges(path, every=6, precision="float16"))
    found = [(record.step, record.precision) for record in snapshots(path)]
    assert found == [(0, "float32"), (0, "float16"), (4, "float32"), (6, "float16"), (8, "float32")]
    assert "make_train_function" not in vars(made)


@needs_tensorflow
def test_batches_of_unknown_size_are_not_traced_anew():
    """Nor rounded otherwise: the weights are the same to the bit."""
    results = []
    for callbacks in ([], [GradientRanges(every=2)]):
        data = tf.data.Dataset.from_tensor_slices((X, X[:, :2])).batch(8).repeat()
        made = model()
        made.fit(data, steps_per_epoch=10, shuffle=False, verbose=0, callbacks=callbacks)
        results.append(made.get_weights())
    for value, other in zip(*results, strict=True):
        np.testing.assert_array_equal(value, other)


def test_a_dataset_of_unknown_length_ends_as_it_does(tmp_path):
    """No batch is lost at its end, none trained twice."""
    path = tmp_path / "log.jsonl"

    def batches():
        yield from ((X[i : i + 8], X[i : i + 8, :2]) for i in range(0, 40, 8))

    made = model()
    with pytest.warns(UserWarning, match="ran out of data"):
        made.fit(batches(), steps_per_epoch=7, shuffle=False, verbose=0, callbacks=[GradientRanges(path, every=1)])
    assert [record.step for record in snapshots(path)] == [0, 1, 2, 3, 4]
    assert int(made.optimizer.attempted_steps) == 5


def test_half_precision_is_recorded_as_such(tmp_path):
    """And what it says is printed."""
    path = tmp_path / "log.jsonl"
    keras.config.set_dtype_policy("mixed_float16")
    fit(GradientRanges(path, every=100, precision="float16"))
    assert [record.precision for record in snapshots(path)] == ["float16"]
    assert {each.dtype for each in snapshots(path)[0].ranges} >= {"float16"}


def test_what_a_snapshot_says_is_printed(capsys):
    """One line each, when asked for."""
    fit(GradientRanges(every=6, verbose=1))
    assert capsys.readouterr().out == "step 0: no scale is needed.\nstep 6: no scale is needed.\n"


@needs_tensorflow
@pytest.mark.parametrize("count", [1, 2])
def test_replicas_train_as_without_it(count):
    """Under MirroredStrategy the batch of the first replica is measured."""
    results = []
    for callbacks in ([], [GradientRanges(every=2)]):
        devices = [f"CPU:{index}" for index in range(count)]
        strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())
        with strategy.scope():
            made = model()
        data = tf.data.Dataset.from_tensor_slices((X[:40], X[:40, :2])).batch(8)
        options = tf.distribute.InputOptions(experimental_fetch_to_device=False)
        distributed = strategy.experimental_distribute_dataset(data, options)
        made.fit(distributed, shuffle=False, verbose=0, callbacks=callbacks)
        results.append(made.get_weights())
    for value, other in zip(*results, strict=True):
        np.testing.assert_array_equal(value, other)
    first = callbacks[0].last.record.ranges[0]
    assert first.zeros + first.nonzeros == 8 // count * 5


WORKER = """
import keras, numpy, tensorflow
from tfmixed.callbacks import GradientRanges

with tensorflow.distribute.MultiWorkerMirroredStrategy().scope():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    model.compile("sgd", loss="mse")
try:
    watch = GradientRanges()
    watch.set_model(model)
    watch.on_train_begin()
except NotImplementedError as error:
    print(error)
"""


@needs_tensorflow
def test_several_workers_are_refused():
    """With what to do instead."""
    cluster = {"cluster": {"worker": ["localhost:29431"]}, "task": {"type": "worker", "index": 0}}
    environment = {**os.environ, "TF_CONFIG": json.dumps(cluster)}
    run = subprocess.run(
        [sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "measures in one process" in run.stdout


@needs_tensorflow
def test_tensorboard_has_histograms_and_scalars(tmp_path):
    """Read back with TensorBoard's own reader: each octave is a bucket, and Keras's own events are there too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = GradientRanges(tensorboard=tmp_path, every=6)
    fit(watch, keras.callbacks.TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path / "gradients"), size_guidance={"tensors": 0})
    events.Reload()
    assert len(list((tmp_path / "gradients").iterdir())) == 1
    assert list((tmp_path / "train").glob("events*"))
    kernel = next(each for each in watch.last if each.name.endswith("kernel"))
    first, last = events.Tensors(f"gradients/weight/{kernel.name}")
    assert (first.step, last.step) == (0, 6)
    rows = tf.make_ndarray(last.tensor_proto)
    assert rows[:, 2].sum() == kernel.nonzeros
    assert {(left, right): count for left, right, count in rows.tolist()} == {
        (float(octave), octave + 1.0): float(sum(parts)) for octave, parts in kernel.octaves.items()
    }
    assert events.SummaryMetadata(f"gradients/weight/{kernel.name}").plugin_data.plugin_name == "histograms"
    largest = tf.make_ndarray(events.Tensors("gradients/largest")[-1].tensor_proto)
    assert largest == pytest.approx(max(each.largest for each in watch.last))


def test_a_snapshot_survives_the_log(tmp_path):
    """What is read from the file is what was measured."""
    path, watch = tmp_path / "log.jsonl", GradientRanges(tmp_path / "log.jsonl", every=100)
    fit(watch)
    assert Ranges.load(path) == watch.last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number, at least 1.*received 0"),
        ({"verbose": -1}, "verbose must be .*received -1"),
        ({"precision": "half"}, "precision must be one of float32, float16, bfloat16, received 'half'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """When they are given, not when training begins."""
    with pytest.raises(ValueError, match=message):
        GradientRanges(**arguments)
