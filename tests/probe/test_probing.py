from __future__ import annotations

import functools
import random

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow, tf
from exact_ranges import counted
from keras import layers, ops
from thorough import thorough

import tfmixed
from tfmixed import LossScaleOptimizer, measure_gradients
from tfmixed._probe import gradient_histogram
from tfmixed._probe.rounding_model import losses
from tfmixed._probe.train_step_probe import Probe
from tfmixed._utils import temporary_state
from tfmixed.losses import SparseCategoricalCrossentropy

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 6)).astype("float32")
Y = RNG.normal(size=(24, 2)).astype("float32")


EAGER = BACKEND == "tensorflow"  # where tracing a step takes longer than to run it


def linear(optimizer="sgd", run_eagerly=EAGER):
    """One product, with gradients that can be computed by hand."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2, name="only")])
    model.compile(optimizer, loss="mse", run_eagerly=run_eagerly)
    return model


def by_name(found):
    return {(gradient.kind, gradient.name.rpartition("/")[2]): gradient for gradient in found}


def same(range_, values, rtol=0.0):
    """Asserts that the counts are those of these values."""
    wanted = counted(values)
    assert (range_.zeros, range_.nonzeros) == (wanted.zeros, wanted.nonzeros)
    np.testing.assert_allclose([range_.smallest, range_.largest], [wanted.smallest, wanted.largest], rtol=rtol or 1e-7)
    if not rtol:
        assert range_.octaves == wanted.octaves


def planted(gradient):
    """A model whose activation gradients are exactly these: its loss is the product with them."""
    model = keras.Sequential(
        [keras.Input(gradient.shape[1:]), layers.EinsumDense("bi,i->bi", gradient.shape[1:], name="scaling")]
    )
    model.compile("sgd", loss=lambda y, x: ops.sum(y * x, axis=-1), run_eagerly=EAGER)
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


EXPONENTS = np.arange(-80, 40)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_planted_magnitudes_come_back_exactly(scale):
    """From 2^-80 to 2^40, with mantissas at the limits of rounding, and zeros."""
    mantissas = np.array([1, 1 + 2.0**-23, 1.5, 2 - 2.0**-10, 2 - 2.0**-11, 2 - 2.0**-23])
    gradient = np.append(np.outer(2.0**EXPONENTS, mantissas).ravel(), np.zeros(8)).astype("float32")[None]
    model = planted(gradient)
    found = by_name(measure_gradients(model, (np.ones_like(gradient), gradient), scale=scale))
    same(found["activation", "scaling"], gradient)
    same(found["weight", "kernel"], gradient)


def test_nonfinite_values_are_counted_separately():
    """Nonfinite values do not affect the largest and smallest magnitude."""
    histogram = gradient_histogram.Histogram()
    gradient_histogram.add_gradient(histogram, ops.array([1.0, -4.0, np.inf, -np.inf, np.nan, 0.0]))
    found = histogram.range("w", "weight", "layer", "float32")
    assert (found.nonfinite, found.zeros, found.nonzeros, found.largest, found.smallest) == (3, 1, 2, 4.0, 1.0)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_gradients_of_a_linear_model_are_exact(run_eagerly):
    """Over three batches: of the output 2 (y - t) / n, of the kernel x' times that, of the bias its sum."""
    model = linear(run_eagerly=run_eagerly)
    kernel, bias = model.get_weights()
    found = by_name(measure_gradients(model, (X, Y), batch_size=8))
    outputs = [2 * (X[i : i + 8] @ kernel + bias - Y[i : i + 8]) / 16 for i in (0, 8, 16)]
    same(found["activation", "only"], np.concatenate(outputs), rtol=1e-5)
    same(found["weight", "kernel"], [X[8 * i : 8 * i + 8].T @ output for i, output in enumerate(outputs)], rtol=1e-3)
    same(found["weight", "bias"], [output.sum(0) for output in outputs], rtol=1e-4)


def test_steps_is_a_limit():
    """Two of three batches."""
    found = measure_gradients(linear(), (X, Y), steps=2, batch_size=8)
    assert found.record.batches == 2
    assert by_name(found)["activation", "only"].nonzeros == 2 * 16


