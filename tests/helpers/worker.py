"""Worker process of `core/test_multi_worker.py`: `worker.py FOLDER`."""

from __future__ import annotations

import itertools
import pickle
import sys
from pathlib import Path

import tensorflow as tf

STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()  # before the first tensor

import keras  # noqa: E402
import numpy as np  # noqa: E402
from replicas import KINDS, PLACES, STEPS, Trainer, bad_values, data  # noqa: E402

import tfmixed  # noqa: E402
from tfmixed._core import replica_sync  # noqa: E402

RANK, WORKERS = STRATEGY.cluster_resolver.task_id, STRATEGY.num_replicas_in_sync


def loop(_folder):
    """Returns the outcomes of all patterns of overflows, and of runs without the bad steps."""
    trainer, local = Trainer(STRATEGY), range(RANK, RANK + 1)
    outcomes = {("none",): trainer.loop({}, workers=local)}
    for place, kind, when in itertools.product(("first", "last", "all"), KINDS, STEPS):
        bad = bad_values(STEPS[when], PLACES[place], KINDS[kind], WORKERS)
        outcomes[place, kind, when] = trainer.loop(bad, workers=local)
        if ("dropped", when) not in outcomes:
            outcomes["dropped", when] = trainer.loop(bad, drop=True, workers=local)
    return outcomes


def inner_optimizers(_folder):
    """Returns outcomes with inner optimizers that clip and average."""
    local, bad = range(RANK, RANK + 1), bad_values([4, 9], [-1], np.nan, WORKERS)
    kinds = {
        "ema": {"use_ema": True, "ema_momentum": 0.5},
        "clipnorm": {"global_clipnorm": 0.1},
        "clipvalue": {"clipvalue": 0.01},
    }
    trainers = {
        name: Trainer(STRATEGY, lambda arguments=arguments: keras.optimizers.SGD(0.1, **arguments))
        for name, arguments in kinds.items()
    }
    return {
        name: [trainer.loop(bad, drop=drop, workers=local) for drop in (False, True)]
        for name, trainer in trainers.items()
    }


def fit(folder):
    """Returns histories, evaluations and outcomes of `Model.fit` with several kinds of data and callbacks."""
    undo = tfmixed.distribute.enable_multi_worker_fit()
    bad = bad_values([3, 7], [-1], np.inf, WORKERS)
    x, y = (array.reshape(-1, array.shape[-1]) for array in data(WORKERS, bad))
    results = {}
    for steps in (1, 5):
        trainer = Trainer(STRATEGY, metrics=["mae"], steps_per_execution=steps)
        callbacks = [
            tfmixed.callbacks.LossScaleLogger(folder / f"log_{steps}.jsonl", verbose=0),  # one file for all workers
            keras.callbacks.CSVLogger(folder / f"{RANK}_{steps}.csv"),
        ]
        outcome = trainer.fit(bad, validation_data=(x[-20:], y[-20:]), callbacks=callbacks, epochs=2)
        evaluation = trainer.model.evaluate(x[-20:], y[-20:], batch_size=8, verbose=0)
        results[steps] = (trainer.model.history.history, evaluation, outcome)
    clean_x, clean_y = (array.reshape(-1, array.shape[-1]) for array in data(WORKERS, {}))
    for name, source in {
        "sharded": tf.data.Dataset.from_tensor_slices((clean_x, clean_y)).batch(4 * WORKERS),
        "partial": tf.data.Dataset.from_tensor_slices((clean_x, clean_y)).batch(4 * WORKERS + 3),
    }.items():
        trainer = Trainer(STRATEGY, metrics=["mae"])
        history = trainer.model.fit(source, epochs=2, verbose=0).history
        results[name] = (history, trainer.model.evaluate(source, verbose=0), trainer.outcome())
    unknown = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(4 * WORKERS)
    trainer = Trainer(STRATEGY, steps_per_execution=3)
    trainer.model.fit(unknown, epochs=2, verbose=0, shuffle=False)
    results["unknown"] = trainer.outcome()
    trainer = Trainer(STRATEGY)
    stray = keras.metrics.MeanAbsoluteError(name="stray")
    with STRATEGY.scope():
        trainer.model.compile(trainer.optimizer, loss="mse", metrics=[stray])
    try:
        trainer.fit({})
    except ValueError as error:
        results["stray"] = str(error)
    undo()
    try:
        Trainer(STRATEGY).fit({})
    except ValueError as error:
        results["undone"] = str(error)
    return results


def scaler(_folder):
    """Returns weights, scales and events of loops with a `GradScaler` that overflows on the last worker only."""
    results = {}
    for unscales, outside in itertools.product((False, True), repeat=2):
        with STRATEGY.scope():
            weight, optimizer = keras.Variable([1.0, 2.0], name="w"), keras.optimizers.Adam(0.1)
        scaler = tfmixed.GradScaler(rule=tfmixed.DynamicScale(initial_scale=8.0, growth_interval=2))

        def replica_step(value, weight=weight, optimizer=optimizer, scaler=scaler, unscales=unscales, outside=outside):
            grads = [scaler.scale(tf.stack([value, 1.0]))]
            grads = [tf.clip_by_value(grad, -1, 1) for grad in scaler.unscale(optimizer, grads)] if unscales else grads
            stepped = scaler.step(optimizer, zip(grads, [weight], strict=True))
            if not outside:
                scaler.update()
            return stepped

        step = tf.function(lambda value, replica_step=replica_step: STRATEGY.run(replica_step, (value,)))
        steps, scales = [], []
        for letter in "TTFTFFTTT":
            steps.append(bool(step(tf.constant(np.inf if letter == "F" and RANK == WORKERS - 1 else 1.0))))
            if outside:
                scaler.update()
            scales.append(scaler.get_scale())
        results[unscales, outside] = (steps, scales, weight.numpy().tolist(), scaler.drain_events())
        results["chief"] = replica_sync.is_chief(scaler)
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = {function.__name__: function(folder) for function in (loop, inner_optimizers, scaler, fit)}
    (folder / f"{RANK}.pickle").write_bytes(pickle.dumps(result))
