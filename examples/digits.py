"""Trains a small CNN on handwritten digits three times: float32, float16 with a dynamic and with a constant loss scale.

    python examples/digits.py [--epochs 6] [--run-dir runs/digits]

The precision of each run comes from a file in `configs/`. Writes the log of each run and a picture of the loss scales.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import keras
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfmixed
from tfmixed import plotting, records

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUNS = ("float32", "float16_dynamic", "float16_constant")


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    policy: str
    rule: str
    accuracy: float
    scale: float | None
    skipped: int | None
    seconds: float


def digits():
    """Returns 1,437 training and 360 validation images of 8x8 pixels in [0, 1], with their labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images.reshape(-1, 8, 8, 1) / 16, labels, test_size=360, random_state=0, stratify=labels)


def build() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
            tfmixed.layers.Softmax(),  # in float32: probabilities are where float16 goes wrong first
        ]
    )


def train(name: str, epochs: int, run_dir: Path) -> tuple[Result, plotting.ScaleHistory | None]:
    config = tfmixed.load_config(CONFIGS / f"{name}.toml")
    keras.utils.set_random_seed(0)
    config.apply()
    train_x, test_x, train_y, test_y = digits()
    model = build()
    optimizer = config.optimizer(keras.optimizers.Adam(5e-3))
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    start = time.perf_counter()
    model.fit(train_x, train_y, batch_size=32, epochs=epochs, callbacks=config.callbacks(run_dir / name))
    seconds = time.perf_counter() - start
    accuracy = model.evaluate(test_x, test_y, verbose=0, return_dict=True)["accuracy"]
    if config.scaling is None:
        return Result(config.policy, "-", accuracy, None, None, seconds), None
    rule, steps = type(config.scaling).__name__, int(optimizer.attempted_steps)
    log = records.read_changes(run_dir / name / "loss_scale.jsonl")
    result = Result(config.policy, rule, accuracy, float(optimizer.loss_scale), int(optimizer.skipped_steps), seconds)
    return result, plotting.ScaleHistory(float(config.scaling.start().scale), steps, tuple(log))


def table(results: list[Result]) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in ("policy", "rule"):
        rows.add_column(heading, no_wrap=True)
    for heading in ("validation\naccuracy", "final scale", "skipped steps", "seconds"):
        rows.add_column(heading, justify="right", min_width=7)
    for row in results:
        scale, skipped = ("-" if number is None else f"{number:g}" for number in (row.scale, row.skipped))
        rows.add_row(row.policy, row.rule, f"{row.accuracy:.1%}", scale, skipped, f"{row.seconds:.1f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"))
    arguments = parser.parse_args()
    console, results, histories = Console(), [], {}
    for name in RUNS:
        console.rule(name)
        result, history = train(name, arguments.epochs, arguments.run_dir)
        results.append(result)
        if history is not None:
            histories[name] = history
    console.print(table(results))
    picture = arguments.run_dir / "loss_scale.png"
    plotting.save(plotting.plot_scale(histories, "Loss scale, CNN on digits"), picture)
    console.print(f"Logs and picture: {arguments.run_dir}/*/loss_scale.jsonl, {picture}")
    if "float16" not in tfmixed.hardware.describe().main.fast:
        console.print("float16 is slow on a CPU: this run shows its numerics, not its speed.")


if __name__ == "__main__":
    main()