def functional(run_eagerly=EAGER):
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    shared = layers.Dense(4, activation="relu", name="shared")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="deep"), layers.Dropout(0.5)], name="inner")
    joined = layers.Add(name="joined")([inner(shared(a)), inner(shared(b))])
    model = keras.Model(
        [a, b], {"one": layers.Dense(2, name="one")(joined), "two": layers.Dense(1, name="two")(joined)}
    )
    model.compile(
        "adam", loss={"one": "mse", "two": "mae"}, loss_weights={"one": 0.5, "two": 2.0}, run_eagerly=run_eagerly
    )
    weights = {"one": np.linspace(0.1, 1, 24), "two": np.linspace(2, 1, 24)}
    return model, ({"a": X, "b": X[::-1]}, {"one": Y, "two": Y[:, :1]}, weights)


class Own(keras.Model):
    """A custom model that is built by its first call: sublayers in a list, its own weight and an added loss."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(5, activation="tanh"), layers.Dense(2)]
        self.gain = self.add_weight(shape=(2,), initializer="ones", name="gain")

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        self.add_loss(1e-3 * ops.sum(ops.square(ops.cast(self.gain, "float32"))))
        return x * self.gain


def own(run_eagerly=EAGER):
    model = Own()
    model.compile(LossScaleOptimizer("adam"), loss="mse", run_eagerly=run_eagerly)
    return model, (X, Y)


def sequence(run_eagerly=EAGER):
    """Layers inside a loop, a mask, an embedding, normalization, recurrent dropout."""
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, mask_zero=True),
            layers.LSTM(3, dropout=0.2, return_sequences=True),
            layers.LayerNormalization(),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )
    model.compile("adam", loss=SparseCategoricalCrossentropy(), run_eagerly=run_eagerly)
    return model, (np.arange(120).reshape(24, 5) % 7, np.arange(24) % 3)


def images(run_eagerly=EAGER):
    """Moving statistics and noise."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.GaussianNoise(0.1),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    model.compile("sgd", loss="mse", metrics=["mae"], run_eagerly=run_eagerly)
    return model, (np.repeat(X, 6, axis=1).reshape(24, 6, 6, 1), Y)


def product(run_eagerly=EAGER):
    return linear(run_eagerly=run_eagerly), (X, Y)


KINDS = {"functional": functional, "own": own, "sequence": sequence, "images": images, "product": product}


def fit(model, data):
    x, y, weights = (*data, None)[:3]
    model.fit(x, y, sample_weight=weights, batch_size=8, verbose=0)


def state(model):
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return [ops.convert_to_numpy(variable) for variable in variables]


def test_a_model_that_is_built_for_the_measurement_keeps_its_first_statistics():
    """The variables are created during the measurement."""
    model = keras.Sequential([layers.Dense(2), layers.BatchNormalization(name="norm"), layers.Dense(2)])
    model.compile("sgd", loss="mse", run_eagerly=EAGER)
    measure_gradients(model, (X, Y), steps=1)
    assert ops.max(ops.abs(model.get_layer("norm").moving_mean)) == 0
    assert not model.optimizer.built


@pytest.mark.parametrize("kind", ["functional", "own", "images", pytest.param("sequence", marks=pytest.mark.slow)])
def test_every_layer_and_variable_of_any_model_is_there(kind):
    """Each layer that a gradient reaches, and each trainable variable once."""
    model, data = KINDS[kind]()
    found = list(measure_gradients(model, data, steps=2, batch_size=8))
    weights = [gradient.name for gradient in found if gradient.kind == "weight"]
    assert sorted(weights) == sorted(variable.path for variable in model.trainable_variables)
    names = {gradient.name.rpartition("/")[2] for gradient in found if gradient.kind == "activation"}
    reached = {
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, (layers.InputLayer, keras.Sequential, layers.GaussianNoise))
    }
    assert names - {model.name} == reached
    assert all(gradient.nonzeros for gradient in found)


UNCHANGED = [
    ("own", "float16", EAGER),
    ("images", "float32", EAGER),
    ("product", "float16", False),
    pytest.param("own", "float16", False, marks=pytest.mark.slow),
    pytest.param("functional", "float32", False, marks=pytest.mark.slow),
    pytest.param("sequence", "float32", False, marks=thorough),
    pytest.param("images", "float32", False, marks=pytest.mark.slow),
    *(pytest.param(kind, "float16", False, marks=thorough) for kind in ("functional", "sequence", "images")),
    pytest.param("own", "float32", False, marks=thorough),
]


