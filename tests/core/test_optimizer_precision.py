"""Warnings about optimizers whose constants half-precision variables round away, on all backends."""

from __future__ import annotations

import inspect
import warnings

import keras
import numpy as np
import pytest
from backend import BACKEND, apply
from keras import ops, optimizers

import tfmixed
from tfmixed import LossScaleOptimizer
from tfmixed._core import optimizer_precision
from tfmixed._core.optimizer_precision import describe, find

WRAPPERS = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
NAMES = sorted(
    name
    for name, kind in vars(optimizers).items()
    if inspect.isclass(kind) and issubclass(kind, optimizers.Optimizer) and name not in WRAPPERS
)
HALVES = ["bfloat16", "float16"]
GRADIENTS = [1.0, -1.0, 0.5, 0.0], [1e-3, -1e-3, 5e-4, 2e-3]


class Safe(optimizers.Adam):
    """Stands for an optimizer that computes in float32."""

    float32_arithmetic = True


def half(dtype="bfloat16", count=1):
    return [keras.Variable(np.zeros(4), dtype=dtype) for _ in range(count)]


def values(variable):
    return ops.convert_to_numpy(ops.cast(variable, "float32"))


def trained(optimizer, dtype, gradient, steps=3, start=0.0):
    """Returns the weights after some steps. From 0, no update is too small for rounding to nearest."""
    weight = keras.Variable(np.full(4, start), dtype=dtype)
    optimizer.build([weight])
    for _ in range(steps):
        optimizer.apply([ops.cast(ops.array(gradient, "float32"), dtype)], [weight])
    return values(weight)


def is_broken(name, dtype, gradient):
    """Returns whether weights do not move, are not finite, or move by a multiple of what they do in float32."""
    kind = getattr(optimizers, name)
    try:
        result = trained(kind(learning_rate=0.1), dtype, gradient)
    except TypeError:  # Nadam of PyTorch, whose arguments are NumPy's bfloat16 then
        return BACKEND == "torch"
    expected, moved = trained(kind(learning_rate=0.1), "float32", gradient), np.array(gradient) != 0
    ratio = result[moved] / expected[moved]
    return not np.isfinite(result).all() or bool(((ratio < 0.25) | (ratio > 4)).any())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_severe_finding_says_that_training_breaks(name, dtype):
    """And only then, with the defaults of every optimizer."""
    found = find(getattr(optimizers, name)(), [dtype])
    assert any(finding.severe for finding in found) == any(is_broken(name, dtype, gradient) for gradient in GRADIENTS)


@pytest.mark.parametrize("name", NAMES)
def test_float32_variables_have_no_findings(name):
    """With all that a base optimizer can do."""
    optimizer = getattr(optimizers, name)(weight_decay=1e-6, use_ema=True, gradient_accumulation_steps=4096)
    assert find(optimizer, [*half("float32"), "float64"]) == []


@pytest.mark.parametrize(
    ("make", "dtype", "constants"),
    [
        (lambda: optimizers.SGD(0.1), "bfloat16", []),
        (lambda: optimizers.SGD(0.1, momentum=0.9, ema_momentum=0.999), "bfloat16", []),
        (lambda: optimizers.SGD(0.999, momentum=0.999, clipnorm=0.999), "bfloat16", ["momentum"]),
        (lambda: optimizers.SGD(1e-9), "float16", ["learning_rate"]),
        (lambda: optimizers.SGD(lambda: 1e-9), "float16", []),
        (lambda: optimizers.Adam(beta_1=0.999, beta_2=0.95), "bfloat16", ["beta_1"]),
        (lambda: optimizers.Adam(beta_2=0.95), "bfloat16", []),
        (lambda: optimizers.RMSprop(rho=0.999), "bfloat16", ["rho"]),
        (lambda: optimizers.RMSprop(epsilon=1e-9), "float16", ["epsilon"]),
        (lambda: optimizers.SGD(use_ema=True), "bfloat16", ["ema_momentum"]),
        (lambda: optimizers.SGD(use_ema=True), "float16", []),
        (lambda: optimizers.SGD(use_ema=True, ema_momentum=0.999), "bfloat16", ["ema_momentum"]),
        (lambda: optimizers.SGD(gradient_accumulation_steps=256), "bfloat16", []),
        (lambda: optimizers.SGD(gradient_accumulation_steps=512), "bfloat16", ["gradient_accumulation_steps"]),
        (lambda: optimizers.SGD(0.1, weight_decay=0.1), "bfloat16", []),
        (lambda: optimizers.SGD(0.1, weight_decay=0.01), "bfloat16", ["1 - weight_decay * learning_rate"]),
        (lambda: optimizers.SGD(0.1, weight_decay=0.01), "float16", []),
    ],
)
def test_constants_are_found_by_their_values(make, dtype, constants):
    """Only those that the optimizer uses."""
    assert [finding.constant for finding in find(make(), [dtype])] == constants


