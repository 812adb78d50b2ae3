"""Times a batch of `measure_gradients` against a training step of `fit`, interleaved.

python benchmarks/ranges.py                      # all networks of `tfmixed bench` in float32, two minutes
python benchmarks/ranges.py --policy mixed_bfloat16 mlp
"""

from __future__ import annotations

import argparse

import keras
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import tfmixed
from tfmixed._cli.bench import networks
from tfmixed._probe.train_step_probe import Probe
from tfmixed._utils import timing

ROUNDS, STEPS = 7, 3


def fit(model: keras.Model, data: tf.data.Dataset) -> None:
    model.fit(data, steps_per_epoch=STEPS, verbose=0, shuffle=False)


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
        fit(model, data)
        probe = Probe(model)
        first = timing.elapsed(lambda probe=probe, batch=batch: probe.measure(batch))
        functions = {
            "fit": lambda model=model, data=data: fit(model, data),
            "probe": lambda probe=probe, batch=batch: [probe.measure(batch) for _ in range(STEPS)],
        }
        medians = timing.medians(timing.interleaved(functions, ROUNDS))
        step, measured = (1e3 * seconds / STEPS for seconds in medians.values())
        table.add_row(name, f"{step:.1f}", f"{measured:.1f}", f"{measured / step:.2f}", f"{first:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
