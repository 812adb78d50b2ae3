"""The share of a weight update that rounding to half precision discards."""

from __future__ import annotations

import copy
import dataclasses

import keras
import ml_dtypes
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import tfmixed
from tfmixed import LossScaleOptimizer, gradient_fidelity, measure_gradients, records
from tfmixed._probe.rounding_model import update_loss
from tfmixed._probe.update_probe import UpdateHistogram
from tfmixed.ranges import GradientRanges
from tfmixed.records import GradientRange, RangesRecord

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def model(optimizer="adam", policy="float32", **arguments):
    keras.utils.set_random_seed(0)
    stack = layers.Dense(5, activation="tanh", dtype=policy), layers.Dense(2, dtype=policy, name="last")
    made = keras.Sequential([keras.Input((6,)), *stack])
    made.compile(optimizer, loss="mse", run_eagerly=BACKEND == "tensorflow", **arguments)
    return made


def fit(made, epochs=1, callbacks=()):
    made.fit(X, X[:, :2], batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return made


def values(variables):
    return [np.asarray(ops.convert_to_numpy(variable.value), "float32") for variable in variables]


def counted(before, after):
    """Returns a record of the updates between two arrays."""
    histogram = UpdateHistogram()
    histogram.add(np.asarray(before, "float32"), np.asarray(after, "float32"))
    return dataclasses.replace(
        GradientRange("w", "weight", "l", "float32", 0, 0, 0.0, 0.0), updates=histogram.updates()
    )


def rounded(before, after, precision, scale=1.0):
    """Returns number and sum of the nonzero updates, and of those after which a cast gives the old number."""
    old = np.asarray(before, "float32").astype(DTYPES[precision]).astype("float64")
    update = (np.asarray(after, "float32") - np.asarray(before, "float32")).astype("float64")
    old, update = old[update != 0], update[update != 0]
    lost = (old + scale * update).astype(DTYPES[precision]).astype("float64") == old
    return len(update), np.abs(update).sum(), lost.sum(), np.abs(update[lost]).sum()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-3, 2.0**5])
def test_updates_near_ties_and_powers_of_two(precision, scale):
    """Each number of a few octaves, zeros and subnormal numbers, with updates at a quarter, half and one spacing."""
    bits = np.concatenate([np.arange(0x3C00, 0x4100, 7), np.arange(40), 0x3F80 + np.arange(-2, 3)]).astype("uint16")
    held = bits.view(DTYPES[precision]).astype("float64")
    above = (bits + 1).astype("uint16").view(DTYPES[precision]).astype("float64")
    factors = np.outer([1, -1], np.outer(2.0 ** np.arange(-7, 4), [1, 1 - 2.0**-9, 1 + 2.0**-9]).ravel()).ravel()
    after = held + np.outer(factors, above - held)
    exact = after.astype("float32") == after  # what float32 holds
    before, after = np.broadcast_to(held, after.shape)[exact], after[exact]
    assert len(before) > 10_000
    found = dataclasses.astuple(update_loss(counted(before, after), precision, scale))
    np.testing.assert_allclose(found, rounded(before, after, precision, scale), rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*2 * [st.floats(-(2.0**15), 2.0**15, width=32)]), min_size=1, max_size=20),
    st.sampled_from(sorted(DTYPES)),
)
def test_random_updates(pairs, precision):
    """Of float32 weights, which are rounded to the format first."""
    before, after = np.array(pairs, "float32").T
    found = dataclasses.astuple(update_loss(counted(before, after), precision))
    np.testing.assert_allclose(found, rounded(before, after, precision), rtol=1e-12)


def test_zero_and_nonfinite_updates_do_not_count():
    """Neither do weights that the format cannot hold."""
    loss = update_loss(counted([1.0, 1.0, np.inf, 1e5, 1.0], [1.0, np.nan, 1.0, 1e5 + 1, 2.0]), "float16")
    assert dataclasses.astuple(loss) == (1, 1.0, 0, 0.0)
    assert not counted([1.0], [1.0]).updates["bfloat16"]
    assert update_loss(counted([1e5], [2e5]), "bfloat16").count == 1


def stepped_in_float32(made):
    """Returns values and updates of a model's variables when Keras trains a float32 copy of it for one more batch."""
    wide = model(made.optimizer.from_config(made.optimizer.get_config()))
    wide.optimizer.build(wide.trainable_variables)
    ours, theirs = ((*trained.variables, *trained.optimizer.variables) for trained in (wide, made))
    for mine, old in zip(ours, theirs, strict=True):
        mine.assign(ops.cast(old.value, mine.dtype))
    before = values(wide.trainable_variables)
    wide.train_on_batch(X[:16], X[:16, :2])
    return zip(made.trainable_variables, before, values(wide.trainable_variables), strict=True)


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "optimizer", [keras.optimizers.Adam, pytest.param(keras.optimizers.SGD, marks=pytest.mark.slow)]
)
def test_updates_of_a_trained_model_are_those_of_float32_arithmetic(optimizer, policy):
    """And what rounding discards of them is what a cast discards."""
    made = fit(model(optimizer(2e-3), policy))
    found = {gradient.name: gradient for gradient in measure_gradients(made, (X[:16], X[:16, :2])) if gradient.updates}
    assert len(found) == 4
    for variable, before, after in stepped_in_float32(made):
        gradient = found[variable.path]
        assert gradient.rounded_to == ("bfloat16" if policy == "bfloat16" else "")
        for precision in DTYPES:
            # Gradients of bfloat16 variables are bfloat16.
            wanted, loss = rounded(before, after, precision), update_loss(gradient, precision)
            np.testing.assert_allclose(loss.size, wanted[1], rtol=4e-3)
            assert abs(loss.lost_count - wanted[2]) <= 2


