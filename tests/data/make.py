"""Writes one of each file that a version of tfmixed leaves behind, for `tests/records/test_old_files.py`.

    python tests/data/make.py 0.1.0

Run it with the version that is named, once, when that version is released. TensorFlow backend.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tfmixed
from tfmixed.compat import experimental, v1

FOLDER = Path(__file__).parent / sys.argv[1]
X, Y = np.linspace(-1, 1, 32, dtype="float32").reshape(8, 4), np.arange(8) % 3


def train(optimizer, path):
    """Trains a small model in half precision, and saves it."""
    with tfmixed.policy_scope("mixed_bfloat16"):
        hidden = keras.layers.Dense(4, "relu")
        layers = [keras.Input((4,)), hidden, keras.layers.LayerNormalization(), keras.layers.Dense(3)]
        layers.insert(3, tfmixed.layers.Float32(keras.layers.Dense(4)))
        model = keras.Sequential(layers)
    tfmixed.force_float32(model)
    model.compile(optimizer, tfmixed.losses.SparseCategoricalCrossentropy())
    logger = tfmixed.callbacks.LossScaleLogger(path.with_suffix(".jsonl"))
    ranges = tfmixed.callbacks.GradientRanges(path.with_suffix(".ranges.jsonl"))
    model.fit(X, Y, epochs=4, batch_size=4, verbose=0, shuffle=False, callbacks=[logger, ranges])
    model.save(path)
    model.save_weights(path.with_suffix(".weights.h5"))
    return model


def scaler_state():
    """Returns the state dictionary of a `GradScaler` after an overflow and a step."""
    scaler, optimizer, weight = tfmixed.GradScaler(init_scale=8.0), keras.optimizers.SGD(1.0), keras.Variable(1.0)
    for gradient in (float("inf"), 4.0):
        scaler.step(optimizer, [(tf.constant(gradient), weight)])
        scaler.update()
    return scaler.state_dict()


def tf1_checkpoint(path):
    """Trains a weight in a graph with the TensorFlow 1 optimizer, and saves it."""
    with tf.Graph().as_default():
        weight = tf.compat.v1.get_variable("weight", initializer=1.0)
        optimizer = v1.LossScaleOptimizer(tf.compat.v1.train.AdamOptimizer(0.5), v1.DynamicLossScale(64.0))
        step = optimizer.minimize(weight**2)
        saver = tf.compat.v1.train.Saver()
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            session.run(step)
            saver.save(session, str(path), write_meta_graph=False)
            return float(session.run(weight))


def main():
    """Writes the files and `expected.json`, which says what is in them."""
    FOLDER.mkdir(parents=True)
    keras.utils.set_random_seed(0)
    model = train(
        tfmixed.LossScaleOptimizer("adam", initial_scale=2.0**125, dynamic_growth_steps=2, event_capacity=8),
        FOLDER / "model.keras",
    )
    old_style = train(experimental.LossScaleOptimizer("sgd", "dynamic"), FOLDER / "keras2.keras")
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(FOLDER / "checkpoint"))
    state = scaler_state()
    expected = {
        "outputs": model.predict(X, verbose=0).tolist(),
        "optimizer": [np.asarray(each).tolist() for each in model.optimizer.variables],
        "scale": float(model.optimizer.loss_scale),
        "keras2_outputs": old_style.predict(X, verbose=0).tolist(),
        "scaler": state,
        "tf1_weight": tf1_checkpoint(FOLDER / "tf1"),
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
