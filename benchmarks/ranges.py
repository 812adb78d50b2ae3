"""What measuring gradients costs: a batch of `measure_gradients` beside a training step of `fit`, by turns.

python benchmarks/ranges.py                      # all networks of `tfmixed bench` in float32, two minutes
python benchmarks/ranges.py --policy mixed_bfloat16 mlp
"""

from __future__ import annotations

import argparse
import statistics
import time

import tensorflow as tf
from rich.console import Console
from rich.table import Table

import tfmixed
from tfmixed._cli.bench import networks
from tfmixed._probe.train_step_probe import Probe

ROUNDS, STEPS = 7, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(networks.BATCHES))
    parser.add_argument("--policy", default="float32")
    arguments = parser.parse_args()
    tfmixed.set_policy(arguments.policy)
    table = Table("network", "ms a step", "ms a batch measured", "ratio", "s for the first", title=arguments.policy)
    for name in arguments.networks:
        model, *arrays = getattr(networks, name)()
        batch = tuple(tf.convert_to_tensor(array[: networks.BATCHES[name]]) for array in arrays)
        data = tf.data.Dataset.from_tensors(batch).repeat()
        model.fit(data, steps_per_epoch=STEPS, verbose=0, shuffle=False)
        probe, start = Probe(model), time.perf_counter()
        probe.measure(batch)
        first = time.perf_counter() - start
        steps, measured = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            model.fit(data, steps_per_epoch=STEPS, verbose=0, shuffle=False)
            middle = time.perf_counter()
            for _ in range(STEPS):
                probe.measure(batch)
            steps.append((middle - start) / STEPS)
            measured.append((time.perf_counter() - middle) / STEPS)
        pair = statistics.median(steps), statistics.median(measured)
        table.add_row(name, *(f"{1e3 * each:.1f}" for each in pair), f"{pair[1] / pair[0]:.2f}", f"{first:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
