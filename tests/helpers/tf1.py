"""A small TensorFlow 1 network, for the tests of `tfmixed.compat.v1`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfmixed._core import event_buffer as log_of

V1 = tf.compat.v1
HELPERS = Path(__file__).parent
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(64, 8)).astype("float32")
Y = np.argmax(X @ RANDOM.normal(size=(8, 3)), axis=1).astype("int32")


def network(width=16, factor=1.0):
    """Returns inputs and loss. `factor` multiplies the inputs, so that infinity makes a step overflow."""
    x, y = V1.placeholder(tf.float32, [None, 8], "x"), V1.placeholder(tf.int32, [None], "y")
    hidden = tf.nn.relu(dense(x * factor, width, "hidden"))
    logits = dense(hidden, 3, "logits")
    return x, y, V1.losses.sparse_softmax_cross_entropy(y, logits)


def dense(x, units, name):
    with V1.variable_scope(name):
        kernel = V1.get_variable("kernel", [int(x.shape[-1]), units], initializer=V1.glorot_uniform_initializer(seed=1))
        return tf.matmul(x, kernel) + V1.get_variable("bias", [units], initializer=V1.zeros_initializer())


@contextlib.contextmanager
def session(config=None):
    with V1.Session(config=config) as opened:
        opened.run(V1.global_variables_initializer())
        yield opened


def some(names, values):
    """Returns all values as parameters by name, and marks those that `names` does not have as slow."""
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    marks = {name: () if name in names else pytest.mark.slow for name in values}
    return [pytest.param(*value, id=name, marks=marks[name]) for name, value in several.items()]


def script(code, *arguments, environment=None, timeout=180):
    """Runs Python code in a process, and returns its output. A failure of the process fails the test."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    paths = os.pathsep.join(map(str, [HELPERS.parents[1], HELPERS, HELPERS.parent / "compat"]))
    environment = {**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def events(session, state):
    """Returns the changes of a scale in the event buffer of a session."""
    values = {name: session.run(state.read(name)) for name in state.variables}
    return log_of.entries(values, state.paths)
