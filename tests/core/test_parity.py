"""Optimizer, scaler and TensorFlow 1 optimizer take the same steps with the same rule, on all backends."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from backend import BACKEND, apply, tf
from keras import ops
from thorough import thorough

from tfmixed import GradScaler, LossScaleOptimizer, scaling
from tfmixed.scaling import DynamicScale, LogMaxScale

TRACE = "TTTFTTFFFTTTTTFT"
RULES = {
    "dynamic": DynamicScale(initial_scale=64.0, growth_interval=3),
    "hysteresis": DynamicScale(initial_scale=64.0, growth_interval=3, hysteresis=2),
    "floor": DynamicScale(initial_scale=4.0, growth_interval=3, min_scale=2.0, max_scale=8.0),
    "constant": 128.0,
    "logmax": LogMaxScale(max_scale=2.0**20),
    **{peer: scaling.like(peer) for peer in scaling.PEERS},
}
DEFAULT = ("hysteresis",)
# Presets of the same classes as the rules above, without DeepSpeed, which delays growths.
ALIKE = scaling.PEERS.keys() - {"deepspeed"}


class ByOptimizer:
    atol = 0.0

    def __init__(self, rule, weights):
        self.scaler, self.weights = LossScaleOptimizer(keras.optimizers.Adam(0.1), rule), weights

    def step(self, gradients):
        apply(self.scaler, [self.scaler.scale_loss(gradient) for gradient in gradients], self.weights)


class ByScaler:
    atol = 0.0

    def __init__(self, rule, weights):
        self.scaler, self.weights = GradScaler(rule=rule), weights
        self.optimizer = keras.optimizers.Adam(0.1)

    def step(self, gradients):
        gradients = self.scaler.scale([ops.convert_to_tensor(gradient) for gradient in gradients])
        self.scaler.step(self.optimizer, zip(gradients, self.weights, strict=True))
        self.scaler.update()


class ByScalerUnscaling(ByScaler):
    def step(self, gradients):
        gradients = self.scaler.scale([ops.convert_to_tensor(gradient) for gradient in gradients])
        gradients = self.scaler.unscale(self.optimizer, gradients)
        self.scaler.step(self.optimizer, zip(gradients, self.weights, strict=True))
        self.scaler.update()


class ByTensorFlow1:
    atol = 1e-4  # its Adam rounds differently

    def __init__(self, rule, weights):
        from tfmixed.compat.v1 import LossScaleOptimizer as Scaling

        self.weights = weights
        self.scaler = Scaling(tf.compat.v1.train.AdamOptimizer(0.1, epsilon=1e-7), rule)
        self.step = tf.function(self.step, autograph=False)

    def step(self, gradients):
        def loss():
            return tf.add_n([tf.reduce_sum(w.value * g) for w, g in zip(self.weights, gradients, strict=True)])

        self.scaler.minimize(loss, var_list=[weight.value for weight in self.weights])


def state(scaler):
    names = ("attempted_steps", "skipped_steps", "consecutive_skips")
    numbers = {name: int(getattr(scaler, name)) for name in names}
    of_rule = {name: float(scaler._state().read(scaler._state().name_of(name))) for name in scaler.rule.start()._fields}
    norm = float(scaler.gradient_norm)
    return {**numbers, **of_rule, "scale": float(scaler.loss_scale), "norm": norm if np.isfinite(norm) else np.nan}


def marks(name):
    return () if name in DEFAULT else thorough if name in ALIKE else pytest.mark.slow


@pytest.mark.parametrize("rule", [pytest.param(rule, id=name, marks=marks(name)) for name, rule in RULES.items()])
def test_all_adapters_take_the_same_steps(rule):
    """Rule state, counters, norm, events and weights are the same after every step."""
    kinds = (ByOptimizer, ByScaler, ByScalerUnscaling, *((ByTensorFlow1,) if BACKEND == "tensorflow" else ()))
    runs = [kind(rule, [keras.Variable([1.0, 2.0], name=name) for name in "ab"]) for kind in kinds]
    for number, letter in enumerate(TRACE):
        bad = np.float32((np.inf, np.nan)[number % 2] if letter == "F" else 2.0 ** (number % 5))
        gradients = [np.array([1.0, bad], "float32"), np.array([bad, 0.5], "float32")][:: 1 if number % 3 else -1]
        for run in runs:
            run.step(gradients)
        wanted, events = state(runs[0].scaler), runs[0].scaler.drain_events()
        for run in runs[1:]:
            got = state(run.scaler)
            assert got.keys() == wanted.keys()
            for name, value in got.items():
                # Norms are summed in another order, and XLA rounds logarithms differently.
                rough = name == "norm" or (isinstance(rule, LogMaxScale) and BACKEND == "jax")
                np.testing.assert_allclose(value, wanted[name], rtol=1e-5 if rough else 0, err_msg=name)
            if BACKEND != "jax" or not isinstance(rule, LogMaxScale):
                assert run.scaler.drain_events() == events
            for ours, theirs in zip(run.weights, runs[0].weights, strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=run.atol)
    assert wanted["skipped_steps"] == TRACE.count("F")