@pytest.mark.parametrize(("kind", "precision", "run_eagerly"), UNCHANGED)
def test_nothing_is_changed(kind, precision, run_eagerly):
    """Weights, moving statistics, metrics, optimizer and policies: `fit` continues to the same weights."""
    results = []
    for measured in (False, True):
        keras.utils.set_random_seed(1)
        model, data = KINDS[kind](run_eagerly)
        fit(model, data)
        before, policies = state(model), [layer.dtype_policy for layer in model._flatten_layers()]
        if measured:
            measure_gradients(model, data, steps=2, precision=precision)
            for value, old in zip(state(model), before, strict=True):
                np.testing.assert_array_equal(value, old)
            assert [layer.dtype_policy for layer in model._flatten_layers()] == policies
            assert not any("call" in vars(layer) for layer in model._flatten_layers())
        fit(model, data)
        results.append(state(model))
    for value, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(value, expected)


class Restless(layers.Layer):
    """Changes state and draws random numbers in every way that a layer can, in each training step."""

    def __init__(self):
        super().__init__()
        self.kept = self.add_weight(shape=(), initializer="zeros", trainable=False)
        if tf is not None:
            self.raw, self.generator = tf.Variable(0.0, trainable=False), tf.random.Generator.from_seed(5)
        if keras.backend.backend() == "torch":
            self.register_buffer("held", ops.zeros(()))

    def call(self, x, training=False):
        if not training:
            return x
        self.kept.assign(self.kept + 1)
        factor = 1 + 0.1 * self.kept
        if keras.backend.backend() != "jax":  # where a compiled step must not draw from the global generator
            factor += keras.random.uniform(())
        if tf is not None:
            factor += self.raw.assign_add(1.0) + self.generator.uniform(()) + tf.random.uniform(())
        if keras.backend.backend() == "torch":
            self.held += 1
            factor = factor + self.held.clone()
        return x * ops.cast(factor, x.dtype)


