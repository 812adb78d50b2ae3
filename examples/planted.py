"""Draws gradients whose magnitudes are known: what float16 loses of them without and with a loss scale.

    python examples/planted.py [--out docs]

Three layers, from 2^-30 in the first to 2^-8 in the last, with one that grows over the run until its scale is too high.
Writes the log of a run that a dynamic scale goes through, and two pictures of it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from tfmixed import plotting, records
from tfmixed.records import GradientRange, Progress, RangesRecord, RunRecord, ScaleChange
from tfmixed.scaling import DynamicScale, ScaleHistory

LAYERS = {"embedding": -30, "encoder": -22, "head": -8}  # log2 of their typical gradient
STEPS, RULE = 600, DynamicScale(initial_scale=2.0**24, growth_interval=60)


def gradient(name: str, kind: str, magnitudes: np.ndarray) -> GradientRange:
    """Returns the record of some magnitudes, each octave in the four parts that float16's limits make."""
    octaves: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for mantissa, exponent in zip(*np.frexp(magnitudes), strict=True):
        octaves[int(exponent) - 1][sum(2 * mantissa > limit for limit in (1, 2 - 2.0**-10, 2 - 2.0**-11))] += 1
    counts = {octave: tuple(parts) for octave, parts in octaves.items()}
    largest, smallest = float(magnitudes.max()), float(magnitudes.min())
    return GradientRange(name, kind, name.split("/")[0], "float16", 200, 0, largest, smallest, counts)


def snapshot(step: int) -> RangesRecord:
    """Returns 2,000 magnitudes a layer, log-normal around what is planted; those of the head grow with the steps."""
    random, of = np.random.default_rng(0), []
    for layer, center in LAYERS.items():
        center += 6 * step / STEPS if layer == "head" else 0
        of.append(gradient(layer, "activation", 2.0 ** random.normal(center - 4, 3, 2000)))
        of.append(gradient(f"{layer}/kernel", "weight", 2.0 ** random.normal(center, 2, 2000)))
    return RangesRecord(step, step // 100, "float32", 1.0, 1, "planted", of)


def run() -> list[records.Record]:
    """Returns the log of a run under `RULE`: a step overflows where its largest gradient does."""
    state, skipped = RULE.start(), 0
    log: list[records.Record] = [
        RunRecord(0, float(state.scale), "", "planted", "mixed_float16", RULE.get_config(), "", [], {})
    ]
    for step in range(STEPS):
        if step % 100 == 0:
            log.append(snapshot(step))
            worst = max(log[-1].ranges, key=lambda each: each.largest)
        finite, scale = worst.largest * float(state.scale) < 65520, float(state.scale)
        state, skipped = RULE.next(state, finite), skipped + (not finite)
        if float(state.scale) != scale:
            reason, guilty = ("growth", None) if finite else ("overflow", worst.name)
            log.append(ScaleChange(step, scale, float(state.scale), reason, guilty, step // 100))
        if step % 100 == 99:
            log.append(Progress(step, step // 100, float(state.scale), skipped))
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/planted"))
    parser.add_argument("--out", type=Path, help="where the pictures go. Default: the run's folder")
    arguments = parser.parse_args()
    log, out = run(), arguments.out or arguments.run_dir
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.run_dir / "loss_scale.jsonl"
    path.write_text("".join(records.to_line(each) + "\n" for each in log), encoding="utf-8")
    history = ScaleHistory.of(log)
    plotting.save(plotting.plot_scale({"loss scale": history}), out / "report_scale.png")
    plotting.save(plotting.plot_ranges(snapshot(0), history.at(0) / 2**12), out / "report_ranges.png")
    print(f"tfmixed report {path}")


if __name__ == "__main__":
    main()
