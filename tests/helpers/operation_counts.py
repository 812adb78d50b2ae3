"""Counts of the operations of one update.

PyTorch: operators that are dispatched. JAX: kernels of the compiled step, on the longest path through its branches.
TensorFlow: operations that its profiler records while a step runs.
"""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import keras
import numpy as np
from backend import BACKEND, tf
from keras import ops

from tfmixed import GradScaler, LossScaleOptimizer

SIZES = {"small": (6, (4, 4)), "medium": (10, (64, 64)), "large": (2, (256, 256))}


class ByScaler:
    """An optimizer stepped by `GradScaler`."""

    def __init__(self, inner):
        self.inner, self.scaler = inner, GradScaler()
        self.build, self.scale_loss = inner.build, self.scaler.scale

    def apply(self, gradients, weights):
        self.scaler.step(self.inner, zip(gradients, weights, strict=True))
        self.scaler.update()


KINDS = {"keras": keras.optimizers.LossScaleOptimizer, "optimizer": LossScaleOptimizer, "scaler": ByScaler}


def built(kind, size):
    """Returns an optimizer, its weights, and finite gradients."""
    count, shape = SIZES[size]
    weights = [keras.Variable(np.ones(shape, "float32")) for _ in range(count)]
    optimizer = KINDS[kind](keras.optimizers.Adam())
    optimizer.build(weights)
    optimizer.scale_loss(0.0)  # marks the gradients as those of a scaled loss
    return optimizer, weights, [ops.ones(shape) for _ in weights]


def dispatched(optimizer, weights, gradients):
    """Returns the operators that PyTorch dispatches in a step, and the number of values that the host waits for."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    operators, waits = Counter(), Counter()

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators[function.overloadpacket._qualified_op_name] += 1
            return function(*args, **(kwargs or {}))

    def record(_frame, event, function):  # copies to the host are not dispatched
        if event == "c_call" and isinstance(getattr(function, "__self__", None), torch.Tensor):
            waits[function.__name__] += 1

    before = sys.getprofile()
    optimizer.scale_loss(0.0)
    with Recording():
        sys.setprofile(record)
        try:
            optimizer.apply(gradients, weights)
        finally:
            sys.setprofile(before)
    return operators, operators["aten::_local_scalar_dense"] + max(waits["cpu"], waits["numpy"])


@functools.cache
def compiled_by_jax(kind, size):
    """Returns the optimized HLO of a step whose state is donated, as in Keras's trainer."""
    import jax

    optimizer, weights, gradients = built(kind, size)
    state = [weight.value for weight in weights], [variable.value for variable in optimizer.variables]
    step = jax.jit(lambda state, given: optimizer.stateless_apply(state[1], given, state[0]), donate_argnums=0)
    return step.lower(state, gradients).compile().as_text()


def instructions(text, name="ENTRY"):
    """Returns the kinds of the instructions that a computation runs, where each branch is the longest."""
    kinds = Counter()
    start = re.search(rf"^{name} .*\n" if name == "ENTRY" else rf"^%?{re.escape(name)} .*\n", text, re.MULTILINE).end()
    for line in text[start : text.index("\n}", start)].splitlines():
        kinds[re.search(r" ([\w-]+)\(", line)[1]] += 1
        branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
        branches += re.findall(r"[\w.-]+", "".join(re.findall(r"branch_computations=\{(.*?)\}", line)))
        found = [instructions(text, branch) - Counter({"parameter": 10**6}) for branch in branches]
        kinds += max(found, key=kernels, default=Counter())
    return kinds


def kernels(kinds):
    """Returns the number of instructions that compute or copy."""
    free = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
    return kinds.total() - sum(kinds[kind] for kind in free)


@functools.cache
def traced(kind, size):
    """Returns TensorFlow's graph of a step, and the operations that its profiler records while one runs."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    optimizer, weights, gradients = built(kind, size)
    # Gradients are arguments, since TensorFlow computes the check of small constants while it traces.
    step = tf.function(lambda *given: optimizer.apply(list(given), weights), autograph=False)
    step(*gradients)
    options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3, python_tracer_level=0)
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder, options):
            step(*gradients)
        space = xplane_pb2.XSpace.FromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    events = [(plane, event) for plane in space.planes for line in plane.lines for event in line.events]
    names = [plane.event_metadata[event.metadata_id].name for plane, event in events]
    run = Counter(name.split(":")[1] for name in names if re.fullmatch(r"[^:]+:[A-Z]\w+", name))  # node:type
    return step.get_concrete_function(*gradients).graph.as_graph_def(), run


@functools.cache
def operations(kind, size):
    """Returns the number of operations of a finite step."""
    if BACKEND == "jax":
        return kernels(instructions(compiled_by_jax(kind, size)))
    if BACKEND == "tensorflow":
        return traced(kind, size)[1].total()
    step = built(kind, size)
    dispatched(*step)  # the first step reads all variables
    return dispatched(*step)[0].total()