def restless(**compile_arguments):
    keras.utils.set_random_seed(1)
    inputs = keras.Input(batch_shape=(8, 3, 2))
    # On PyTorch Keras 3.15 cannot train one that is stateful.
    outputs = layers.Dense(2, name="last")(Restless()(layers.GRU(4, stateful=BACKEND != "torch")(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss="mse", metrics=["mae"], **compile_arguments)
    return model


LOOKS = {
    "callback": lambda _: None,
    "measured": lambda model: measure_gradients(model, (X.reshape(24, 3, 2), Y), steps=2, batch_size=8),
}
if tf is not None:
    LOOKS |= {
        "read": tfmixed.audit,
        "audited": lambda model: tfmixed.audit(model, X[:8].reshape(8, 3, 2), Y[:8]),
        "forced": lambda model: tfmixed.force_float32(model, "last"),
    }


def restless_training(look=None, **compile_arguments):
    """Trains, measures or audits, and trains on: returns all state, and random numbers drawn afterwards."""
    model, x = restless(**compile_arguments), X.reshape(24, 3, 2)
    callbacks = [tfmixed.callbacks.GradientRanges(every=2)] if look == "callback" else []
    model.fit(x, Y, batch_size=8, verbose=0, callbacks=callbacks)
    if look is not None:
        LOOKS[look](model)
    model.fit(x, Y, batch_size=8, verbose=0)
    drawn = [random.random(), np.random.random(), keras.random.uniform(())]
    if tf is not None:
        drawn += [model.layers[2].raw, model.layers[2].generator.state, tf.random.uniform(())]
    return [*state(model), *map(ops.convert_to_numpy, drawn)]


@functools.cache
def undisturbed_training(eager):
    return restless_training(run_eagerly=eager)


QUICK = ("read",) if BACKEND == "jax" else ("measured", "read")  # half a minute of compilation
RESTLESS = [pytest.param(look, True, marks=() if look in QUICK else thorough) for look in LOOKS]
RESTLESS += [pytest.param(look, False, marks=pytest.mark.slow) for look in LOOKS]


@pytest.mark.parametrize(("look", "eager"), RESTLESS)
def test_states_and_random_numbers_are_restored(look, eager):
    """Bitwise equal states of stateful layers, raw variables, generators and buffers, compiled and eagerly."""
    for value, expected in zip(restless_training(look, run_eagerly=eager), undisturbed_training(eager), strict=True):
        np.testing.assert_array_equal(value, expected)


@needs_tensorflow
def test_variables_of_the_graph_are_restored():
    """A variable that only the loss function references."""
    count, model = tf.Variable(0), linear()

    def counted_loss(y, x):
        count.assign_add(1)
        return ops.mean(ops.square(y - x), axis=-1)

    model.compile("sgd", loss=counted_loss)
    measure_gradients(model, (X, Y))
    tfmixed.audit(model, X, Y)
    assert int(count) == 0


def test_building_draws_the_random_numbers_of_fit():
    """Nested layers, which take their seeds from Python's random numbers."""

    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention, self.last = layers.MultiHeadAttention(1, 2), layers.Dense(2)

        def call(self, x):
            return self.last(self.attention(x, x)[:, 0])

    results = []
    for measured in (False, True):
        keras.utils.set_random_seed(1)
        model = Late()
        model.compile("sgd", loss="mse", run_eagerly=EAGER)
        if measured:
            measure_gradients(model, (X.reshape(24, 3, 2), Y), steps=1)
        model.fit(X.reshape(24, 3, 2), Y, verbose=0)
        results.append([*model.get_weights(), random.random()])
    for value, expected in zip(*results, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)  # PyTorch rounds otherwise, as memory lies


def test_added_losses_stay_those_of_the_last_call():
    """They do not become symbolic tensors of a graph."""
    model, data = own()
    model(data[0])
    before = ops.convert_to_numpy(model.losses[0])
    measure_gradients(model, data, steps=1)
    if tf is not None:
        tfmixed.audit(model, data[0])
    assert [ops.convert_to_numpy(loss) for loss in model.losses] == [before]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's own modules")
def test_modules_of_pytorch_keep_gradients_and_modes():
    """In a loop between `backward` and the optimizer step. A module in inference mode stays in it."""
    import torch

    wrapped = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(6))
    model = keras.Sequential([keras.Input((6,)), wrapped, layers.Dense(2)])
    model.compile("sgd", loss="mse", run_eagerly=EAGER)
    ops.sum(model(X, training=False)).backward()
    weights = [variable.value for variable in model.trainable_variables]
    before = [gradient.grad.clone() for gradient in weights]
    statistics = wrapped.module.running_mean.clone()
    measure_gradients(model, (X, Y))
    assert not wrapped.module.training
    for gradient, weight in zip(before, weights, strict=True):
        assert bool((gradient == weight.grad).all())
    assert bool((statistics == wrapped.module.running_mean).all())


def test_random_states_of_python_and_numpy_stay():
    """Draws of a layer during the measurement do not advance them."""
    model = linear()
    draw = layers.Lambda(lambda x: x * random.random() * np.random.random())
    model = keras.Sequential([model, draw])
    model.compile("sgd", loss="mse", run_eagerly=True)
    random.seed(1)
    np.random.seed(1)
    measure_gradients(model, (X, Y), steps=1)
    after = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert after == (random.random(), np.random.random())


def loader():
    import torch

    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=8)


DATA = {
    "arrays": lambda: (X, Y),
    "weights of ones": lambda: (X, Y, np.ones(24)),
    "PyDataset": lambda: Batches(),
    "PyDataset with workers": lambda: Batches(workers=2),
    "generator": lambda: (Batches()[index] for index in range(3)),
    **({} if tf is None else {"tf.data": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)}),
    **({"DataLoader": loader} if keras.backend.backend() == "torch" else {}),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_is_what_fit_takes(kind):
    """The same batches, the same gradients."""
    model = linear()
    wanted = measure_gradients(model, (X, Y), batch_size=8)
    found = measure_gradients(model, DATA[kind](), batch_size=8 if kind in ("arrays", "weights of ones") else None)
    assert found.record.batches == 3
    for first, second in zip(found, wanted, strict=True):
        assert first.octaves == second.octaves


def test_sample_weights_weigh_gradients():
    """Samples with a weight of 0 have zero gradients."""
    weights = np.repeat([0.0, 1.0], 12)
    found = by_name(measure_gradients(linear(), (X, Y, weights), batch_size=24))
    assert (found["activation", "only"].zeros, found["activation", "only"].nonzeros) == (24, 24)


