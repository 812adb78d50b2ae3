"""Files, resumed runs, conversions and training loops with a `LowPrecisionOptimizer`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow, take_step, tf
from keras import ops
from test_low_precision import FORMS, STATES, WEIGHTS, assert_same, gradients, moved, numbers, train, variables
from thorough import covering

from tfmixed import LossScaleOptimizer, LowPrecisionOptimizer

slow = pytest.mark.slow
X = np.random.default_rng(0).normal(size=(24, 80)).astype("float32")
Y = X[:, :1] * 2 + 1


def compiled(optimizer, policy="bfloat16"):
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(64, "tanh", dtype=policy)
    model = keras.Sequential([keras.Input((80,)), hidden, keras.layers.Dense(1, dtype=policy)])
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    return model


def fit(model, epochs=1, **arguments):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **arguments)


def inner(model):
    return getattr(model.optimizer, "inner_optimizer", None) if scales(model) else model.optimizer


def scales(model):
    return isinstance(model.optimizer, LossScaleOptimizer)


def assert_same_models(one, two):
    """Checks weights and states, as they are stored."""
    assert_same([*one.variables, *inner(one).variables], [*two.variables, *inner(two).variables])
    assert_same(one.optimizer.variables, two.optimizer.variables)


# Files.


@pytest.mark.parametrize(("weights", "states"), FORMS)
@pytest.mark.parametrize("how", ["model", pytest.param("weights", marks=slow)])
@pytest.mark.parametrize("outer", [False, pytest.param(True, marks=slow)])
def test_a_resumed_run_is_bit_identical(tmp_path, weights, states, how, outer):
    """Saved after an epoch, loaded and trained for another one."""

    def optimizer():
        made = LowPrecisionOptimizer(keras.optimizers.AdamW(0.01), weights, states, seed=3)
        return LossScaleOptimizer(made) if outer else made

    whole, first = compiled(optimizer()), compiled(optimizer())
    fit(whole, 2)
    fit(first)
    if how == "model":
        first.save(tmp_path / "model.keras")
        second = keras.models.load_model(tmp_path / "model.keras")
    else:
        first.save_weights(tmp_path / "model.weights.h5")
        second = compiled(optimizer())
        second.load_weights(tmp_path / "model.weights.h5")
    assert (inner(second).weights, inner(second).states, inner(second).seed) == (weights, states, 3)
    assert_same_models(first, second)
    fit(second)
    assert_same_models(whole, second)


@pytest.mark.parametrize("states", ["int8", pytest.param("float32", marks=slow), pytest.param("bfloat16", marks=slow)])
def test_a_file_of_keras_is_continued(tmp_path, states):
    """That of a `mixed_bfloat16` model with Keras's own Adam. With float32 states, bit for bit."""
    plain = compiled(keras.optimizers.Adam(0.01), "mixed_bfloat16")
    fit(plain)
    plain.save_weights(tmp_path / "model.weights.h5")
    ours = compiled(LowPrecisionOptimizer(keras.optimizers.Adam(0.01), states=states), "mixed_bfloat16")
    ours.load_weights(tmp_path / "model.weights.h5")
    fit(plain)
    fit(ours)
    if states == "float32":
        assert_same([*plain.variables, *plain.optimizer.variables], [*ours.variables, *ours.optimizer.variables])
    for one, two in zip(numbers(plain.trainable_variables), numbers(ours.trainable_variables), strict=True):
        np.testing.assert_allclose(one, two, atol=0.01)
    back = compiled(keras.optimizers.Adam(0.01), "mixed_bfloat16")
    ours.save_weights(tmp_path / "back.weights.h5")
    back.load_weights(tmp_path / "back.weights.h5")
    assert int(back.optimizer.iterations) == int(ours.optimizer.iterations) == 6
    if states == "float32":
        assert_same(plain.optimizer.variables, back.optimizer.variables)


