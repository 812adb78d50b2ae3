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


def train(states):
    """Trains four steps with gradients that differ between workers, and returns what they end with."""
    with STRATEGY.scope():
        start = np.random.default_rng(0).normal(size=(80, 64))
        own = [keras.Variable(start, dtype="float32", name="kernel")]
        inner = tfmixed.LowPrecisionOptimizer(keras.optimizers.Adam(0.01), states=states)
        optimizer = tfmixed.LossScaleOptimizer(inner, 16)
        optimizer.build(own)
    optimizer.scale_loss(0.0)

    @tf.function
    def step(gradient):
        STRATEGY.run(lambda: optimizer.apply([gradient], own))

    for number in range(5):
        gradient = tf.random.stateless_normal((80, 64), (number, RANK)) * 16
        step(gradient * (np.nan if number == 2 and RANK == 1 else 1))
    return {"iterations": int(inner.iterations.numpy()), "values": [v.numpy() for v in [*own, *inner.variables]]}


def refusal(states):
    """Returns the message about states that workers cannot have."""
    try:
        train(states)
    except NotImplementedError as error:
        return str(error)


if __name__ == "__main__":
    result = {**train("float32"), "refusals": [refusal(states) for states in ("bfloat16", "int8")]}
    (Path(sys.argv[1]) / f"{RANK}.pickle").write_bytes(pickle.dumps(result))