def test_half_precision_shows_what_is_lost():
    """2^-26 and below become 0, as predicted from the float32 counts, unless the loss is scaled."""
    gradient = (2.0 ** np.arange(-40, 0)).astype("float32")[None] * np.float32(1.25)
    model, data = planted(gradient), (np.ones_like(gradient), gradient)
    full = by_name(measure_gradients(model, data))["activation", "scaling"]
    for scale in (1.0, 2.0**10):
        half = by_name(measure_gradients(model, data, precision="float16", scale=scale))["activation", "scaling"]
        lost = losses(full.octaves, scale)
        assert (half.zeros, half.nonfinite) == (lost.zero, 0)
    assert losses(full.octaves).zero == 15
    over = by_name(measure_gradients(model, data, precision="float16", scale=2.0**20))["activation", "scaling"]
    assert over.nonfinite == losses(full.octaves, 2.0**20).overflow == 4


def test_a_mixed_model_is_measured_in_float32_too():
    """The gradients are those of the same model under the policy float32."""
    found = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(3)
        found.append(measure_gradients(linear(), (X * 1e-3, Y * 1e-3)))
    for first, second in zip(*found, strict=True):
        assert first.octaves == second.octaves
        assert (first.dtype, second.dtype) == ("float32", "float16")


def test_float32_layers_are_held_in_float32():
    """The gradient of a float32 layer in a half-precision model is held in float32."""
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2), tfmixed.layers.Softmax()])
    model.compile("sgd", loss="mse", run_eagerly=EAGER)
    found = measure_gradients(model, (X, Y), steps=1)
    assert {gradient.layer: gradient.dtype for gradient in found} == {
        model.layers[0].name: "float16",
        model.layers[1].name: "float32",
    }
    assert {gradient.layer for gradient in found.half} == {model.layers[0].name}


@pytest.mark.parametrize("scale", [3.0, pytest.param(2.0**10, marks=pytest.mark.slow)])
def test_gradients_are_unscaled_before_they_are_counted(scale):
    """The scale of the optimizer is not used."""
    model, data = own()
    plain = measure_gradients(model, data, steps=1)
    scaled = measure_gradients(model, data, steps=1, scale=scale)
    for first, second in zip(plain, scaled, strict=True):
        assert second.largest == pytest.approx(first.largest, rel=1e-5)
        assert second.nonzeros == first.nonzeros


class Adversaries(keras.Model):
    """Two optimizers, two losses and a custom `train_step` with Keras 2 methods."""

    def __init__(self):
        super().__init__()
        self.maker, self.judge = layers.Dense(6, name="maker"), layers.Dense(1, name="judge")
        self.second = LossScaleOptimizer("adam", 8.0)
        self.maker.build((None, 6))
        self.judge.build((None, 6))
        self.built = True

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape(persistent=True) as tape:
            made = self.maker(x)
            loss = tf.reduce_mean(tf.square(self.judge(made)))
            one, two = self.optimizer.get_scaled_loss(loss), self.second.scale_loss(-loss)
        grads = tape.gradient(one, self.maker.trainable_variables)
        self.optimizer.apply_gradients(
            zip(self.optimizer.get_unscaled_gradients(grads), self.maker.trainable_variables, strict=True)
        )
        self.second.apply(tape.gradient(two, self.judge.trainable_variables), self.judge.trainable_variables)
        return {"loss": loss}


@needs_tensorflow
@pytest.mark.parametrize("held", ["list", "dict"])
def test_optimizers_in_lists_and_dictionaries_take_no_step(held):
    """Optimizers are found in containers."""
    model = Adversaries()
    model.compile(LossScaleOptimizer("sgd", 4.0), run_eagerly=EAGER)
    second = model.second
    del model.second
    model.others = [second] if held == "list" else {"second": second}
    type(model).second = property(lambda _: second)
    try:
        before = model.judge.get_weights()
        found = measure_gradients(model, (X, Y), steps=1)
    finally:
        del type(model).second
    assert sum(gradient.kind == "weight" for gradient in found) == 4
    np.testing.assert_array_equal(model.judge.get_weights()[0], before[0])


@needs_tensorflow
def test_an_optimizer_that_the_model_does_not_hold_is_an_error():
    """The model's step uses an optimizer that is not an attribute."""

    class Hidden(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(data[0]))
            hidden.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    hidden = keras.optimizers.SGD()
    model = Hidden()
    model.compile("sgd", loss="mse", run_eagerly=True)
    with pytest.raises(ValueError, match="optimizers"):
        measure_gradients(model, (X, Y), steps=1)


def test_layers_come_in_the_order_of_the_data():
    """Layers of a nested model are listed in its place."""
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="i1"), layers.Dense(4, name="i2")], name="inner")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="first"), inner, layers.Dense(2, name="last")])
    model.compile("sgd", loss="mse", run_eagerly=EAGER)
    found = measure_gradients(model, (X, Y), steps=1)
    assert list(dict.fromkeys(gradient.layer for gradient in found)) == ["first", "inner/i1", "inner/i2", "last"]