@pytest.mark.parametrize(
    ("before", "after"),
    covering(
        1, {f"{w}-{s}": (w, s) for w in WEIGHTS for s in STATES}, {f"{w}-{s}": (w, s) for w in WEIGHTS for s in STATES}
    ),
)
def test_files_convert_between_forms(before, after):
    """Each form reads the others' files: what it holds is the nearest that it can."""
    store, copy, own = {}, {}, variables()
    old = train(LowPrecisionOptimizer(keras.optimizers.Adam(0.01), *before), own, 2)
    old.save_own_variables(store)
    other = variables()
    new = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), *after)
    new.build(other)
    for mine, value in zip(other, own, strict=True):
        mine.assign(value)
    new.load_own_variables(Store(store))
    new.save_own_variables(copy)
    assert int(new.iterations) == 2
    for name in {*store} & {*copy}:
        limit = {"float32": 0, "bfloat16": 2.0**-8, "int8": 4 / 127}[after[1]] * (before[1] != after[1])
        largest = np.abs(store[name]).max()
        np.testing.assert_allclose(copy[name], store[name], rtol=0, atol=limit * largest, err_msg=name)
    train(new, other, range(2, 3))
    assert all(np.isfinite(value).all() for value in numbers(other))


class Store(dict):
    """A group of a file, as `load_own_variables` gets it."""


def test_a_file_of_another_model_changes_nothing():
    """It warns of the number of variables."""
    store = {}
    train(LowPrecisionOptimizer("sgd"), variables(), 1).save_own_variables(store)
    new = LowPrecisionOptimizer("adam")
    new.build(variables())
    with pytest.warns(UserWarning, match="Skipping"):
        new.load_own_variables(store)
    assert int(new.iterations) == 0


@pytest.mark.parametrize(("weights", "states"), FORMS)
def test_weights_of_the_optimizer_are_set(weights, states):
    """In the forms in which they are stored."""
    own = variables()
    old = train(LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states), own, 2)
    new = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states)
    new.build(variables())
    new.set_weights([ops.convert_to_numpy(variable) for variable in old.variables])
    assert_same(old.variables, new.variables)


def test_conversion_to_keras_and_back():
    """With split weights and float32 states, a run goes on bit for bit in plain float32, and the other way around."""
    own, wide, plain = variables(), variables("float32"), keras.optimizers.AdamW(0.01)
    ours = train(LowPrecisionOptimizer(keras.optimizers.AdamW(0.01), "split", "float32", fuse=False), own, 3)
    train(plain, wide, 3, dtype="float32")
    converted, copies = None, variables("float32")
    converted = ours.to_keras(copies)
    assert isinstance(converted, keras.optimizers.AdamW)
    assert_same([*copies, *converted.variables], [*wide, *plain.variables])
    halves = variables()
    back = LowPrecisionOptimizer.from_keras(plain, halves, weights="split", states="float32", fuse=False)
    for optimizer, weights, dtype in ((converted, copies, "float32"), (plain, wide, "float32"), (back, halves, None)):
        train(optimizer, weights, range(3, 6), dtype=dtype)
    assert_same([*copies, *converted.variables], [*wide, *plain.variables])
    assert_same([*back.to_keras(variables("float32")).variables], plain.variables)
    assert_same([view.value for view in back._created.views], wide)


@pytest.mark.parametrize("states", ["int8", pytest.param("float32", marks=slow), pytest.param("bfloat16", marks=slow)])
def test_configuration(states):
    """With an inner optimizer that has a schedule."""
    rate = keras.optimizers.schedules.CosineDecay(0.1, 100)
    optimizer = LowPrecisionOptimizer(keras.optimizers.Lion(rate, beta_1=0.5), "split", states, seed=9, fuse=False)
    for copy in (
        LowPrecisionOptimizer.from_config(optimizer.get_config()),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
    ):
        assert (copy.weights, copy.states, copy.seed, copy.name) == ("split", states, 9, optimizer.name)
        assert copy.get_config() == optimizer.get_config()
        assert copy.inner_optimizer.beta_1 == 0.5


# Variables of all sorts.


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_missing_gradients_and_frozen_variables():
    """A variable without a gradient stays, with its states, and what is not given stays too."""
    own = variables()
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.1), "split", "int8")
    optimizer.build(own)
    before = {
        variable.path: value for variable, value in zip(optimizer.variables, numbers(optimizer.variables), strict=True)
    }
    values = [ops.convert_to_tensor(gradient, "bfloat16") for gradient in gradients(0)]
    if BACKEND == "jax":
        take_step(optimizer, [values[0], None, values[2]], own)
    else:
        optimizer.apply([values[0], None, values[2]], own)
    assert [share > 0.5 for share in moved(own)] == [True, False, True]
    for variable in optimizer.variables:
        if "bias" in variable.path:
            np.testing.assert_array_equal(numbers([variable])[0], before[variable.path])
    if BACKEND != "jax":
        optimizer.apply(values[1:2], own[1:2])  # a part of the variables
        assert min(moved(own)) > 0.5
        assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("outer", [False, True])
