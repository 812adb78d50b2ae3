"""Trains a small CNN on handwritten digits in float32, and in float16 with a dynamic and a constant loss scale.

    python examples/digits.py [--epochs 6] [--run-dir runs/digits]

A file in `configs/` sets the precision of each run. Writes a log of each run and a plot of the loss scales.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import keras
from keras import layers
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfmixed
from tfmixed import plotting, records

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def digits() -> list[Any]:
    """Returns 1,437 training and 360 validation images of 8x8 pixels in [0, 1], then their labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images.reshape(-1, 8, 8, 1) / 16, labels, test_size=360, random_state=0, stratify=labels)


def build() -> keras.Model:
    convolutions = [layers.Conv2D(8, 3, activation="relu"), layers.Conv2D(16, 3, strides=2, activation="relu")]
    # In float32: float16 fails first in the softmax.
    classifier = [layers.Flatten(), layers.Dense(10), tfmixed.layers.Softmax()]
    return keras.Sequential([keras.Input((8, 8, 1)), *convolutions, *classifier])


def train(config: tfmixed.Config, epochs: int, seed: int = 0, **options: Any) -> tuple[keras.Model, float]:
    """Returns the model and its validation accuracy. `options` are passed to `fit`."""
    keras.utils.set_random_seed(seed)
    config.apply()
    train_x, test_x, train_y, test_y = digits()
    model, optimizer = build(), config.optimizer(keras.optimizers.Adam(5e-3))
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train_x, train_y, batch_size=32, epochs=epochs, **options)
    return model, model.evaluate(test_x, test_y, verbose=0, return_dict=True)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"))
    arguments = parser.parse_args()
    console, histories = Console(), {}
    table = Table("run", "accuracy", "final scale", "skipped steps", "seconds")
    for name in ("float32", "float16_dynamic", "float16_constant"):
        console.rule(name)
        config, run_dir = tfmixed.load_config(CONFIGS / f"{name}.toml"), arguments.run_dir / name
        start = time.perf_counter()
        model, accuracy = train(config, arguments.epochs, callbacks=config.callbacks(run_dir))
        row, seconds = [name, f"{accuracy:.1%}", "-", "-"], time.perf_counter() - start
        if config.scaling is not None:
            histories[name] = plotting.ScaleHistory.of(records.read_log(run_dir / "loss_scale.jsonl"))
            row[2:] = f"{float(model.optimizer.loss_scale):g}", f"{int(model.optimizer.skipped_steps)}"
        table.add_row(*row, f"{seconds:.1f}")
    figure = arguments.run_dir / "loss_scale.png"
    plotting.save(plotting.plot_scale(histories, "Loss scale, CNN on digits"), figure)
    console.print(table, f"Logs and figure: {arguments.run_dir}/*/loss_scale.jsonl, {figure}")
    if "float16" not in tfmixed.hardware.describe().main.fast:
        console.print("float16 is slow on CPUs. This run shows its numerics, not its speed.")


if __name__ == "__main__":
    main()