class Shuffling(Batches):
    ends = 0

    def on_epoch_end(self):
        self.ends += 1


def test_a_users_epoch_does_not_end():
    """A PyDataset that shuffles at the end of an epoch is not shuffled."""
    data = Shuffling()
    measure_gradients(linear(), data, steps=1)
    assert data.ends == 0
    assert "on_epoch_end" not in vars(data)


@needs_tensorflow
def test_a_custom_train_step_is_measured():
    """The unscaled gradients of both optimizers are measured, without a step."""
    model = Adversaries()
    model.compile(LossScaleOptimizer("sgd", 4.0), run_eagerly=EAGER)
    before = [variable.numpy() for variable in model.variables]
    found = by_name(measure_gradients(model, (X, Y), steps=1))
    assert found.keys() >= {("activation", "maker"), ("activation", "judge"), ("weight", "kernel")}
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)
    assert (int(model.optimizer.attempted_steps), int(model.second.attempted_steps)) == (0, 0)
    kernel, bias = before[2], before[3]
    made = X @ before[0] + before[1]
    outputs = 2 * (made @ kernel + bias) / 24
    judge = next(
        gradient for gradient in measure_gradients(model, (X, Y), steps=1) if gradient.name == model.judge.bias.path
    )
    np.testing.assert_allclose(judge.largest, np.abs(outputs.sum()), rtol=1e-4)


@needs_tensorflow
@pytest.mark.parametrize("run_eagerly", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layers_in_loops_and_sparse_gradients_are_counted(run_eagerly):
    """A cell in an RNN is counted at each step. Unused rows of an embedding have zero gradients."""
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(9, 4),
            layers.RNN(layers.LSTMCell(3, name="cell")),
            layers.Dense(1),
        ]
    )
    model.compile("sgd", loss="mse", run_eagerly=run_eagerly)
    data = np.full((2, 5), 3), np.ones((2, 1))
    found = by_name(measure_gradients(model, data, steps=1))
    embeddings = found["weight", "embeddings"]
    assert (embeddings.zeros, embeddings.nonzeros) == (8 * 4, 4)
    # The output and two states, each with a gradient in each of five steps, for two samples of three units.
    assert 2 * 3 * 5 <= found["activation", "cell"].nonzeros + found["activation", "cell"].zeros <= 3 * 2 * 3 * 5


def test_the_prediction_comes_true():
    """No step overflows at the suggested scale, and every step at 2^6 times that scale."""
    keras.config.set_dtype_policy("mixed_float16")
    x = RNG.normal(size=(64, 6)).astype("float32")

    def model(scale):
        keras.utils.set_random_seed(0)
        made = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="sigmoid"), layers.Dense(2)])
        made.compile(LossScaleOptimizer(keras.optimizers.SGD(1e-3), scale), loss="mse", run_eagerly=EAGER)
        return made

    data = x, x[:, :2]
    suggested = measure_gradients(model(1.0), data, batch_size=16).suggest_constant_scale(headroom=2.0)
    for scale, skipped in ((float(suggested), 0), (suggested * 2.0**6, 4)):
        trained = model(scale)
        trained.fit(*data, batch_size=16, verbose=0, shuffle=False)
        assert int(trained.optimizer.skipped_steps) == skipped


def test_one_probe_serves_batch_after_batch():
    """Each record holds the gradients since the last record."""
    probe = Probe(linear())
    for size in (4, 8):
        probe.measure((ops.convert_to_tensor(X[:size]), ops.convert_to_tensor(Y[:size])))
        record = probe.record(step=size, epoch=1)
        assert (record.step, record.epoch, record.batches) == (size, 1, 1)
        assert record.ranges[0].nonzeros == 2 * size


