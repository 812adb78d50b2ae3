"""Measures the gradients of an autoencoder before and during training, chooses a loss scale, and writes a report.

    python examples/ranges.py [--epochs 40] [--run-dir runs/ranges]

Uses the autoencoder of `underflow.py`. Without a loss scale, float16 flushes a fifth of its gradients to 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import keras
from rich.console import Console
from underflow import build, load_data

import tfmixed
from tfmixed import plotting, records
from tfmixed.callbacks import GradientRanges, LossScaleLogger
from tfmixed.report import Report, read
from tfmixed.scaling import ScaleHistory

# Starts high and grows fast, to show the upper limit of the scale.
RULE = tfmixed.DynamicScale(initial_scale=2.0**22, growth_interval=10, max_scale=2.0**40)


def compiled(scale) -> keras.Model:
    keras.utils.clear_session()  # gives the layers the same names at each call
    model = build("mixed_float16")
    model.compile(tfmixed.LossScaleOptimizer(keras.optimizers.Adam(0.02), scale), loss="mse")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/ranges"))
    arguments = parser.parse_args()
    pixels, console = load_data(), Console()
    fit = {"x": pixels, "y": pixels, "batch_size": 480, "epochs": arguments.epochs, "verbose": 0}

    ranges = tfmixed.measure_gradients(compiled(1.0), (pixels, pixels), batch_size=480)
    console.print(ranges)
    suggested = ranges.suggest_constant_scale(headroom=4.0)
    for scale in (float(suggested), suggested * 2.0**6):
        model = compiled(scale)
        model.fit(**fit | {"epochs": 1})
        skipped, steps = int(model.optimizer.skipped_steps), int(model.optimizer.attempted_steps)
        console.print(f"One epoch with the constant scale {records.short(scale)}: {skipped} of {steps} steps overflow.")

    path = arguments.run_dir / "loss_scale.jsonl"
    compiled(RULE).fit(**fit, callbacks=[LossScaleLogger(path, verbose=0), GradientRanges(path, every=10)])
    report = Report([read(path)])
    console.print(report)
    report.save_page(arguments.run_dir / "report.html")
    log = records.read_log(path)
    last = [record for record in log if isinstance(record, records.RangesRecord)][-1]
    plotting.save(plotting.plot_ranges(last, suggested), arguments.run_dir / "report_ranges.png")
    plotting.save(plotting.plot_scale({"dynamic": ScaleHistory.of(log)}), arguments.run_dir / "report_scale.png")
    console.print(f"Log, report and figures: {arguments.run_dir}")


if __name__ == "__main__":
    main()
