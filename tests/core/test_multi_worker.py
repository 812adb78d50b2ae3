"""Several workers in real processes, and `enable_multi_worker_fit`."""

from __future__ import annotations

import csv
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import workers
from replicas import KINDS, PLACES, STEPS, Trainer, bad_values, check, data
from thorough import thorough

from tfmixed import records, scaling
from tfmixed.distribute import enable_multi_worker_fit

slow = pytest.mark.slow


def check_equal(outcomes):
    """Checks that all workers have the same weights, state and events."""
    first, *rest = outcomes
    for outcome in rest:
        for ours, theirs in zip(first.weights + first.state, outcome.weights + outcome.state, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
        assert outcome.events == first.events


def test_one_worker_without_tf_config(monkeypatch):
    """`MultiWorkerMirroredStrategy` in this process: one step overflows, and the others are applied."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    trainer = Trainer(tf.distribute.MultiWorkerMirroredStrategy())
    steps = STEPS["middle"]
    outcome = trainer.loop(bad_values(steps, PLACES["all"], KINDS["nan"], 1))
    check(outcome, steps)
    outcome.assert_same_weights(trainer.loop(bad_values(steps, PLACES["all"], KINDS["nan"], 1), drop=True))


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=thorough)])
def worked(request, tmp_path_factory):
    """Returns the results of all workers, and their folder."""
    folder = tmp_path_factory.mktemp("workers")
    return workers.run(request.param, "worker.py", folder=folder), folder


@slow
def test_an_overflow_on_any_worker_is_skipped_by_all(worked):
    """In a loop with `strategy.run` in real processes. Nothing hangs (K4), and all have the same weights."""
    results = [result["loop"] for result in worked[0]]
    for place, kind, when in itertools.product(("first", "last", "all"), KINDS, STEPS):
        outcomes = [result[place, kind, when] for result in results]
        check_equal(outcomes)
        check(outcomes[0], STEPS[when])
        outcomes[0].assert_same_weights(results[0]["dropped", when])
    check(results[0]["none",], [])


@slow
def test_inner_optimizers_that_clip_and_average(worked):
    """Their state is that of a run without the bad steps."""
    results = [result["inner_optimizers"] for result in worked[0]]
    for name, (outcome, dropped) in results[0].items():
        check_equal([result[name][0] for result in results])
        outcome.assert_sound()
        outcome.assert_same_weights(dropped)


@slow
def test_a_scaler_skips_on_all_workers(worked):
    """If the last one overflows, with update inside and outside of `strategy.run`."""
    results = [result["scaler"] for result in worked[0]]
    rule = scaling.DynamicScale(initial_scale=8.0, growth_interval=2)
    for way in itertools.product((False, True), repeat=2):
        steps, scales, weights, events = results[0][way]
        assert all(result[way] == results[0][way] for result in results)
        assert steps == [letter == "T" for letter in "TTFTFFTTT"]
        assert scales == scaling.simulate(rule, "TTFTFFTTT")
        np.testing.assert_allclose(weights, [0.4, 1.4], rtol=1e-4)
        assert [event.step for event in events if event.variable == "w"] == [2, 4, 5]
    assert [result["chief"] for result in results] == [True, *([False] * (len(results) - 1))]


def alone(count, bad, **arguments):
    """Trains in one process on the same global batches."""
    trainer = Trainer(None, local_batches=count, metrics=["mae"])
    x, y = flat(data(count, bad))
    history = trainer.model.fit(x, y, batch_size=4 * count, shuffle=False, verbose=0, epochs=2, **arguments).history
    return trainer, history


def flat(arrays):
    return [array.reshape(-1, array.shape[-1]) for array in arrays]


@pytest.fixture
def fitted(worked):
    """Returns the number of workers, their results of `Model.fit`, and their folder."""
    results, folder = worked
    return len(results), [result["fit"] for result in results], folder


@slow
@pytest.mark.parametrize("steps_per_execution", [1, 5])
def test_fit_on_workers_is_fit_in_one_process(fitted, steps_per_execution):
    """Losses, metrics, validation and evaluation, with overflows on the last worker in two steps of an epoch."""
    count, results, folder = fitted
    bad = bad_values([3, 7], [-1], np.inf, count)
    x, y = flat(data(count, bad))
    trainer, wanted = alone(count, bad, validation_data=(x[-20:], y[-20:]))
    for history, evaluation, outcome in (result[steps_per_execution] for result in results):
        for name in ("val_loss", "val_mae"):
            np.testing.assert_allclose(history[name], wanted[name], rtol=1e-5)
        np.testing.assert_allclose(evaluation, trainer.model.evaluate(x[-20:], y[-20:], verbose=0), rtol=1e-5)
        assert (history["skipped_steps"], outcome.skipped, outcome.attempted) == ([2.0, 4.0], 4, 56)
        outcome.assert_sound()
    check_equal([result[steps_per_execution][2] for result in results])
    log = records.read_changes(folder / f"log_{steps_per_execution}.jsonl")
    assert [event.step for event in log if event.reason == "overflow"] == [3, 7, 31, 35]
    for rank in range(count):
        rows = csv.DictReader((folder / f"{rank}_{steps_per_execution}.csv").read_text().splitlines())
        assert [row["loss_scale"] for row in rows] == ["4096.0", "16384.0"]


@slow
def test_a_sharded_dataset_gives_the_losses_of_one_process(fitted):
    """Each worker takes its share of the global batches of `tf.data`."""
    count, results, _ = fitted
    _, wanted = alone(count, {})
    for history, evaluation, _ in (result["sharded"] for result in results):
        np.testing.assert_allclose(history["loss"], wanted["loss"], rtol=1e-5)
        np.testing.assert_allclose(history["mae"], wanted["mae"], rtol=1e-5)
        assert np.isfinite(evaluation).all()


@slow
def test_a_batch_smaller_than_the_number_of_workers(fitted):
    """It leaves a worker without data, and the step counts."""
    _, results, _ = fitted
    for history, evaluation, outcome in (result["partial"] for result in results):
        assert np.isfinite(history["loss"] + evaluation).all()
        assert outcome.skipped == 0
        outcome.assert_sound()
    check_equal([result["partial"][2] for result in results])


@slow
def test_the_end_of_a_dataset_of_unknown_length_is_not_a_step(fitted):
    """In a loop of several steps too."""
    _, results, _ = fitted
    check_equal([result["unknown"] for result in results])
    outcome = results[0]["unknown"]
    assert (outcome.attempted, outcome.skipped, outcome.iterations) == (56, 4, 52)
    assert [event.step for event in outcome.events if event.reason == "overflow"] == [3, 7, 31, 35]


@slow
def test_a_metric_outside_of_the_scope_is_an_error(fitted):
    """Its value would differ between workers, and callbacks that read it would make them diverge."""
    _, results, _ = fitted
    for result in results:
        assert "strategy.scope()" in result["stray"]
        assert "stray/total" in result["stray"]


@slow
def test_keras_has_not_fixed_fit_on_workers(fitted):
    """If this fails, `enable_multi_worker_fit` can be removed (keras#20585)."""
    _, results, _ = fitted
    for result in results:
        assert "Attempt to convert a value (PerReplica" in result["undone"]


def test_enabling_changes_keras_and_undoing_restores_it():
    """Enabling twice is the same as once, and it can be enabled again after it was undone."""
    from keras.src.backend.tensorflow import trainer

    def patched():
        kind = trainer.TensorFlowTrainer
        return [kind._maybe_symbolic_build, kind._make_function, trainer.reduce_per_replica]

    before = patched()
    undo = enable_multi_worker_fit()
    assert enable_multi_worker_fit() is undo
    assert not set(before) & set(patched())
    undo()
    assert patched() == before
    again = enable_multi_worker_fit()
    assert not set(before) & set(patched())
    again()


def test_an_unknown_keras_is_unchanged(monkeypatch):
    """With a warning. The returned function does nothing."""
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    with pytest.warns(UserWarning, match=r"3\.99\.0"):
        enable_multi_worker_fit()()


@slow
def test_fit_on_one_device_is_unchanged(monkeypatch):
    """Other strategies use Keras's own loop."""
    monkeypatch.setattr("tfmixed._core.multi_worker_fit._run_steps", None)
    undo = enable_multi_worker_fit()
    try:
        check(Trainer(tf.distribute.OneDeviceStrategy("CPU:0"), steps_per_execution=4).fit({}), [])
    finally:
        undo()
