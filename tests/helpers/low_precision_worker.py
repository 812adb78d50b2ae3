"""Worker process of `core/test_low_precision_tensorflow.py`: `low_precision_worker.py FOLDER`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import tensorflow as tf

STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()  # before the first tensor

import keras  # noqa: E402
import numpy as np  # noqa: E402

import tfmixed  # noqa: E402

RANK = STRATEGY.cluster_resolver.task_id


def train(weights, states):
    """Trains four steps with gradients that differ between workers, and returns what they end with."""
    with STRATEGY.scope():
        start = np.random.default_rng(0).normal(size=(80, 64))
        own = [keras.Variable(start, dtype="bfloat16", name="kernel")]
        inner = tfmixed.LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states)
        optimizer = tfmixed.LossScaleOptimizer(inner, 16)
        optimizer.build(own)
    optimizer.scale_loss(0.0)

    @tf.function
    def step(gradient):
        STRATEGY.run(lambda: optimizer.apply([gradient], own))

    for number in range(5):
        gradient = tf.random.stateless_normal((80, 64), (number, RANK)) * 16
        step(tf.cast(gradient * (np.nan if number == 2 and RANK == 1 else 1), "bfloat16"))
    values = [variable.numpy() for variable in [*own, *inner.variables]]
    values = [value.view("uint8") if value.dtype.kind not in "iufb" else value for value in values]
    return {"iterations": int(inner.iterations.numpy()), "values": values}


if __name__ == "__main__":
    forms = (("stochastic", "int8"), ("split", "bfloat16"), ("stochastic", "bfloat16"))
    results = [train(*form) for form in forms]
    (Path(sys.argv[1]) / f"{RANK}.pickle").write_bytes(pickle.dumps(results))
