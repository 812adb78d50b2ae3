"""Trains on the digits with real worker processes; an overflow on one of them makes all skip the step together.

    python examples/multi_worker.py [--workers 2] [--loop] [--kill] [--epochs 6]

Started plainly it is the supervisor: it starts the workers on this machine, starts all of them again where one dies,
and compares their weights at the end. Where TF_CONFIG is set it is one of the workers; on a cluster, set that on each
host and start one process there, or build the strategy with `tf.distribute.cluster_resolver.SlurmClusterResolver()`.
`--loop` trains in a loop with `strategy.run` instead of `Model.fit`. `--kill` kills the last worker in the third epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BATCH = 48  # global
BAD_STEP = 7


def work(arguments: argparse.Namespace) -> None:
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before the first tensor
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    import tfmixed

    rank, workers = strategy.cluster_resolver.task_id, strategy.num_replicas_in_sync
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32")[: len(images) // BATCH * BATCH] / 16
    images[BAD_STEP * BATCH + (workers - 1) * BATCH // workers] = np.inf  # the last worker's share of that batch
    data = tf.data.Dataset.from_tensor_slices((images, labels[: len(images)])).batch(BATCH)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]
        model = keras.Sequential([keras.Input((64,)), *layers, tfmixed.layers.Softmax()])
        optimizer = tfmixed.LossScaleOptimizer(keras.optimizers.Adam(5e-3))
        model.compile(optimizer, loss="sparse_categorical_crossentropy")
        optimizer.build(model.trainable_variables)

    if arguments.loop:
        loop(strategy, model, data, arguments.epochs)
    else:
        fit(model, data, rank, arguments)
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()[:12]
    accuracy = (model(images[:336]).numpy().argmax(axis=1) == labels[:336]).mean()  # before the bad image
    print(
        f"worker {rank}: weights {digest}, accuracy {accuracy:.1%}, scale {float(optimizer.loss_scale):g}, "
        f"{int(optimizer.skipped_steps)} of {int(optimizer.attempted_steps)} steps skipped",
        flush=True,
    )


def fit(model, data, rank, arguments) -> None:
    import keras

    import tfmixed

    tfmixed.distribute.enable_multi_worker_fit()
    # The workers hold the same weights: the first one writes them, and all read them when they are started again.
    backup = keras.callbacks.BackupAndRestore(
        arguments.run_dir / "backup",
        save_freq="epoch" if rank == 0 else 2**31,
        delete_checkpoint=rank == 0,
        double_checkpoint=True,
    )
    logger = tfmixed.callbacks.LossScaleLogger(arguments.run_dir / "loss_scale.jsonl", verbose=0)
    last = rank == model.distribute_strategy.num_replicas_in_sync - 1
    victim = arguments.kill and last and not (arguments.run_dir / "killed").exists()
    model.fit(
        data,
        epochs=arguments.epochs,
        shuffle=False,
        verbose=2 if rank == 0 else 0,
        callbacks=[backup, logger, *([kill_in_third_epoch(arguments.run_dir)] if victim else [])],
    )


def kill_in_third_epoch(run_dir: Path):
    import keras

    def kill(epoch: int, _: dict) -> None:
        if epoch == 2:
            (run_dir / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return keras.callbacks.LambdaCallback(on_epoch_begin=kill)


def loop(strategy, model, data, epochs: int) -> None:
    import keras
    import tensorflow as tf

    objective, optimizer = keras.losses.SparseCategoricalCrossentropy(reduction="sum"), model.optimizer

    @tf.function
    def step(x, y):
        def of_replica(x, y):
            with tf.GradientTape() as tape:
                scaled = optimizer.scale_loss(objective(y, model(x, training=True)) / BATCH)
            gradients = tape.gradient(scaled, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        strategy.run(of_replica, args=(x, y))

    for _ in range(epochs):
        for x, y in strategy.experimental_distribute_dataset(data):
            step(x, y)
        optimizer.raise_if_exhausted()


def supervise(arguments: argparse.Namespace) -> int:
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        begin = time.monotonic()
        codes = run_workers(arguments.workers)
        print(f"attempt {attempt + 1}: exit codes {codes} after {time.monotonic() - begin:.0f} s", flush=True)
        if not any(codes):
            return 0
    return 1


def run_workers(count: int) -> list[int]:
    """Starts this script once a worker and waits for all: where one dies, TensorFlow ends the others."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    processes = []
    for rank in range(count):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "TF_CONFIG": json.dumps(task)}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    try:
        return [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loop", action="store_true", help="train in a loop with strategy.run")
    parser.add_argument("--kill", action="store_true", help="kill the last worker in the third epoch of fit")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/multi_worker"), help="log and backup of fit")
    arguments = parser.parse_args()
    return work(arguments) if "TF_CONFIG" in os.environ else supervise(arguments)


if __name__ == "__main__":
    sys.exit(main())
