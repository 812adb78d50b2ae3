"""Times the hooks of `LossScaleLogger` and the training step, on dense networks.

    python benchmarks/logger_cost.py      # three widths, a minute

Two runs with and without the logger differ less than two equal runs, so the hooks are timed instead. Keras runs those
after a batch in a callback thread, and those of epochs in the training thread.
"""

from __future__ import annotations

import time

import keras
import numpy
from rich.console import Console
from rich.table import Table

from tfmixed import LossScaleOptimizer
from tfmixed.callbacks import LossScaleLogger

BATCH, EPOCHS = 64, 5


class Timed(LossScaleLogger):
    """Adds up the seconds of its hooks and of the epochs."""

    def __init__(self):
        super().__init__(verbose=0)
        self.batches = self.ends = self.epochs = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()
        super().on_epoch_begin(epoch, logs)
        self.ends += time.perf_counter() - self.start

    def on_train_batch_end(self, batch, logs=None):
        start = time.perf_counter()
        super().on_train_batch_end(batch, logs)
        self.batches += time.perf_counter() - start

    def on_epoch_end(self, epoch, logs=None):
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        end = time.perf_counter()
        self.ends += end - start
        self.epochs += end - self.start


def main() -> None:
    table = Table("width", "ms a step", "us a batch", "us an epoch", "share", title="LossScaleLogger(verbose=0)")
    for width, steps in ((64, 1500), (512, 300), (2048, 60)):
        hidden = [keras.layers.Dense(width, activation="relu") for _ in range(4)]
        model = keras.Sequential([keras.Input((width,)), *hidden, keras.layers.Dense(1)])
        model.compile(LossScaleOptimizer("adam"), loss="mse")
        x = numpy.random.default_rng(0).normal(size=(steps * BATCH, width)).astype("float32")
        fit = {"batch_size": BATCH, "verbose": 0, "shuffle": False}
        model.fit(x[: 5 * BATCH], x[: 5 * BATCH, :1], callbacks=[Timed()], **fit)
        timed = Timed()
        model.fit(x, x[:, :1], epochs=EPOCHS, callbacks=[timed], **fit)
        total = EPOCHS * steps
        share = (timed.batches + timed.ends) / timed.epochs
        numbers = 1e3 * timed.epochs / total, 1e6 * timed.batches / total, 1e6 * timed.ends / EPOCHS
        table.add_row(str(width), *(f"{number:.3g}" for number in numbers), f"{share:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