def test_variables_that_hold_gradients_are_overwritten(outer):
    """As the scales of float8 layers are."""
    held = keras.Variable(np.ones(3), dtype="float32", name="scale")
    held.overwrite_with_gradient = True
    own = [*variables(), held]
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.1))
    outside = LossScaleOptimizer(optimizer, 8) if outer else optimizer
    outside.build(own)
    grads = [*(8 * gradient if outer else gradient for gradient in gradients(0)), np.array([1.0, 2.0, 4.0], "float32")]
    if outer:
        outside.scale_loss(0.0)
    dtypes = ["bfloat16"] * 3 + ["float32"]
    take_step(outside, [ops.convert_to_tensor(*pair) for pair in zip(grads, dtypes, strict=True)], own)
    np.testing.assert_array_equal(numbers([held])[0], [1.0, 2.0, 4.0])
    assert min(moved(own[:3])) > 0.5


@pytest.mark.skipif(BACKEND == "jax", reason="JAX disables float64 by default")
def test_dtypes_side_by_side():
    """float64 stays float64, in arithmetic and states; float32 weights only have smaller states."""
    dtypes = ("float64", "float32", "bfloat16")
    own = [keras.Variable(np.full((80, 64), 1.0), dtype=dtype, name=dtype) for dtype in dtypes]
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(1e-9, epsilon=1e-12))
    optimizer.build(own)
    for _ in range(2):
        optimizer.apply([ops.ones((80, 64), variable.dtype) for variable in own], own)
    assert np.all(np.abs(ops.convert_to_numpy(own[0]) - (1 - 2e-9)) < 1e-13)
    states = {variable.path.rpartition("/")[2]: variable.dtype for variable in optimizer.variables[2:]}
    assert states == {
        f"{dtype}_{state}": "float64" if dtype == "float64" else "bfloat16"
        for dtype in dtypes
        for state in ("momentum", "velocity")
    }


@pytest.mark.parametrize("weights", WEIGHTS)
def test_constraints(weights):
    """Of float32 values, after the update. Rounding may leave the set by half the distance to the next number."""
    own = variables("bfloat16")
    own[0].constraint, own[1].constraint = keras.constraints.NonNeg(), keras.constraints.MaxNorm(0.5, axis=0)
    train(LowPrecisionOptimizer(keras.optimizers.SGD(0.1), weights), own, 3)
    kernel, bias, _ = numbers(own)
    assert kernel.min() == 0
    assert np.linalg.norm(bias) == pytest.approx(0.5, rel=2e-3 if weights != "stochastic" else 4e-3)


class Momentum(keras.optimizers.Optimizer):
    """An optimizer of a user's own, with a slot, a shared scalar, and several ways to write."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.slots = self.add_optimizer_variables(variables, "slot")
        self.largest = self.add_variable((), name="largest", dtype="float32")

    def update_step(self, gradient, variable, learning_rate):
        slot = self.slots[self._get_variable_index(variable)]
        gradient, rate = ops.cast(gradient, variable.dtype), ops.cast(learning_rate, variable.dtype)
        self.assign(slot, slot * 0.5 + gradient)
        self.largest.assign(ops.maximum(self.largest, ops.max(ops.abs(slot))))
        self.assign_sub(variable, rate * slot / self.largest)
        variable.assign_add(0.25 * rate * slot)


@pytest.mark.parametrize("states", ["int8", pytest.param("float32", marks=slow), pytest.param("bfloat16", marks=slow)])
def test_an_optimizer_of_ones_own(states):
    """Its slots are stored in few bits, what it shares in float32, and its steps are those of float32."""
    own, wide = variables(), variables("float32")
    optimizer = train(LowPrecisionOptimizer(Momentum(0.1), "split", states, fuse=False), own, 4)
    plain = train(Momentum(0.1), wide, 4, dtype="float32")
    limit = 0 if states == "float32" else 0.02
    for view, value in zip(optimizer._created.views, numbers(wide), strict=True):
        np.testing.assert_allclose(numbers([view.value])[0], value, atol=limit)
    np.testing.assert_allclose(float(optimizer.largest), float(plain.largest), rtol=limit)
    assert optimizer.largest.dtype == "float32"


# Loops.


def test_learning_rate_callbacks():
    """Schedules by a callback set the inner optimizer's rate, and its history is that of Keras."""

    def rates(optimizer):
        callback = keras.callbacks.LearningRateScheduler(lambda _, rate: rate * 0.5)
        return fit(compiled(optimizer), 2, callbacks=[callback]).history["learning_rate"]

    assert rates(LowPrecisionOptimizer(keras.optimizers.SGD(0.1))) == rates(keras.optimizers.SGD(0.1))


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras 3.14 has no MultiOptimizer")
def test_members_of_a_multi_optimizer():
    """Wrapped ones train in it, also inside `LossScaleOptimizer`."""
    parts = [LowPrecisionOptimizer(kind) for kind in (keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01))]
    multi = keras.optimizers.MultiOptimizer(lambda variable: parts["bias" in variable.path])
    model = compiled(LossScaleOptimizer(multi))
    before = numbers(model.trainable_variables)
    fit(model)
    after = numbers(model.trainable_variables)
    assert all((one != two).any() for one, two in zip(before, after, strict=True))
    assert all(np.isfinite(value).all() for value in numbers(model.optimizer.variables[:-5]))
    with pytest.raises(TypeError, match="members"):
        LowPrecisionOptimizer(keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD())))


