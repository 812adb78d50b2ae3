"""Hyperparameters of optimizers that wrap another one, variables and Keras 2 names of a `LossScaleOptimizer`."""

from __future__ import annotations

import json
import operator

import keras
import numpy as np
import pytest
from backend import apply, needs_tensorflow, tf
from keras import ops

from tfmixed import LossScaleOptimizer, LowPrecisionOptimizer
from tfmixed._core.hyperparameters import HYPERPARAMETERS

VALUES = {
    "weight_decay": 0.25,
    "clipnorm": 0.5,
    "clipvalue": 0.5,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.5,
    "iterations": 7,
}
CALLED = ("assign", "assign_add", "assign_sub", "exclude_from_weight_decay", "update_step")
# Public names of Keras's base optimizer that the wrapper defines itself.
OWN = {
    *("name", "built", "loss_scale_factor"),
    # its step, of which the inner optimizer's is a part
    *("build", "apply", "apply_gradients", "stateless_apply", "scale_loss", "finalize_variable_values"),
    # files and configurations of both
    *("get_config", "from_config", "save_own_variables", "load_own_variables", "set_weights", "variables"),
    # its own variables
    *("add_variable", "add_variable_from_reference", "add_optimizer_variables"),
}


def weights(size=2):
    return [
        keras.Variable(np.ones(size, "float32"), name="kernel"),
        keras.Variable(np.ones(size, "float32"), name="bias"),
    ]


def trained(inner="adam", scale=8, steps=3):
    optimizer, own = LossScaleOptimizer(inner, scale), weights()
    for _ in range(steps):
        apply(optimizer, [ops.ones(2), ops.ones(2)], own)
    return optimizer


def multi():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("Keras 3.14 has no MultiOptimizer")
    parts = keras.optimizers.Adam(0.01, name="a"), keras.optimizers.SGD(0.1, name="b")
    return keras.optimizers.MultiOptimizer(lambda variable: parts["bias" not in variable.path])


def test_every_public_name_of_the_base_optimizer_is_known():
    """A new name in Keras belongs in one of these tables."""
    base = keras.optimizers.Optimizer
    public = {name for name in {*dir(base), *vars(base(0.1))} if not name.startswith("_")}
    assert public == OWN | {*VALUES, *CALLED}
    assert {*HYPERPARAMETERS, "learning_rate", "iterations"} == VALUES.keys()


wrappers = pytest.mark.parametrize("wrapper", [LossScaleOptimizer, LowPrecisionOptimizer])


@wrappers
@pytest.mark.parametrize("name", VALUES)
def test_hyperparameters_are_the_inner_optimizers(wrapper, name):
    """They are read from it and set on it."""
    optimizer = wrapper(keras.optimizers.AdamW())
    setattr(optimizer, name, VALUES[name])
    read = operator.attrgetter(name)
    assert read(optimizer) == read(optimizer.inner_optimizer) == VALUES[name]
    assert name not in vars(optimizer)


@wrappers
def test_hyperparameters_of_the_inner_optimizers_class(wrapper):
    """They are delegated too. A name that neither has is an AttributeError."""
    optimizer = wrapper(keras.optimizers.Adam(beta_1=0.5))
    assert optimizer.beta_1 == 0.5
    optimizer.beta_1, optimizer.remark = 0.25, "mine"
    assert optimizer.inner_optimizer.beta_1 == 0.25
    assert not hasattr(optimizer.inner_optimizer, "remark")
    assert {"beta_1", "inner_optimizer"} <= {*dir(optimizer)}
    with pytest.raises(AttributeError, match="momentum"):
        _ = optimizer.momentum


def test_a_hyperparameter_that_was_set_takes_effect():
    """In the next step."""
    optimizer, own = LossScaleOptimizer(keras.optimizers.SGD(0.5, weight_decay=0.1), 8), weights()
    optimizer.weight_decay, optimizer.learning_rate = 0.0, 0.25
    apply(optimizer, [8 * ops.ones(2), ops.zeros(2)], own)
    assert [variable.numpy().tolist() for variable in own] == [[0.75, 0.75], [1.0, 1.0]]


@wrappers
@pytest.mark.parametrize("name", CALLED)
def test_methods_are_the_inner_optimizers(wrapper, name):
    """For any class of optimizer."""
    optimizer = wrapper("sgd")
    assert getattr(optimizer, name) == getattr(optimizer.inner_optimizer, name)


def test_variables_are_excluded_from_weight_decay():
    """With the method of the wrapper."""
    optimizer, own = LossScaleOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5), 8), weights()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    apply(optimizer, [ops.zeros(2), ops.zeros(2)], own)
    assert [float(variable.numpy()[0]) for variable in own] == pytest.approx([0.95, 1.0])


def test_variables_of_averages_and_accumulation_are_created_once():
    """By the inner optimizer, although the wrapper has its hyperparameters."""
    inner = keras.optimizers.SGD(use_ema=True, gradient_accumulation_steps=2)
    optimizer = trained(inner)
    assert sum("average" in variable.path for variable in optimizer.variables) == 2
    assert len(optimizer.variables) == len({id(variable) for variable in optimizer.variables})


@wrappers
def test_loss_scale_factor_is_an_error(wrapper):
    """Keras's factor on the wrapper would divide gradients that were not multiplied by it."""
    optimizer = wrapper("sgd")
    with pytest.raises(ValueError, match="loss_scale_factor"):
        optimizer.loss_scale_factor = 128.0
    optimizer.loss_scale_factor = None
    assert optimizer.loss_scale_factor is None


