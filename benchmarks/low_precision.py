"""Measures memory, time and training loss with `LowPrecisionOptimizer` around Adam.

    python benchmarks/low_precision.py                    # an hour; writes benchmarks/results/low_precision.md
    python benchmarks/low_precision.py bytes time         # prints these sections only
    KERAS_BACKEND=jax python benchmarks/low_precision.py peak

`peak` reads the memory of each training from outside of its process. `time` and `bytes` need TensorFlow.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy

import tfmixed
from tfmixed._cli.bench import networks

BACKEND = keras.backend.backend()


class Form(NamedTuple):
    """A form of weights and states: a dtype policy, and arguments of `LowPrecisionOptimizer` or None without it."""

    policy: str
    arguments: dict[str, str] | None = None

    def optimizer(self, learning_rate: float | keras.optimizers.schedules.LearningRateSchedule) -> object:
        adam = keras.optimizers.Adam(learning_rate)
        return adam if self.arguments is None else tfmixed.LowPrecisionOptimizer(adam, **self.arguments)


FORMS = {
    "float32": Form("float32"),
    "mixed_bfloat16": Form("mixed_bfloat16"),
    "mixed_bfloat16, bfloat16 states": Form("mixed_bfloat16", {"states": "bfloat16"}),
    "mixed_bfloat16, int8 states": Form("mixed_bfloat16", {"states": "int8"}),
    "nearest, float32 states": Form("bfloat16", {"weights": "nearest", "states": "float32"}),
    "stochastic, float32 states": Form("bfloat16", {"states": "float32"}),
    "stochastic, bfloat16 states": Form("bfloat16", {"states": "bfloat16"}),
    "stochastic, int8 states": Form("bfloat16", {"states": "int8"}),
    "split, float32 states": Form("bfloat16", {"weights": "split", "states": "float32"}),
    "split, int8 states": Form("bfloat16", {"weights": "split", "states": "int8"}),
}

LARGE = {"samples": 1, "tokens": 32, "width": 1280, "depth": 5, "heads": 8, "vocabulary": 8000}


def train_large(name: str) -> None:
    """Trains the large Transformer for a few steps. In a process whose parent reads its memory before and after."""
    form = FORMS[name]
    print("before", flush=True)
    input()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(form.policy)
    model, x, y = networks.transformer(**LARGE)
    model.optimizer = form.optimizer(1e-4)
    model.fit(x, y, batch_size=1, epochs=3, verbose=0)
    print("after", model.count_params(), flush=True)
    input()


def peak(name: str) -> tuple[int, int]:
    """Returns the parameters of the large Transformer, and the peak memory of its training above that before it."""
    command = [sys.executable, __file__, "--train", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        peaks = []
        for word in ("before", "after"):
            line = process.stdout.readline()
            while not line.startswith(word):
                line = process.stdout.readline()
                assert line, f"training with {name} failed"
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peaks.append(1024 * int(status.split("VmHWM:")[1].split()[0]))
            process.stdin.write("\n")
            process.stdin.flush()
    return int(line.split()[1]), peaks[1] - peaks[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    if arguments.train:
        train_large(arguments.train)
        return
    for name in arguments.only or FORMS:
        n, p = peak(name)
        print(f"{name:35} {n:,} {p/2**20:8.0f} MiB {p/n:.2f} bytes", flush=True)


if __name__ == "__main__":
    main()
