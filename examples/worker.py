"""Trains on digits as one of several workers. An overflow on one worker makes all of them skip the step.

`multi_worker.py` starts it on one machine. On a cluster, start it once on each host with TF_CONFIG set, or create the
strategy with `tf.distribute.cluster_resolver.SlurmClusterResolver()`.
"""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import tfmixed

BATCH, BAD_STEP = 48, 7  # the global batch size, and the step that overflows
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--loop", action="store_true", help="train with strategy.run")
parser.add_argument("--die", action="store_true", help="kill this worker in the third epoch of fit")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--run-dir", type=Path, default=Path("runs/multi_worker"), help="log and backup of fit")


def fit(model, data, first, arguments):
    tfmixed.distribute.enable_multi_worker_fit()
    folder, saves = str(arguments.run_dir / "backup"), "epoch" if first else 2**31
    # All workers have the same weights. The first one writes them, and all read them after a restart.
    backup = keras.callbacks.BackupAndRestore(folder, saves, delete_checkpoint=first, double_checkpoint=True)
    callbacks = [backup, tfmixed.callbacks.LossScaleLogger(arguments.run_dir / "loss_scale.jsonl", verbose=0)]
    if arguments.die:
        die = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, _: epoch == 2 and os.kill(os.getpid(), signal.SIGKILL)
        )
        callbacks.append(die)
    model.fit(data, epochs=arguments.epochs, shuffle=False, verbose=2 if first else 0, callbacks=callbacks)


def loop(model, data, strategy, epochs):
    objective = keras.losses.SparseCategoricalCrossentropy(reduction="sum")

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            scaled = model.optimizer.scale_loss(objective(y, model(x, training=True)) / BATCH)
        model.optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)

    step = tf.function(lambda x, y: strategy.run(replica_step, args=(x, y)))
    for _ in range(epochs):
        for x, y in strategy.experimental_distribute_dataset(data):
            step(x, y)
        model.optimizer.raise_if_exhausted()


def main():
    arguments, strategy = parser.parse_args(), tf.distribute.MultiWorkerMirroredStrategy()  # before the first tensor
    rank, workers = strategy.cluster_resolver.task_id, strategy.num_replicas_in_sync
    x, y = (array[: 37 * BATCH] for array in load_digits(return_X_y=True))
    x = x.astype("float32") / 16
    x[BAD_STEP * BATCH + (workers - 1) * BATCH // workers] = np.inf  # in the last worker's part of that batch
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(10), tfmixed.layers.Softmax()]
        model = keras.Sequential([keras.Input((64,)), *layers])
        optimizer = tfmixed.LossScaleOptimizer(keras.optimizers.Adam(5e-3))
        model.compile(optimizer, loss="sparse_categorical_crossentropy")
        optimizer.build(model.trainable_variables)
    loop(model, data, strategy, arguments.epochs) if arguments.loop else fit(model, data, rank == 0, arguments)
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()[:12]
    accuracy = (model(x[: BAD_STEP * BATCH]).numpy().argmax(axis=1) == y[: BAD_STEP * BATCH]).mean()
    skipped = f"{int(optimizer.skipped_steps)} of {int(optimizer.attempted_steps)} steps skipped"
    print(f"worker {rank}: weights {digest}, accuracy {accuracy:.1%}, scale {float(optimizer.loss_scale):g}, {skipped}")


if __name__ == "__main__":
    main()
