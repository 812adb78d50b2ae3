"""Times the training step of the networks of `tfmixed bench`, with float32 sums in the backward pass and without.

    python benchmarks/gradient_sums.py                                         # mixed_bfloat16, minutes
    KERAS_BACKEND=jax python benchmarks/gradient_sums.py mlp transformer --rounds 101
    python benchmarks/gradient_sums.py --policy mixed_float16 --tiny           # CPUs are slow in float16

A ratio is the median of those of two steps of one round, with its 95% interval. `off / off` compares two equal models:
the noise of the machine. The CPU time of a step does not count other processes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import keras
from keras import layers
from rich.console import Console
from rich.table import Table

import tfmixed
from tfmixed._cli.bench import networks
from tfmixed._utils import timing

BACKEND = keras.backend.backend()
VARIANTS = {"on": True, "off": False, "off again": False}


def biased(samples: int, side: int, channels: int = 32, size: int = 3) -> networks.Problem:
    """A network of convolutions with biases, of which those of `tfmixed bench` have one."""
    blocks = [layers.Conv2D(channels, size, padding="same", activation="relu") for _ in range(4)]
    return networks._image_classifier(blocks, samples, side)


# Sizes for steps of 10 to 200 ms on two cores; the samples are the batch. Then those for CPUs in float16.
NETWORKS: dict[str, tuple[Callable[..., networks.Problem], dict[str, int], dict[str, int]]] = {
    "mlp": (networks.mlp, {"samples": 256, "width": 512}, {"samples": 32, "width": 64}),
    "cnn": (
        networks.cnn,
        {"samples": 16, "side": 16, "channels": 32},
        {"samples": 2, "side": 8, "channels": 8},
    ),
    "transformer": (
        networks.transformer,
        {"samples": 4, "tokens": 32, "width": 128},
        {"samples": 1, "tokens": 16, "width": 32, "vocabulary": 500},
    ),
    "depthwise": (
        networks.depthwise,
        {"samples": 4, "side": 16, "channels": 64},
        {"samples": 2, "side": 8, "channels": 8},
    ),
    # Not in `tfmixed bench`. With 1 x 1 kernels, sums are the largest share of a step.
    "3 x 3 biased": (biased, {"samples": 16, "side": 16}, {"samples": 2, "side": 8, "channels": 8}),
    "1 x 1 biased": (
        biased,
        {"samples": 16, "side": 32, "size": 1},
        {"samples": 2, "side": 8, "channels": 8, "size": 1},
    ),
}


def step(name: str, policy: str, float32_sums: bool, tiny: bool) -> Callable[[], None]:
    """Returns a function that trains on one batch and waits for the device. It is compiled."""
    make, *sizes = NETWORKS[name]
    keras.utils.set_random_seed(0)
    with tfmixed.policy_scope(policy, float32_sums=float32_sums):
        model, x, y = make(**sizes[tiny])

    def train() -> None:
        # The gradient functions are chosen when a step is traced, and on PyTorch in each call.
        with tfmixed.policy_scope(policy, float32_sums=float32_sums):
            model.train_on_batch(x, y)

    for _ in range(3):
        train()
    return train


def elapsed(train: Callable[[], None]) -> tuple[float, float]:
    """Returns the seconds of a step, and those of all its threads, in which no other process is counted."""
    cpu = time.process_time()
    return timing.elapsed(train), time.process_time() - cpu


def ratio(times: Sequence[float], reference: Sequence[float]) -> str:
    """Returns the median ratio of two steps of a round, and the 95% interval of that median by order statistics."""
    ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
    low = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
    return f"{statistics.median(ratios):.3f} ({ratios[low]:.3f} - {ratios[-1 - low]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="networks (default: all)")
    parser.add_argument("--policy", default="mixed_bfloat16", help="dtype policy (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=61, help="steps of each variant (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="networks for CPUs in float16")
    arguments = parser.parse_args()
    table = Table(title=f"Step with float32 sums / without, {arguments.policy}, {BACKEND}")
    for heading in ("network", "ms off", "on / off (95%)", "off / off (95%)", "CPU on / off", "CPU off / off"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name in arguments.networks:
        functions = {
            variant: step(name, arguments.policy, float32_sums, arguments.tiny)
            for variant, float32_sums in VARIANTS.items()
        }
        times = timing.interleaved(functions, arguments.rounds, elapsed)
        wall, cpu = ([[pair[clock] for pair in pairs] for pairs in times.values()] for clock in (0, 1))
        ratios = (ratio(clock[variant], clock[1]) for clock in (wall, cpu) for variant in (0, 2))
        table.add_row(name, f"{1e3 * statistics.median(wall[1]):.1f}", *ratios)
        keras.utils.clear_session()
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