def test_a_finding_names_everything():
    """Optimizer, constant, both values, dtype, number of variables, and a remedy that exists for the dtype."""
    (finding,) = find(optimizers.Adam(), half(count=3) + half("float32"))
    assert (finding.optimizer, finding.constant, finding.dtype, finding.variables) == ("Adam", "beta_2", "bfloat16", 3)
    assert (finding.value, finding.rounded) == (0.999, 1.0)
    (message,) = describe([finding])
    for words in ("Adam updates 3 bfloat16", "beta_2 = 0.999 becomes 1:", "LowPrecisionOptimizer", "'mixed_bfloat16'"):
        assert words in message
    (message,) = describe(find(optimizers.Adam(), half("float16")))
    assert "'mixed_float16'" in message
    assert "LowPrecisionOptimizer" not in message


def test_weights_do_not_decay_by_less_than_their_spacing():
    """As the finding says; a larger product is not reported and moves them."""
    for decay in (0.01, 0.1):
        optimizer = optimizers.SGD(0.1, weight_decay=decay)
        moved = trained(optimizer, "bfloat16", [0.0] * 4, start=0.5)[0] != 0.5
        assert moved == (not find(optimizer, ["bfloat16"]))


def test_averages_and_sums_stop_where_the_findings_say():
    """Averages of weights 33% away from them, and sums of gradients after 256 steps."""
    optimizer, weight = optimizers.SGD(0.0, use_ema=True), keras.Variable([1.0], dtype="bfloat16")
    optimizer.build([weight])
    average = optimizer._model_variables_moving_average[0]
    average.assign([1.0])
    optimizer._iterations.assign(1)
    weight.assign([1.25])
    optimizer._update_model_variables_moving_average([weight])
    assert values(average) == 1.0
    weight.assign([1.75])
    optimizer._update_model_variables_moving_average([weight])
    assert values(average) > 1.0
    (finding,) = find(optimizers.SGD(gradient_accumulation_steps=512), ["bfloat16"])
    most = ops.cast(ops.array(finding.rounded), "bfloat16")
    assert ops.convert_to_numpy(ops.cast(most + 1, "float32")) == most


class Custom(optimizers.Adam):
    """A class that Keras does not have."""


@pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="Keras 3.14 has no MultiOptimizer")
def test_optimizers_inside_others_are_found():
    """Also those of a subclass, with the variables that they update."""
    assert [finding.constant for finding in find(LossScaleOptimizer(Custom()), half())] == ["beta_2"]
    adam, sgd = optimizers.Adam(), optimizers.SGD()
    variables = half(count=3)
    both = optimizers.MultiOptimizer(lambda variable: sgd if variable is variables[0] else adam)
    both.build(variables)
    (finding,) = find(both, variables)
    assert (finding.optimizer, finding.variables) == ("Adam", 2)


def test_optimizers_with_float32_arithmetic_are_left_alone():
    """Also inside a scaling one. Their own rounding of weights decides about small updates."""
    for optimizer in (Safe(), LossScaleOptimizer(Safe())):
        assert find(optimizer, half()) == []
        assert optimizer_precision.keeps_small_updates(optimizer)
    assert not optimizer_precision.keeps_small_updates(optimizers.Adam())
    nearest = Safe()
    nearest.weights = "nearest"
    assert not optimizer_precision.keeps_small_updates(nearest)


def test_a_scaling_optimizer_warns_once_before_the_first_step():
    """Even if its inner optimizer gets another one."""
    inner, variables = optimizers.Adam(), half("float16")
    with pytest.warns(UserWarning, match=r"Adam updates 1 float16 .*mixed_float16"):
        LossScaleOptimizer(inner).build(variables)
    LossScaleOptimizer(inner).build(variables)
    optimizer = LossScaleOptimizer(optimizers.Nadam())
    with pytest.warns(UserWarning, match="beta_2"):
        optimizer.build(half())
    for optimizer in (Safe(), optimizers.SGD()):
        apply(LossScaleOptimizer(optimizer, 1), [ops.ones(4, "bfloat16")], half())


@pytest.mark.parametrize("policy", HALVES)
def test_pure_policies_warn_once(policy, monkeypatch):
    """With a constant of Adam. The mixed ones do not warn."""
    monkeypatch.setattr(tfmixed.policy, "_warned", {policy, f"mixed_{policy}"})  # that it is slow here
    tfmixed.set_policy(f"mixed_{policy}")
    with pytest.warns(UserWarning, match=f"Adam.*becomes.*'mixed_{policy}'"), tfmixed.policy_scope(policy):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tfmixed.set_policy(policy)
