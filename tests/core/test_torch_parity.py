"""`GradScaler` against random loops recorded from `torch.amp.GradScaler`, on all backends.

With torch installed, more loops are run: their number is `TFMIXED_PARITY_LOOPS`.

    KERAS_BACKEND=torch python tests/core/test_torch_parity.py --record
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backend import BACKEND, tf
from keras import ops

from tfmixed import GradScaler

RECORDED = Path(__file__).parents[1] / "data" / "grad_scaler_loops.json"
LOOPS, MORE = 8, int(os.environ.get("TFMIXED_PARITY_LOOPS", "12"))
ITERATIONS, OPTIMIZERS = 40, 3
VALUES, ODDS = ("inf", "-inf", "nan", "1.0", "0.001", "0.0", "100.0"), [0.05, 0.05, 0.05, 0.3, 0.2, 0.05, 0.3]
# Calls for an optimizer in an iteration: step, unscale and step, only unscale.
WAYS, WAY_ODDS = ("step", "clip", "look"), [0.45, 0.4, 0.15]


def random_loop(seed):
    """Returns a random loop: the scaler's arguments, and the calls and new scale of each iteration.

    With even seeds float32 holds the factors exactly, for JAX.
    """
    random = np.random.default_rng(seed)
    arguments = {
        "init_scale": float(2.0 ** random.integers(0, 17)),
        "growth_factor": float(random.choice([2.0, 1.7, 1.001] if seed % 2 else [2.0, 4.0, 1.5])),
        "backoff_factor": float(random.choice([0.5, 0.7, 0.999] if seed % 2 else [0.5, 0.25])),
        "growth_interval": int(random.integers(1, 6)),
    }
    iterations = []
    for _ in range(ITERATIONS):
        chosen = np.flatnonzero(random.random(OPTIMIZERS) < 0.6).tolist() or [0]
        acts = [[index, str(random.choice(WAYS, p=WAY_ODDS)), str(random.choice(VALUES, p=ODDS))] for index in chosen]
        new = float(2.0 ** random.integers(-3, 17)) if random.random() < 0.05 else None
        iterations.append({"acts": acts, "new_scale": new})
    return {"arguments": arguments, "iterations": iterations}


def run_torch(loop):
    """Runs a loop with `torch.amp.GradScaler`, and returns it with the results."""
    import torch

    class Counting(torch.optim.SGD):
        """Counts its steps, since a gradient of 0 changes no weight."""

        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    scaler = torch.amp.GradScaler("cpu", **loop["arguments"])
    weights = [torch.ones(2, requires_grad=True) for _ in range(OPTIMIZERS)]
    optimizers = [Counting([weight], lr=0.25) for weight in weights]
    results = []
    for iteration in loop["iterations"]:
        stepped = []
        for index, way, value in iteration["acts"]:
            optimizer, weight = optimizers[index], weights[index]
            optimizer.zero_grad()
            scaler.scale(weight.sum() * float(value)).backward()
            if way != "step":
                scaler.unscale_(optimizer)
                weight.grad.clamp_(-1.0, 1.0)
            before = optimizer.steps
            if way != "look":
                scaler.step(optimizer)
            stepped.append(optimizer.steps > before)
        scaler.update(iteration["new_scale"])
        state = scaler.state_dict()
        results.append({"stepped": stepped, "scale": state["scale"], "tracker": state["_growth_tracker"]})
    return {**loop, "results": results, "weights": [weight.tolist() for weight in weights], "torch": torch.__version__}


def check(recorded, compiled=False):
    """Runs a loop with tfmixed, and compares all scales, growth trackers, steps and weights."""
    scaler = GradScaler(**recorded["arguments"])
    parts = [(keras.optimizers.SGD(0.25), keras.Variable([1.0, 1.0])) for _ in range(OPTIMIZERS)]
    of_function = tf.function if compiled else lambda function: function

    def act(way, optimizer, weight, value):
        grads = [scaler.scale(ops.ones((2,)) * value)]
        if way != "step":
            grads = [ops.clip(gradient, -1.0, 1.0) for gradient in scaler.unscale(optimizer, grads)]
        return way != "look" and scaler.step(optimizer, [(grads[0], weight)])

    def part(way, index):
        optimizer, weight = parts[index]
        optimizer.build([weight])
        return of_function(lambda value: act(way, optimizer, weight, value))

    acts = {(way, index): part(way, index) for way in WAYS for index in range(OPTIMIZERS)}
    update = of_function(scaler.update)
    for iteration, wanted in zip(recorded["iterations"], recorded["results"], strict=True):
        for (index, way, value), stepped in zip(iteration["acts"], wanted["stepped"], strict=True):
            assert bool(acts[way, index](ops.convert_to_tensor(float(value), "float32"))) is stepped
        new = iteration["new_scale"]
        update() if new is None else scaler.update(new)
        assert scaler.get_scale() == wanted["scale"]
        assert scaler.state_dict()["_growth_tracker"] == wanted["tracker"]
    for (_, weight), values in zip(parts, recorded["weights"], strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(weight), values, rtol=1e-4, atol=1e-4)


def test_a_recorded_loop():
    """With one to three optimizers in an iteration, unscale with and without step, and update(new_scale)."""
    check(json.loads(RECORDED.read_text())[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, LOOPS, 2 if BACKEND == "jax" else 1))
def test_all_recorded_loops(number):
    """Compiled on TensorFlow."""
    check(json.loads(RECORDED.read_text())[number], compiled=BACKEND == "tensorflow")


def test_the_recorded_loops_cover_all_calls():
    """All calls with finite and other values, and new scales."""
    iterations = [iteration for loop in json.loads(RECORDED.read_text()) for iteration in loop["iterations"]]
    calls = {(way, value in VALUES[:3]) for iteration in iterations for _, way, value in iteration["acts"]}
    assert calls == {(way, bad) for way in WAYS for bad in (False, True)}
    assert any(iteration["new_scale"] for iteration in iterations)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(LOOPS, LOOPS + MORE))
def test_random_loops(seed):
    """Not recorded."""
    pytest.importorskip("torch")
    check(run_torch(random_loop(2 * seed if BACKEND == "jax" else seed)))


@pytest.mark.slow
def test_the_installed_pytorch_does_what_was_recorded():
    """For all loops."""
    pytest.importorskip("torch")
    for seed, recorded in enumerate(json.loads(RECORDED.read_text())):
        assert {**run_torch(random_loop(seed)), "torch": recorded["torch"]} == recorded


@pytest.mark.slow
def test_state_dicts_load_both_ways():
    """PyTorch's and ours, and both continue in the same way."""
    torch = pytest.importorskip("torch")
    arguments = {"init_scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
    mine, real = GradScaler(**arguments), torch.amp.GradScaler("cpu", **arguments)
    their, our = torch.ones(2, requires_grad=True), keras.Variable([1.0, 1.0])
    optimizers = torch.optim.SGD([their], lr=0.25), keras.optimizers.SGD(0.25)

    def both(values):
        for value in values:
            optimizers[0].zero_grad()
            real.scale(their.sum() * value).backward()
            real.step(optimizers[0])
            real.update()
            mine.step(optimizers[1], [(mine.scale(ops.full((2,), value)), our)])
            mine.update()
            assert mine.get_scale() == real.get_scale()

    both([1.0, 1.0, 1.0, np.inf, 1.0, 1.0])
    saved_by_us, saved_by_them = mine.state_dict(), real.state_dict()
    assert saved_by_them.items() <= saved_by_us.items()
    mine, real = GradScaler(), torch.amp.GradScaler("cpu")
    mine.load_state_dict(saved_by_them)
    real.load_state_dict(saved_by_us)
    both([1.0, np.nan, 1.0, 1.0, 1.0])


@pytest.mark.slow
def test_the_scale_of_pytorch_reaches_0():
    """If the first half fails, a sentence of the class docstring can be removed (pytorch#98828)."""
    pytest.importorskip("torch")
    loop = {
        "arguments": {"init_scale": 1.0},
        "iterations": [{"acts": [[0, "step", "inf"]], "new_scale": None}] * 160,
    }
    assert run_torch(loop)["results"][-1]["scale"] == 0.0
    scaler, optimizer, weight = GradScaler(init_scale=1.0), keras.optimizers.SGD(0.25), keras.Variable([1.0, 1.0])
    for _ in range(160):
        scaler.step(optimizer, [(ops.full((2,), np.inf), weight)])
        scaler.update()
    assert scaler.get_scale() == 2.0**-126


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    RECORDED.write_text(json.dumps([run_torch(random_loop(seed)) for seed in range(LOOPS)]) + "\n")
