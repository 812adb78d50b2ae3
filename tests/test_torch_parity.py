"""Random traces against the real `torch.amp.GradScaler`. Needs torch: `make test-backends` has it."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest
from backend import BACKEND
from keras import ops

from tfmixed import GradScaler

torch = pytest.importorskip("torch")

TRACES = int(os.environ.get("TFMIXED_PARITY_TRACES", "12"))
STEPS, OPTIMIZERS = 50, 3
VALUES = np.array([np.inf, -np.inf, np.nan, 1.0, 1e-3, 0.0, 100.0], "float32")


def numbers(random):
    """Returns arguments that lead to many growths and backoffs; on JAX factors that float32 has."""
    exact = BACKEND == "jax"
    return {
        "init_scale": float(2.0 ** random.integers(0, 17)),
        "growth_factor": float(random.choice([2.0, 4.0, 1.5] if exact else [2.0, 1.7, 1.001])),
        "backoff_factor": float(random.choice([0.5, 0.25] if exact else [0.5, 0.7, 0.999])),
        "growth_interval": int(random.integers(1, 6)),
    }


def theirs(scaler, optimizer, weight, value, unscale):
    """Takes a step of PyTorch's, and returns whether the weight moved."""
    optimizer.zero_grad()
    scaler.scale(weight.sum() * float(value)).backward()
    if unscale:
        scaler.unscale_(optimizer)
        weight.grad.clamp_(-1.0, 1.0)
    before = optimizer.steps
    scaler.step(optimizer)
    return optimizer.steps > before


def ours(scaler, optimizer, weight, value, unscale):
    """Takes the same step of ours."""
    grads = [scaler.scale(ops.full((2,), float(value)))]
    if unscale:
        grads = [ops.clip(each, -1.0, 1.0) for each in scaler.unscale(optimizer, grads)]
    return bool(scaler.step(optimizer, zip(grads, [weight], strict=True)))


class Counting(torch.optim.SGD):
    """Counts its steps: a gradient of 0 moves nothing."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize("seed", range(TRACES))
def test_every_step_is_that_of_pytorch(seed):
    """Scale, growth tracker, decisions and weights, with one to three optimizers, unscale and update(new_scale)."""
    random = np.random.default_rng(seed)
    arguments = numbers(random)
    mine, real = GradScaler(**arguments), torch.amp.GradScaler("cpu", **arguments)
    weights = [torch.ones(2, requires_grad=True) for _ in range(OPTIMIZERS)]
    their = [(Counting([weight], lr=0.25), weight) for weight in weights]
    our = [(keras.optimizers.SGD(0.25), keras.Variable([1.0, 1.0])) for _ in range(OPTIMIZERS)]
    odds = np.array([0.05, 0.05, 0.05, 0.3, 0.2, 0.05, 0.3])
    for _ in range(STEPS):
        chosen = np.flatnonzero(random.random(OPTIMIZERS) < 0.6)
        for index in chosen if chosen.size else [0]:
            value, unscale = random.choice(VALUES, p=odds), bool(random.random() < 0.5)
            assert ours(mine, *our[index], value, unscale) == theirs(real, *their[index], value, unscale)
        new = float(2.0 ** random.integers(-3, 17)) if random.random() < 0.05 else None
        mine.update(new)
        real.update(new)
        state = real.state_dict()
        assert mine.get_scale() == state["scale"]
        assert mine.state_dict()["_growth_tracker"] == state["_growth_tracker"]
    for (_, weight), (_, tensor) in zip(our, their, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(weight), tensor.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_states_go_both_ways():
    """What one saves the other loads, and both go on alike."""
    arguments = {"init_scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
    mine, real = GradScaler(**arguments), torch.amp.GradScaler("cpu", **arguments)
    weight = torch.ones(2, requires_grad=True)
    their, our = (Counting([weight], lr=0.25), weight), (keras.optimizers.SGD(0.25), keras.Variable([1.0, 1.0]))

    def both(values):
        for value in values:
            ours(mine, *our, value, False)
            theirs(real, *their, value, False)
            mine.update()
            real.update()
            assert mine.get_scale() == real.get_scale()

    both([1.0, 1.0, 1.0, np.inf, 1.0, 1.0])
    saved_by_us, saved_by_them = mine.state_dict(), real.state_dict()
    assert saved_by_them.items() <= saved_by_us.items()
    mine, real = GradScaler(), torch.amp.GradScaler("cpu")
    mine.load_state_dict(saved_by_them)
    real.load_state_dict(saved_by_us)
    both([1.0, np.nan, 1.0, 1.0, 1.0])


def test_where_pytorchs_scale_reaches_0_ours_does_not():
    """The day the first half fails, a sentence of the class docstring can go (pytorch#98828)."""
    mine, real = GradScaler(init_scale=1.0), torch.amp.GradScaler("cpu", init_scale=1.0)
    weight = torch.ones(2, requires_grad=True)
    their, our = (Counting([weight], lr=0.25), weight), (keras.optimizers.SGD(0.25), keras.Variable([1.0, 1.0]))
    for _ in range(160):
        ours(mine, *our, np.inf, False)
        theirs(real, *their, np.inf, False)
        mine.update()
        real.update()
    assert real.get_scale() == 0.0
    assert mine.get_scale() == 2.0**-126
