"""A training process that can be killed at any time: `resumable.py [low_precision_]checkpoint|backup FOLDER EPOCHS`.

Started again with the same arguments it goes on where its last checkpoint stands. Writes the log of the scale, and the
state after each epoch into `FOLDER/epochs/`.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tfmixed

STEPS = 12
LOW_PRECISION = sys.argv[1:] and sys.argv[1].startswith("low_precision")


class Checkpoint(keras.callbacks.Callback):
    """Saves model, optimizer and epoch with TensorFlow's CheckpointManager, which writes whole files only."""

    def __init__(self, folder, model):
        super().__init__()
        self.epoch = tf.Variable(0)
        everything = tf.train.Checkpoint(model=model, optimizer=model.optimizer, epoch=self.epoch)
        self.manager = tf.train.CheckpointManager(everything, folder, max_to_keep=2)
        self.manager.restore_or_initialize()

    def on_epoch_end(self, epoch, logs=None):
        self.epoch.assign(epoch + 1)
        self.manager.save()


class Notes(keras.callbacks.Callback):
    """Notes that training begins, and the state after each epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_begin(self, epoch, logs=None):
        (self.folder / "training").touch()

    def on_epoch_end(self, epoch, logs=None):
        (self.folder / "epochs").mkdir(exist_ok=True)
        # What has been logged, and when the device was last asked, is the logger's; the rest is the run's.
        variables = [*self.model.trainable_variables, *self.model.optimizer.variables]
        state = {f"{number} {each.name}": each.numpy() for number, each in enumerate(variables)}
        state = {name: value for name, value in state.items() if "drained" not in name}
        (self.folder / "epochs" / f"{epoch}.pickle").write_bytes(pickle.dumps(state))


def restored_backup(folder):
    """Returns whether Keras's backup was torn: killed between its two files. The pair before them is whole."""
    metadata, weights = folder / "training_metadata.json", folder / "latest.weights.h5"
    if not weights.exists():
        return False
    try:
        epoch = json.loads(metadata.read_text())["epoch"]
        probe = build()
        probe.load_weights(weights)
        if int(probe.optimizer.attempted_steps) == epoch * STEPS:
            return False
    except (OSError, ValueError, KeyError):
        pass
    for file in (metadata, weights):
        before = file.with_name(file.name + ".bkp")
        if before.exists():
            shutil.copy(before, file)
        else:
            file.unlink(missing_ok=True)
    return True


def build():
    keras.utils.set_random_seed(0)
    inner, units, dtype = keras.optimizers.Adam(0.01), 8, "float32"
    if LOW_PRECISION:
        inner, units, dtype = tfmixed.LowPrecisionOptimizer(inner, states="int8"), 1024, "bfloat16"
    hidden, last = keras.layers.Dense(units, "tanh", dtype=dtype), keras.layers.Dense(1, dtype=dtype)
    model = keras.Sequential([keras.Input((4,)), hidden, last])
    rule = tfmixed.DynamicScale(initial_scale=2.0**12, growth_interval=5)
    model.compile(tfmixed.LossScaleOptimizer(inner, rule), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def main(how, folder, epochs):
    x = np.random.default_rng(0).normal(size=(STEPS * 8, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    x[3 * 8] = x[9 * 8 + 1] = np.inf
    model = build()
    logger = tfmixed.callbacks.LossScaleLogger(folder / "scale.jsonl", verbose=0)
    if how.endswith("checkpoint"):
        keeper = Checkpoint(folder / "checkpoint", model)
        first = int(keeper.epoch)
    else:
        if restored_backup(folder / "backup"):
            with (folder / "torn").open("a") as file:
                file.write("x")
        keeper, first = keras.callbacks.BackupAndRestore(folder / "backup", double_checkpoint=True), 0
    callbacks = [logger, keeper] if epochs % 2 else [keeper, logger]
    model.fit(
        x, y, batch_size=8, shuffle=False, verbose=0, epochs=epochs, initial_epoch=first,
        callbacks=[Notes(folder), *callbacks],
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
