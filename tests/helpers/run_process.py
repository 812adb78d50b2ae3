"""Scripts that run under `tfmixed run` in a process of their own."""

import os
import subprocess
import sys

from backend import BACKEND

# The environment names a backend that does not exist: the script's own choice comes in time.
BEGIN = f"""
import os, sys
assert not {{"keras", "tensorflow", "jax", "torch"}} & set(sys.modules)
os.environ["KERAS_BACKEND"] = {BACKEND!r}
import keras, numpy as np
x, y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.arange(64) % 3
LOSS = "sparse_categorical_crossentropy"

def net(*first, **last):
    hidden = keras.layers.Dense(8, activation="relu", name="hidden")
    return keras.Sequential([*first, hidden, keras.layers.Dense(3, activation="softmax", name="out", **last)])
"""


def run(folder, code, *options, arguments=(), backend="nonsense"):
    """Runs a script in a folder, and returns the process and its messages."""
    (folder / "train.py").write_text(code)
    command = [sys.executable, "-m", "tfmixed", "run", *options, "train.py", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    options = {"capture_output": True, "text": True, "timeout": 240, "check": False, "cwd": folder}
    done = subprocess.run(command, env=environment, **options)
    return done, [line[9:] for line in done.stderr.splitlines() if line.startswith("tfmixed: ")]


def line_of(code, part):
    return next(number for number, line in enumerate(code.splitlines(), start=1) if part in line)
