"""Tests for JAX and PyTorch; `make test-backends` also runs most other test files there."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import keras
import numpy as np
import pytest
from backend import BACKEND, made_up
from keras import ops

import tfmixed
from tfmixed import LossScaleOptimizer
from tfmixed.scaling import DynamicScale


@pytest.mark.skipif(BACKEND == "tensorflow", reason="needs a backend without TensorFlow")
def test_no_module_needs_tensorflow():
    """Except the shim for TensorFlow 1, which raises an error that names it."""
    for module in pkgutil.walk_packages(tfmixed.__path__, "tfmixed.", onerror=lambda _: None):
        if not module.name.startswith("tfmixed.compat.v1"):
            importlib.import_module(module.name)
    with pytest.raises(ImportError, match="TensorFlow"):
        importlib.import_module("tfmixed.compat.v1")
    assert "tensorflow" not in sys.modules


@made_up
@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras has no stateless_apply on TensorFlow")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_stateless_apply_takes_values_to_values(jit, bad):
    """A skipped step changes no weight and no inner state, and assigns no variable."""
    if jit and BACKEND != "jax":
        pytest.skip("jax.jit, which other backends lack")
    weight = keras.Variable([1.0, 2.0], name="only")
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.5), DynamicScale(initial_scale=8.0))
    optimizer.build([weight])
    step = optimizer.stateless_apply
    if jit:
        import jax

        step = jax.jit(step)
    start = [ops.copy(variable.value) for variable in optimizer.variables]
    weights, state = step(start, [ops.array([8.0, bad])], [weight.value])
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[0]), [1.0, 2.0])
    count = len(optimizer.inner_optimizer.variables)
    for new, old in zip(state[-count:], start[-count:], strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(new), ops.convert_to_numpy(old))
    weights, state = step(state, [ops.array([4.0, 4.0])], weights)
    np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), [0.5, 1.5], rtol=1e-4)
    assert (int(optimizer.attempted_steps), float(optimizer.loss_scale)) == (0, 8.0)
    for variable, value in zip(optimizer.variables, state, strict=True):
        variable.assign(value)
    assert (int(optimizer.attempted_steps), int(optimizer.skipped_steps)) == (2, 1)
    assert [(event.step, event.new_scale, event.variable) for event in optimizer.drain_events()] == [(0, 4.0, "only")]


def test_an_error_in_a_callback_is_not_hidden():
    """On JAX, `fit` also finalizes the optimizer after an exception, when its variables are empty."""

    class Broken(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                raise ZeroDivisionError

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(LossScaleOptimizer("sgd"), loss="mse")
    with pytest.raises(ZeroDivisionError):
        model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, verbose=0, callbacks=[Broken()])