def test_a_model_with_a_grad_scaler_is_refused():
    """Its step would update the scaler."""
    model = linear()
    model.scaler = tfmixed.GradScaler()
    with pytest.raises(NotImplementedError, match="GradScaler"):
        measure_gradients(model, (X, Y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure_gradients(keras.Sequential([layers.Dense(1)]), (X, Y)), "compile"),
        (lambda: measure_gradients("model", (X, Y)), "keras.Model"),
        (lambda: measure_gradients(linear(), None), "data.*None"),
        (lambda: measure_gradients(linear(), []), "data"),
        (lambda: measure_gradients(linear(), (X, Y), batch_size=0), "batch_size.*0"),
        (lambda: measure_gradients(linear(), (X, Y), steps=0), "steps.*0"),
        (lambda: measure_gradients(linear(), (X, Y), precision="half"), "precision.*'half'"),
        (lambda: measure_gradients(linear(), (X, Y), scale=-1), "scale.*-1"),
        (lambda: measure_gradients(linear(), (np.zeros((0, 6)), np.zeros((0, 2)))), "at least one batch"),
    ],
)
def test_invalid_arguments(call, message):
    """The error names the argument."""
    with pytest.raises(ValueError, match=message):
        call()


def noise(model, data, **arguments):
    found = measure_gradients(model, data, steps=2, batch_size=8, **arguments)
    return {gradient.name for gradient in found if gradient.noise}, found


def normalized():
    """Two convolutions before batch normalizations, and a dense layer."""
    inputs = keras.Input((6, 6, 2))
    x = layers.BatchNormalization(name="n1")(layers.Conv2D(3, 3, name="c1")(inputs))
    x = layers.BatchNormalization(name="n2")(layers.Conv2D(3, 3, name="c2")(x))
    model = keras.Model(inputs, layers.Dense(2, name="d")(layers.Flatten()(layers.ReLU()(x))))
    model.compile("sgd", loss="mse", run_eagerly=EAGER)
    return model, (RNG.normal(size=(24, 6, 6, 2)).astype("float32"), Y)


def attentive():
    inputs = keras.Input((5, 4))
    x = layers.LayerNormalization()(inputs)
    x = layers.MultiHeadAttention(2, 3, name="a")(x, x) + inputs
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(layers.Dense(4, "gelu")(x))))
    model.compile("sgd", loss="mse", run_eagerly=EAGER)
    return model, (RNG.normal(size=(24, 5, 4)).astype("float32"), Y)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("float32", marks=pytest.mark.slow if BACKEND == "jax" else ()),  # half a minute of compilation
        pytest.param("float16", marks=pytest.mark.slow),
    ],
)
def test_sums_that_cancel_are_noise(precision):
    """Offsets before a batch normalization, and the bias of attention's keys."""
    cases = [(normalized(), {"c1/bias", "n1/beta", "c2/bias"})]
    if BACKEND != "jax" or precision == "float32":  # on CPUs JAX has no attention in float16
        cases.append((attentive(), {"a/key/bias"}))
    for (model, data), wanted in cases:
        found, ranges = noise(model, data, precision=precision, scale=2.0**10)
        assert found == wanted
        assert not {gradient.name for gradient in ranges.half} & wanted


@pytest.mark.parametrize("kind", ["functional", "own", pytest.param("sequence", marks=pytest.mark.slow)])
def test_sums_that_do_not_cancel_are_not_noise(kind):
    """Dense, recurrent and embedding layers, with and without dropout."""
    model, data = KINDS[kind]()
    assert noise(model, data)[0] == set()


def test_small_gradients_are_not_noise():
    """Gradients far below the range of float16 are not noise."""
    model, data = normalized()
    model.compile("sgd", loss=lambda y, x: 2.0**-40 * ops.mean(ops.square(y - x), axis=-1), run_eagerly=EAGER)
    found, ranges = noise(model, data)
    assert found == {"c1/bias", "n1/beta", "c2/bias"}
    assert ranges.underflow() > 0.9
    low, high = ranges.working_scales()
    assert 1 < low < high


def test_perturbed_gradients_are_off_by_a_sixteenth():
    """About half of the values increase; zeros stay zeros."""
    values = RNG.normal(size=(100, 10)).astype("float32")
    ratios = ops.convert_to_numpy(gradient_histogram.perturb(ops.array(values))) / values
    np.testing.assert_allclose(np.abs(ratios - 1), 1 / 16, rtol=1e-5)
    assert 400 < (ratios > 1).sum() < 600
    assert not ops.convert_to_numpy(gradient_histogram.perturb(ops.zeros(3))).any()


@needs_tensorflow
def test_float32_on_gpus_is_not_tensorfloat32():
    """TensorFloat-32, which keeps 11 bits, is switched off and restored."""
    enabled = tf.config.experimental.tensor_float_32_execution_enabled
    before = enabled()
    with temporary_state.in_float32([]):
        assert not enabled()
    assert enabled() == before
