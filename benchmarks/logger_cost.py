"""What `LossScaleLogger` costs a step: on against off, by turns, on dense networks of several sizes.

python benchmarks/logger_cost.py      # three widths, some two minutes
"""

from __future__ import annotations

import argparse
import statistics
import time

import keras
import numpy
from rich.console import Console
from rich.table import Table

import tfmixed

BATCH = 64


class Watch(keras.callbacks.Callback):
    """Times an epoch; asks for nothing after a batch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start


def epoch(model: keras.Model, steps: int, callbacks: list[keras.callbacks.Callback]) -> float:
    """Returns the milliseconds of a step, over an epoch."""
    x = numpy.random.default_rng(0).normal(size=(steps * BATCH, model.input_shape[1])).astype("float32")
    watch = Watch()
    model.fit(x, x[:, :1], batch_size=BATCH, verbose=0, shuffle=False, callbacks=[watch, *callbacks])
    return 1e3 * watch.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    rounds = parser.parse_args().rounds
    table = Table("width", "ms a step, off", "on", "on / off", title="LossScaleLogger(verbose=0)")
    for width, steps in ((64, 1500), (512, 300), (2048, 60)):
        layers = [keras.layers.Dense(width, activation="relu") for _ in range(4)]
        model = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(1)])
        model.compile(tfmixed.LossScaleOptimizer("adam"), loss="mse")
        epoch(model, steps, [])
        off, on = [], []
        for _ in range(rounds):
            off.append(epoch(model, steps, []))
            on.append(epoch(model, steps, [tfmixed.callbacks.LossScaleLogger(verbose=0)]))
        a, b = statistics.median(off), statistics.median(on)
        ratio = statistics.median(y / x for x, y in zip(off, on, strict=True))
        table.add_row(str(width), f"{a:.3f}", f"{b:.3f}", f"{ratio:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