def test_a_configuration_has_the_inner_optimizers_hyperparameters():
    """They are looked up by name. Keras's own class and JSON can still read its entries."""
    config = LossScaleOptimizer(keras.optimizers.Adam(0.25, beta_1=0.5)).get_config()
    assert (config["learning_rate"], config["beta_1"]) == (0.25, 0.5)
    with pytest.raises(KeyError, match="momentum"):
        _ = config["momentum"]
    for kind in (LossScaleOptimizer, keras.optimizers.LossScaleOptimizer):
        assert float(kind.from_config(json.loads(json.dumps(config))).learning_rate) == 0.25


# Variables.


def test_set_weights_restores_everything():
    """Moments, scale and counters."""
    old, new = trained(), LossScaleOptimizer("adam", 8)
    new.build(weights())
    new.set_weights([variable.numpy() for variable in old.variables])
    for ours, theirs in zip(new.variables, old.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert int(new.iterations) == 3


def test_set_weights_keeps_the_scale_within_the_rules_bounds():
    """As when a file is loaded."""
    optimizer = trained(scale="dynamic")
    values = [np.inf if variable is optimizer.dynamic_scale else variable.numpy() for variable in optimizer.variables]
    optimizer.set_weights(values)
    assert float(optimizer.loss_scale) == optimizer.rule.bounds[1]


@pytest.mark.parametrize("wrong", ["not built", "number", "shape"])
def test_set_weights_sets_all_or_nothing(wrong):
    """An error leaves the optimizer as it was."""
    values = [variable.numpy() for variable in trained().variables]
    new = LossScaleOptimizer("adam", 8)
    if wrong != "not built":
        new.build(weights(3 if wrong == "shape" else 2))
    with pytest.raises(ValueError, match={"number": "must have"}.get(wrong, "built|Build")):
        new.set_weights(values[:-1] if wrong == "number" else values)
    assert (int(new.iterations), int(new.attempted_steps)) == (0, 0)


def test_a_file_of_other_shapes_loads_nothing():
    """For a model of another width, the error names a variable."""
    store, new = {}, LossScaleOptimizer("adam", 8)
    trained().save_own_variables(store)
    new.build(weights(3))
    with pytest.raises(ValueError, match="shape"):
        new.load_own_variables(store)
    assert (int(new.iterations), int(new.attempted_steps)) == (0, 0)


# Keras 2.


def test_names_of_keras_2():
    """`lr` and `dynamic_counter`."""
    optimizer = trained(scale="dynamic")
    optimizer.lr = 0.5
    assert float(ops.convert_to_numpy(optimizer.lr)) == float(optimizer.inner_optimizer.learning_rate) == 0.5
    assert int(optimizer.dynamic_counter.numpy()) == 3
    assert LossScaleOptimizer("sgd", 8).dynamic_counter is None


def test_iterations_of_all_parts_are_set():
    """All of them count, for instance for the bias correction of Adam."""
    optimizer = trained(multi())
    optimizer.iterations = 7
    assert [int(part.iterations) for part in (optimizer, *optimizer.optimizers)] == [7, 7, 7]
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=2))
    optimizer.iterations = 7
    assert int(optimizer.iterations) == 7


@pytest.mark.parametrize("kind", ["Keras", pytest.param("TensorFlow", marks=needs_tensorflow)])
def test_a_variable_counts_the_iterations(kind):
    """For a script that shares its step count, as in Keras 2. Not once the optimizer is built."""
    counter = keras.Variable(5, dtype="int32", trainable=False) if kind == "Keras" else tf.Variable(5, dtype="int64")
    optimizer = LossScaleOptimizer("adam", 8)
    optimizer.iterations = counter
    apply(optimizer, [ops.ones(2), ops.ones(2)], weights())
    assert int(counter.numpy()) == int(optimizer.iterations) == 6
    assert len(optimizer.inner_optimizer.variables) == len(trained().inner_optimizer.variables)
    with pytest.raises(RuntimeError, match="built"):
        optimizer.iterations = keras.Variable(0, trainable=False)


@needs_tensorflow
def test_minimize():
    """A callable, or a tensor with its tape; eagerly and compiled."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(0.25), 1024), keras.Variable(8.0)
    assert int(optimizer.minimize(lambda: weight**2, lambda: [weight])) == 1
    with tf.GradientTape() as tape:
        loss = weight**2
    optimizer.minimize(loss, [weight], tape=tape)
    tf.function(lambda: optimizer.minimize(lambda: weight**2, weight))()
    assert float(weight.numpy()) == 1.0
    with pytest.raises(ValueError, match="tape"):
        optimizer.minimize(loss, [weight])


# Callbacks.


@pytest.mark.parametrize(
    "inner",
    [multi, pytest.param(lambda: keras.optimizers.Adam(0.01), marks=pytest.mark.slow)],
    ids=["MultiOptimizer", "Adam"],
)
def test_keras_callbacks_move_the_learning_rate(inner):
    """As without the wrapper, for the parts of a `MultiOptimizer` too."""

    def rates(wrap):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(wrap(inner()), loss="mse")
        callbacks = [
            keras.callbacks.LearningRateScheduler(lambda _, rate: rate * 0.5),
            keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1e9),
        ]
        x = np.ones((4, 2), "float32")
        history = model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=callbacks).history
        return {name: values for name, values in history.items() if name.startswith("learning_rate")}

    assert rates(lambda optimizer: LossScaleOptimizer(optimizer, 8)) == rates(lambda optimizer: optimizer)
