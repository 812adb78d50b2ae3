"""`LowPrecisionOptimizer`: weights and states in few bits, updated in float32 arithmetic."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from backend import BACKEND, made_up, needs_tensorflow, take_step, tf
from keras import ops
from thorough import covering

from tfmixed import LossScaleOptimizer, LowPrecisionOptimizer, scaling

slow = pytest.mark.slow
WEIGHTS, STATES = ("stochastic", "split", "nearest"), ("float32", "bfloat16", "int8")
EXCLUDED = {
    "Optimizer",  # the base class
    "LossScaleOptimizer",  # stands outside
    "MultiOptimizer",  # its members are wrapped
}
KINDS = {
    name: kind
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer) and name not in EXCLUDED
}
# Where Keras's own code needs it to take part in an update.
ARGUMENTS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}, "Adam": {"amsgrad": True}}
SHAPES = {"kernel": (80, 64), "bias": (64,), "embeddings": (70, 64)}


def initial(seed=0, shapes=SHAPES):
    """Returns values that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    return {name: exact(rng.normal(size=shape)) for name, shape in shapes.items()}


def exact(values):
    return ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(values, "bfloat16"), "float32"))


def variables(dtype="bfloat16", shapes=SHAPES, **arguments):
    return [keras.Variable(value, dtype=dtype, name=name, **arguments) for name, value in initial(0, shapes).items()]


def gradients(step, shapes=SHAPES):
    """Returns the gradients of a step, whose sizes span some decades."""
    rng = np.random.default_rng(1000 + step)
    return [exact(rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0, shape)) for shape in shapes.values()]


def train(optimizer, weights, steps, grads=gradients, dtype=None):
    """Applies gradients in a compiled step where the backend has one."""
    if not optimizer.built:
        optimizer.build(weights)
    step = tf.function(lambda *g: optimizer.apply(g, weights)) if BACKEND == "tensorflow" else None
    for number in steps if isinstance(steps, range) else range(steps):
        values = [ops.convert_to_tensor(gradient, dtype or weights[0].dtype) for gradient in grads(number)]
        step(*values) if step else take_step(optimizer, values, weights)
    return optimizer


def numbers(variables):
    """Returns values of variables as float32 or integer arrays."""
    values = [ops.convert_to_numpy(variable) for variable in variables]
    return [value.astype("float32") if value.dtype.kind not in "iu" else value for value in values]


def assert_same(ours, theirs):
    for one, two in zip(numbers(ours), numbers(theirs), strict=True):
        np.testing.assert_array_equal(one, two)


def options(kind, **arguments):
    """Returns hyperparameters of every sort."""
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.5)
    own = {"learning_rate": rate, "weight_decay": 0.01, "global_clipnorm": 5.0, "use_ema": True, "ema_momentum": 0.5}
    return kind(**ARGUMENTS.get(kind.__name__, {}), **own, **arguments)


def moved(weights):
    return [np.mean(new != old) for new, old in zip(numbers(weights), initial().values(), strict=True)]


# All inner optimizers.


@pytest.mark.parametrize(("name", "weights", "states"), covering(1, list(KINDS), WEIGHTS, STATES))
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.thorough)])
def test_every_optimizer_trains(name, weights, states, dtype):
    """With a schedule, clipping, weight decay, averages and accumulation: weights move and stay finite."""
    inner = options(KINDS[name], gradient_accumulation_steps=2, ema_overwrite_frequency=3)
    own = variables(dtype)
    optimizer = train(LowPrecisionOptimizer(inner, weights, states), own, 8)
    assert [variable.dtype for variable in own] == [dtype] * 3
    assert all(np.isfinite(value).all() for value in numbers([*own, *optimizer.variables]))
    assert min(moved(own)) > 0.01  # Adadelta's first updates are small
    assert int(optimizer.iterations) == int(ops.convert_to_numpy(inner._iterations)) // 2 == 4


@pytest.mark.parametrize("name", KINDS)
def test_split_weights_are_those_of_float32(name):
    """Bit for bit those of Keras's optimizer over float32 variables, and so are states and averages."""
    if name == "ScheduleFreeAdamW" and BACKEND != "jax":
        pytest.skip("Keras reads a state after it has written it, where its code for JAX has the value before")
    inner = [options(KINDS[name], gradient_accumulation_steps=2, ema_overwrite_frequency=3) for _ in range(2)]
    check_split(*inner, steps=8)


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=slow)])
def test_split_weights_are_those_of_float32_after_many_steps(steps):
    """With Adam, whose updates are small against a bfloat16 number."""
    check_split(keras.optimizers.Adam(1e-4), keras.optimizers.Adam(1e-4), steps)


def check_split(inner, plain, steps):
    own, wide = variables(), variables("float32")
    optimizer = train(LowPrecisionOptimizer(inner, "split", "float32", fuse=False), own, steps)
    train(plain, wide, steps, dtype="float32")
    assert_same([view.value for view in optimizer._created.views], wide)
    assert_same(optimizer._plain_variables(), plain.variables)
    assert min(moved(wide)) > 0.1
