from __future__ import annotations

import json
import os
import re
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


def assert_same_weights(*models):
    for value, other_value in zip(*(made.get_weights() for made in models), strict=True):
        np.testing.assert_array_equal(value, other_value)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("ranges") / "log.jsonl"


@pytest.fixture(scope="module")
def watched(path):
    """A model, trained for two epochs of six batches, and its callback."""
    watch = GradientRanges(path, every=4)
    return fit(LossScaleLogger(path, verbose=0), watch, shuffle=False), watch


def test_training_is_not_affected(watched):
    """The weights are the same to the bit as without the callback."""
    trained, _ = watched
    assert_same_weights(trained, fit(shuffle=False))
    assert int(trained.optimizer.attempted_steps) == 12


def test_snapshots_are_logged_with_their_steps(watched, path):
    """The last one is what the callback holds."""
    assert [(record.step, record.epoch) for record in snapshots(path)] == [(0, 0), (4, 0), (8, 1)]
    assert Ranges.load(path) == watched[1].last


@pytest.mark.usefixtures("watched")
def test_a_snapshot_is_the_measurement_of_its_batch(path):
    """The first one is the result of `measure_gradients` for the untrained model and the first batch."""
    expected = measure_gradients(model(), (X[:8], X[:8, :2]), batch_size=8)
    # Before the dropout, which draws other random numbers, only the number of values is the same.
    logged = snapshots(path)[0].ranges
    assert [gradient.kind for gradient in logged] == [gradient.kind for gradient in expected]
    sizes = ([gradient.zeros + gradient.nonzeros for gradient in found] for found in (logged, expected))
    np.testing.assert_array_equal(*sizes)


def test_optimizers_without_loss_scaling(tmp_path, capsys):
    """The steps are those of Keras, and each snapshot prints its advice."""
    made = fit(GradientRanges(tmp_path / "log.jsonl", every=6, verbose=1), made=model(keras.optimizers.Adam()))
    assert [record.step for record in snapshots(tmp_path / "log.jsonl")] == [0, 6]
    assert int(made.optimizer.iterations) == 12
    assert re.findall(r"step (\d+): no scale", capsys.readouterr().out) == ["0", "6"]


@pytest.mark.parametrize(
    ("arguments", "name"), [({"every": 0}, "every"), ({"verbose": -1}, "verbose"), ({"precision": "half"}, "precision")]
)
def test_invalid_arguments(arguments, name):
    """The constructor raises, not the training."""
    with pytest.raises(ValueError, match=name):
        GradientRanges(**arguments)


# Each of these trains several models.


@pytest.mark.thorough
@pytest.mark.parametrize("mode", modes({"steps_per_execution": 4}), ids=str)
def test_training_with_several_steps_per_execution(tmp_path, mode):
    """The weights are the same, and snapshots are taken before an execution."""
    trained = fit(GradientRanges(tmp_path / "log.jsonl", every=4), **mode)
    assert_same_weights(trained, fit(**mode))
    assert [record.step for record in snapshots(tmp_path / "log.jsonl")] == [0, 4, 10]
    assert int(trained.optimizer.attempted_steps) == 12


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("mode", [{}, {"steps_per_execution": 4}], ids=str)
def test_the_end_of_a_dataset_of_unknown_size_is_not_a_step(tmp_path, mode):
    """With an optimizer whose own count is one too high after each epoch."""
    path = tmp_path / "log.jsonl"
    data = tf.data.Dataset.from_tensor_slices((X, X[:, :2])).filter(lambda *_: True).batch(8)
    model("sgd", **mode).fit(data, epochs=3, shuffle=False, verbose=0, callbacks=[GradientRanges(path, every=6)])
    assert [record.step for record in snapshots(path)] == [0, 6, 12]


@pytest.mark.slow
def test_a_continued_run_appends_and_a_new_run_replaces(tmp_path):
    """By the steps of the optimizer, in either order of the callbacks that write the log."""
    path = tmp_path / "log.jsonl"
    made = fit(GradientRanges(path, every=3), LossScaleLogger(path, verbose=0), epochs=1)
    fit(LossScaleLogger(path, verbose=0), GradientRanges(path, every=3), made=made, epochs=1)
    assert [record.step for record in snapshots(path)] == [0, 3, 6, 9]
    assert sum(isinstance(record, records.RunRecord) for record in records.read_log(path)) == 2
    fit(GradientRanges(path, every=3), epochs=1)
    assert [record.step for record in snapshots(path)] == [0, 3]