@pytest.mark.skipif(BACKEND != "torch", reason="needs PyTorch")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_loop_of_pytorch(weights):
    """With gradients that `backward` leaves."""
    model = compiled(LowPrecisionOptimizer(keras.optimizers.Adam(0.02), weights))
    losses, loss = [], keras.losses.MeanSquaredError()
    for _ in range(30):
        model.zero_grad()
        value = loss(ops.convert_to_tensor(Y), model(X))
        value.backward()
        model.optimizer.apply([v.value.grad for v in model.trainable_weights], model.trainable_weights)
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] / 2
    assert all(variable.value.requires_grad for variable in model.trainable_variables)


@needs_tensorflow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_loop_of_tensorflow(weights):
    """Built inside of a function."""
    model = compiled(keras.optimizers.SGD())
    optimizer, own = LowPrecisionOptimizer(keras.optimizers.Adam(0.02), weights), model.trainable_variables

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(model(X), "float32") - Y) ** 2)
        optimizer.apply_gradients(zip(tape.gradient(loss, own), own, strict=True))
        return loss

    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert int(optimizer.iterations) == 30


@needs_tensorflow
def test_eager_and_compiled_steps_agree():
    """Up to one number, since compiled operations round in another order."""
    eager, graph = variables(), variables()
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.01))
    optimizer.build(eager)
    for step in range(2):
        optimizer.apply([ops.convert_to_tensor(gradient, "bfloat16") for gradient in gradients(step)], eager)
    train(LowPrecisionOptimizer(keras.optimizers.Adam(0.01)), graph, 2)
    for one, two in zip(numbers(eager), numbers(graph), strict=True):
        np.testing.assert_allclose(one, two, rtol=2.0**-7, atol=1e-6)
        assert np.mean(one != two) < 0.01


@pytest.mark.parametrize("outer", [False, True])
def test_split_weights_that_are_set_stay_finite(tmp_path, outer):
    """Also 0, whose low bits would make it NaN. A file with scaling loads."""
    made = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), "split")
    model = compiled(LossScaleOptimizer(made, 16) if outer else made)
    start = model.get_weights()
    fit(model)
    model.set_weights([np.zeros_like(value) for value in start])
    fit(model)
    assert all(np.isfinite(value).all() for value in numbers(model.variables))
    model.save(tmp_path / "model.keras")
    assert_same_models(model, keras.models.load_model(tmp_path / "model.keras"))


def test_conversions_are_checked_before_anything_is_written():
    """Optimizers that are not built, other shapes, wrapped optimizers."""
    optimizer, own = LowPrecisionOptimizer("adam"), variables()
    with pytest.raises(ValueError, match="built"):
        optimizer.to_keras(variables("float32"))
    optimizer.build(own)
    with pytest.raises(ValueError, match="shapes"):
        optimizer.to_keras(variables("float32")[:1])
    with pytest.raises(ValueError, match="built"):
        LowPrecisionOptimizer.from_keras(keras.optimizers.Adam(), own)
    with pytest.raises(ValueError, match="itself"):
        LowPrecisionOptimizer(LowPrecisionOptimizer("adam"))
