"""Times training steps with and without `LossScaleLogger`, interleaved within an epoch.

    python benchmarks/logger_cost.py                   # widths 64 and 512, two minutes
    KERAS_BACKEND=torch python benchmarks/logger_cost.py 256 1024 --seconds 30

An epoch consists of blocks of steps. Every other block runs the logger's hook after its batches. Of the blocks without
it, half are a control: the column "noise" compares them with the others. Keras may run the hook in another thread, so
the first steps of a block are not counted.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import statistics
import time

import keras
import numpy
from rich.console import Console
from rich.table import Table

from tfmixed import LossScaleOptimizer
from tfmixed.callbacks import LossScaleLogger

BATCH, BLOCK, SKIPPED = 32, 20, 4
KINDS = ("without", "with", "control", "with")


class Blocks(LossScaleLogger):
    """Logs in every other block, and times all blocks and the hooks of epochs."""

    def __init__(self):
        super().__init__(verbose=0)
        self.starts: list[float] = []
        self.in_epochs: list[float] = []

    def kind(self, batch):
        return KINDS[batch // BLOCK % len(KINDS)]

    def on_epoch_begin(self, epoch, logs=None):
        start = time.perf_counter()
        super().on_epoch_begin(epoch, logs)
        self.in_epochs.append(time.perf_counter() - start)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, batch, logs=None):
        if self.kind(batch) == "with":
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.in_epochs.append(time.perf_counter() - start)

    def medians(self):
        """Returns the median seconds of a step by kind: that of all steps, not of blocks."""
        times = {kind: [] for kind in KINDS}
        for batch, (start, end) in enumerate(itertools.pairwise(self.starts)):
            if batch % BLOCK >= SKIPPED:
                times[self.kind(batch)].append(end - start)
        return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def trained(model: keras.Model, steps: int, logger: keras.callbacks.Callback) -> None:
    x = numpy.random.default_rng(0).normal(size=(steps * BATCH, model.input_shape[1])).astype("float32")
    model.fit(x, x[:, :1], batch_size=BATCH, verbose=0, shuffle=False, callbacks=[logger])


def calls_of_a_batch(model: keras.Model) -> int:
    """Returns the function calls of the logger's hook after a batch, those of built-in functions included."""
    logger = LossScaleLogger(verbose=0)
    logger.set_model(model)
    logger.on_train_begin()
    logger.on_epoch_begin(0)
    profile = cProfile.Profile()
    for batch in range(10):
        profile.runcall(logger.on_train_batch_end, batch, {"loss": 0.0})
    logger.on_train_end()
    return sum(entry.callcount for entry in profile.getstats()) // 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", nargs="*", type=int, default=[64, 512])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each width. Defaults to 30.")
    options = parser.parse_args()
    headings = "width", "ms a step", "us of the logger", "share", "noise", "ms an epoch", "calls a batch"
    table = Table(*headings, title=f"LossScaleLogger(verbose=0), {keras.backend.backend()}")
    for width in options.widths:
        hidden = [keras.layers.Dense(width, activation="relu") for _ in range(2)]
        model = keras.Sequential([keras.Input((width,)), *hidden, keras.layers.Dense(1)])
        model.compile(LossScaleOptimizer("adam"), loss="mse")
        for _ in range(2):  # the first compiles
            warm = Blocks()
            trained(model, 5 * BLOCK, warm)
        blocks = Blocks()
        trained(model, max(20 * BLOCK, round(options.seconds / warm.medians()["without"])), blocks)
        step, logged, control = (blocks.medians()[kind] for kind in ("without", "with", "control"))
        base = (step + control) / 2
        table.add_row(
            f"{width}",
            f"{1e3 * base:.3g}",
            f"{1e6 * (logged - base):.1f}",
            f"{logged / base - 1:.2%}",
            f"{control / step - 1:.2%}",
            f"{1e3 * sum(blocks.in_epochs):.2f}",
            f"{calls_of_a_batch(model)}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