@pytest.mark.slow
def test_an_interrupted_fit_leaves_no_patch():
    """The next one measures each batch once, and at its end the model has Keras's own function."""

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


@pytest.mark.thorough
def test_two_precisions_are_measured_side_by_side(tmp_path):
    """In float32 and in float16, at different steps, with one log."""
    path = tmp_path / "log.jsonl"
    keras.config.set_dtype_policy("mixed_float16")
    made = fit(GradientRanges(path, every=4), GradientRanges(path, every=6, precision="float16"))
    found = [(record.step, record.precision) for record in snapshots(path)]
    assert found == [(0, "float32"), (0, "float16"), (4, "float32"), (6, "float16"), (8, "float32")]
    assert {gradient.dtype for gradient in snapshots(path)[1].ranges} >= {"float16"}
    assert "make_train_function" not in vars(made)


@pytest.mark.thorough
@needs_tensorflow
def test_batches_of_unknown_size_are_not_traced_again():
    """The weights are the same to the bit."""
    trained = []
    for callbacks in ([], [GradientRanges(every=2)]):
        data = tf.data.Dataset.from_tensor_slices((X, X[:, :2])).batch(8).repeat()
        made = model()
        made.fit(data, steps_per_epoch=10, shuffle=False, verbose=0, callbacks=callbacks)
        trained.append(made)
    assert_same_weights(*trained)


@pytest.mark.thorough
def test_all_batches_of_a_generator_are_trained(tmp_path):
    """No batch is lost at its end, and none is trained twice."""
    path = tmp_path / "log.jsonl"

    def batches():
        yield from ((X[i : i + 8], X[i : i + 8, :2]) for i in range(0, 40, 8))

    made = model()
    with pytest.warns(UserWarning, match="ran out of data"):
        made.fit(batches(), steps_per_epoch=7, shuffle=False, verbose=0, callbacks=[GradientRanges(path, every=1)])
    assert [record.step for record in snapshots(path)] == [0, 1, 2, 3, 4]
    assert int(made.optimizer.attempted_steps) == 5


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize("count", [1, 2])
def test_training_of_replicas_is_not_affected(count):
    """Under `MirroredStrategy`, the batch of the first replica is measured."""
    from replicas import mirrored

    trained = []
    for callbacks in ([], [GradientRanges(every=2)]):
        strategy = mirrored(count)
        with strategy.scope():
            made = model()
        data = tf.data.Dataset.from_tensor_slices((X[:40], X[:40, :2])).batch(8)
        options = tf.distribute.InputOptions(experimental_fetch_to_device=False)
        distributed = strategy.experimental_distribute_dataset(data, options)
        made.fit(distributed, shuffle=False, verbose=0, callbacks=callbacks)
        trained.append(made)
    assert_same_weights(*trained)
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


@pytest.mark.slow
@needs_tensorflow
def test_several_workers_are_refused():
    """The error names `measure_gradients`."""
    cluster = {"cluster": {"worker": ["localhost:29431"]}, "task": {"type": "worker", "index": 0}}
    environment = {**os.environ, "TF_CONFIG": json.dumps(cluster)}
    run = subprocess.run(
        [sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "measure_gradients" in run.stdout


@pytest.mark.slow
@needs_tensorflow
def test_tensorboard_has_histograms_and_scalars(tmp_path):
    """TensorBoard's own reader finds one bucket per octave, and Keras's own events are there too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = GradientRanges(tensorboard=tmp_path, every=6)
    fit(watch, keras.callbacks.TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path / "gradients"), size_guidance={"tensors": 0})
    events.Reload()
    assert len(list((tmp_path / "gradients").iterdir())) == 1
    assert list((tmp_path / "train").glob("events*"))
    kernel = next(gradient for gradient in watch.last if gradient.name.endswith("kernel"))
    first, last = events.Tensors(f"gradients/weight/{kernel.name}")
    assert (first.step, last.step) == (0, 6)
    rows = tf.make_ndarray(last.tensor_proto)
    assert rows[:, 2].sum() == kernel.nonzeros
    assert {(left, right): count for left, right, count in rows.tolist()} == {
        (float(octave), octave + 1.0): float(sum(parts)) for octave, parts in kernel.octaves.items()
    }
    assert events.SummaryMetadata(f"gradients/weight/{kernel.name}").plugin_data.plugin_name == "histograms"
    largest = tf.make_ndarray(events.Tensors("gradients/largest")[-1].tensor_proto)
    assert largest == pytest.approx(max(gradient.largest for gradient in watch.last))
