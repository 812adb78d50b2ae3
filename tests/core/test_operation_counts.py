"""Operations of one update relative to Keras's `LossScaleOptimizer`, and its host synchronizations."""

from __future__ import annotations

import re

import numpy as np
import pytest
from backend import BACKEND, ON_CPU, needs_tensorflow
from operation_counts import SIZES, built, compiled_by_jax, dispatched, instructions, operations, traced

slow = pytest.mark.slow
needs_jax = pytest.mark.skipif(BACKEND != "jax", reason="needs JAX")
needs_torch = pytest.mark.skipif(BACKEND != "torch", reason="needs PyTorch")
pytestmark = pytest.mark.skipif(not ON_CPU, reason="compilers make other operations for other devices")

# Largest ratio of the number of operations to that of Keras's class, a tenth above what was counted.
RATIOS = {
    "torch": {"optimizer": {"small": 0.55, "medium": 0.41}, "scaler": {"small": 0.76, "medium": 0.56}},
    "jax": {"optimizer": {"small": 1.29, "medium": 0.79}},
    "tensorflow": {
        "optimizer": {"small": 1.02, "medium": 0.94, "large": 1.12},
        "scaler": {"small": 1.64, "medium": 1.33, "large": 2.66},
    },
}
# They trace or compile for a second.
LONG = {"torch": [], "jax": ["optimizer medium"], "tensorflow": ["optimizer medium", "scaler small", "scaler medium"]}
CASES = [
    pytest.param(kind, size, most, marks=slow if f"{kind} {size}" in LONG[BACKEND] else ())
    for kind, sizes in RATIOS[BACKEND].items()
    for size, most in sizes.items()
]


@pytest.mark.parametrize(("kind", "size", "most"), CASES)
def test_a_finite_step_runs_few_operations(kind, size, most):
    """Relative to Keras's class."""
    assert 0 < operations(kind, size) <= most * operations("keras", size)


@needs_torch
@pytest.mark.parametrize("kind", ["optimizer", "scaler"])
def test_the_host_waits_once_in_a_step(kind):
    """For the finite check, and a second time for the exact values of a step that is skipped."""
    optimizer, weights, gradients = built(kind, "small")
    waits = []
    for value in (1.0, 1.0, np.inf, np.inf, 1.0, 1.0):
        gradients[1][0, 0] = value
        waits.append(dispatched(optimizer, weights, gradients)[1])
    assert (waits[1], waits[4], waits[5]) == (1, 1, 1)
    assert waits[3] == 2  # the first steps of both kinds read the state


@needs_jax
@pytest.mark.parametrize(("size", "most"), [("small", 1.83), pytest.param("medium", 1.31, marks=slow)])
def test_a_compiled_step_is_small_and_leaves_the_host_alone(size, most):
    """Its state has few arguments, and only the update of weights is in a branch."""
    ours, theirs = (compiled_by_jax(kind, size) for kind in ("optimizer", "keras"))
    assert ours.count(" = ") <= most * theirs.count(" = ")
    assert instructions(ours)["parameter"] <= instructions(theirs)["parameter"] + 4
    assert len(re.findall(r" conditional\(", ours)) == 1
    assert not re.findall(r" (custom-call|infeed|outfeed|send|recv)\(", ours)


@needs_tensorflow
@pytest.mark.parametrize(
    ("kind", "size", "most"),
    [("optimizer", "small", 2), ("optimizer", "large", 3), ("scaler", "large", 3)],
)
def test_a_graph_branches_seldom_and_leaves_the_host_alone(kind, size, most):
    """Branches: the update, what follows from it, and for larger gradients the exact check."""
    graph, _ = traced(kind, size)
    assert sum(node.op in ("If", "StatelessIf") for node in graph.node) <= most
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    assert not [node.op for node in nodes if "PyFunc" in node.op or "Host" in node.op]


@needs_tensorflow
def test_large_variables_are_updated_by_one_function_of_xla():
    """With no more divisions than those of Adam: unscaling multiplies."""
    for kind in ("optimizer", "scaler"):
        functions = traced(kind, "large")[0].library.function
        (fused,) = (function for function in functions if function.attr["_XlaMustCompile"].b)
        assert sum(node.op == "RealDiv" for node in fused.node_def) <= 3 * SIZES["large"][0]