OPTIMIZERS = {
    "adam": lambda: "adam",
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9), momentum=0.9),
    "average": lambda: keras.optimizers.AdamW(use_ema=True, ema_overwrite_frequency=2, global_clipnorm=0.1),
    "accumulation": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2),
    "muon": keras.optimizers.Muon,
    "scaled": lambda: LossScaleOptimizer("lion"),
}


@pytest.mark.parametrize("name", ["adam", *(pytest.param(n, marks=pytest.mark.slow) for n in list(OPTIMIZERS)[1:])])
@pytest.mark.parametrize("policy", ["bfloat16", pytest.param("float32", marks=pytest.mark.thorough)])
def test_training_is_not_affected(name, policy):
    """Bitwise the same weights and states, with an optimizer that is built and one that is not."""
    trained = []
    for is_measured in (False, True):
        made, watch = model(OPTIMIZERS[name](), policy), tfmixed.callbacks.GradientRanges(every=2)
        if is_measured:
            measure_gradients(made, (X, X[:, :2]), steps=1)
            assert not made.optimizer.built
        fit(made, callbacks=[watch] if is_measured else [])
        if is_measured:
            measure_gradients(made, (X, X[:, :2]), steps=1)
            assert any(gradient.updates for gradient in watch.last)
        trained.append(values((*fit(made).variables, *made.optimizer.variables)))
    for value, expected in zip(*trained, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_the_first_step_of_adam_is_the_learning_rate():
    """With states of 0; frozen layers and outputs have no update."""
    made = model(keras.optimizers.Adam(2.0**-10))
    made.get_layer("last").trainable = False
    found = measure_gradients(made, (X, X[:, :2]), batch_size=32)
    (kernel, bias) = (gradient for gradient in found if gradient.updates)
    count = sum(count for count, _ in kernel.updates["bfloat16"].values())
    size = sum(size for _, size in kernel.updates["bfloat16"].values())
    assert (count, size) == (30, pytest.approx(30 * 2.0**-10, rel=1e-3))
    assert found.update_loss(name=bias.name).lost_count == 0  # the value is 0, where numbers are dense
    assert found.update_loss(scale=2.0**20).share == 0 < found.update_loss(scale=2.0**-20).share


def test_a_step_that_overflows_has_no_update():
    """It is skipped."""
    x = X.copy()
    x[0, 0] = np.inf
    assert not any(gradient.updates for gradient in measure_gradients(model(), (x, X[:, :2])))


def test_fidelity_has_the_updates():
    """Those of the gradients in half precision."""
    found = gradient_fidelity(fit(model("sgd", "bfloat16")), (X, X[:, :2]))
    assert found.headings[-1] == "update lost, bfloat16"
    assert all(gradient.updates and gradient.rounded_to == "bfloat16" for gradient in found)
    assert all(row[-1].endswith("%") for row in found.rows())
    assert records.from_line(records.to_line(found.record)) == found.record


def test_optimizers_that_keep_what_rounding_discards():
    """The report does not warn of them."""

    class Stochastic(keras.optimizers.SGD):
        weights = "stochastic"

    found = measure_gradients(model(Stochastic(), "bfloat16"), (X, X[:, :2]))
    assert {gradient.rounded_to for gradient in found} == {""}


def test_records_and_arguments():
    """Records of earlier versions have no updates and no column."""
    found = measure_gradients(model(), (X, X[:, :2]))
    line = records.to_line(found.record)
    assert records.from_line(line) == found.record
    old = copy.deepcopy(found.record)
    old = dataclasses.replace(old, ranges=[dataclasses.replace(entry, updates={}) for entry in old.ranges])
    assert "lost" in str(found)
    assert "lost" not in str(GradientRanges(old))
    with pytest.raises(ValueError, match="name"):
        found.update_loss(name="nothing")
    with pytest.raises(ValueError, match="precision"):
        GradientRanges(RangesRecord(*dataclasses.astuple(old)[:6], found.record.ranges)).update_loss("float64")


@needs_tensorflow
@pytest.mark.slow
def test_two_replicas():
    """Under MirroredStrategy, without a change of training."""
    from replicas import mirrored

    trained = []
    for is_measured in (False, True):
        with mirrored().scope():
            made = keras.Sequential([keras.Input((6,)), layers.Dense(2, kernel_initializer="ones")])
            made.compile(LossScaleOptimizer("adam"), loss="mse")
        watch = tfmixed.callbacks.GradientRanges(every=2)
        if is_measured:
            measure_gradients(made, (X, X[:, :2]), steps=1)
        fit(made, callbacks=[watch] if is_measured else [])
        if is_measured:
            assert any(gradient.updates for gradient in watch.last)
        trained.append(values(made.variables))
    for value, expected in zip(*trained, strict=True):
        np.testing.assert_array_equal(value, expected)
