"""Times training steps with and without `LossScaleLogger`, interleaved in one process.

    python benchmarks/logger_cost.py                  # widths 64 and 512, 40 rounds, about two minutes
    python benchmarks/logger_cost.py 128 --rounds 100

A round trains the same model three times for an epoch: without the logger, with it, and without it again. The last
column compares the two epochs without it: a cost below that is noise. Hooks of a batch and of an epoch are counted.
"""

from __future__ import annotations

import argparse
import cProfile
import statistics
import time
from typing import Any

import keras
import numpy
from rich.console import Console
from rich.table import Table

from tfmixed import LossScaleOptimizer
from tfmixed._utils import timing
from tfmixed.callbacks import LossScaleLogger

BATCH, DEPTH = 32, 3


class Start(keras.callbacks.Callback):
    """Starts a clock before the logger's hook."""

    def on_epoch_begin(self, epoch, logs=None):
        self.time = time.perf_counter()


class Stop(Start):
    """Stops it after the logger's hook."""

    on_epoch_begin = keras.callbacks.Callback.on_epoch_begin

    def on_epoch_end(self, epoch, logs=None):
        self.time = time.perf_counter()


class Training:
    """Epochs of one model, with and without the logger."""

    def __init__(self, width: int) -> None:
        hidden = [keras.layers.Dense(width, activation="relu") for _ in range(DEPTH - 1)]
        self.model = keras.Sequential([keras.Input((width,)), *hidden, keras.layers.Dense(1)])
        self.model.compile(LossScaleOptimizer("adam"), loss="mse")
        self.width = width
        self.set_steps(20)

    def set_steps(self, steps: int) -> None:
        self.steps = steps
        self.x = numpy.random.default_rng(0).normal(size=(steps * BATCH, self.width)).astype("float32")

    def epoch(self, with_logger: bool) -> float:
        """Trains for an epoch and returns its seconds, with the logger's hooks of the epoch."""
        loggers = [LossScaleLogger(verbose=0)] if with_logger else []
        start, stop = Start(), Stop()
        callbacks: list[Any] = [start, *loggers, stop]
        self.model.fit(self.x, self.x[:, :1], batch_size=BATCH, verbose=0, shuffle=False, callbacks=callbacks)
        return stop.time - start.time


def calls_of_a_batch(model: keras.Model) -> int:
    """Returns the function calls, also of built-in functions, of the logger's hook after a batch."""
    logger = LossScaleLogger(verbose=0)
    logger.set_model(model)
    logger.on_train_begin()
    logger.on_epoch_begin(0)
    profile = cProfile.Profile()
    for batch in range(10):
        logs = {"loss": 0.0}
        profile.runcall(logger.on_train_batch_end, batch, logs)
    logger.on_epoch_end(0, {})
    logger.on_train_end()
    return sum(entry.callcount for entry in profile.getstats()) // 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths", nargs="*", type=int, default=[64, 512])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.4, help="length of an epoch")
    options = parser.parse_args()
    title = f"LossScaleLogger, {keras.backend.backend()}, {options.rounds} rounds"
    table = Table("width", "ms a step", "with logger / without", "without / without", "calls a batch", title=title)
    for width in options.widths:
        training = Training(width)
        training.epoch(True)
        seconds = min(training.epoch(False) for _ in range(3))
        training.set_steps(max(20, round(20 * options.seconds / seconds)))
        kinds = {"without": False, "with": True, "again": False}
        times = timing.interleaved(kinds, options.rounds, training.epoch)
        cost, noise = (
            statistics.median(a / b for a, b in zip(times[name], times["without"], strict=True))
            for name in ("with", "again")
        )
        ms = 1e3 * statistics.median(times["without"]) / training.steps
        table.add_row(f"{width}", f"{ms:.3g}", f"{cost:.3f}", f"{noise:.3f}", f"{calls_of_a_batch(training.model)}")
    Console().print(table)


if __name__ == "__main__":
    main()
