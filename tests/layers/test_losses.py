"""Float32 cross-entropies of logits: values, gradients, and compiled models."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest
from backend import BACKEND, ON_CPU, breaks_on_cpus, gradient
from keras import ops
from thorough import covering

from tfmixed import losses

numpy = ops.convert_to_numpy


def dtype(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


@pytest.fixture
def float16_floatx():
    keras.config.set_floatx("float16")
    yield
    keras.config.set_floatx("float32")


def crossentropy64(y, z):
    """One-hot labels."""
    top = z.max(axis=-1, keepdims=True)
    return (y * (top + np.log(np.exp(z - top).sum(axis=-1, keepdims=True)) - z)).sum(axis=-1)


def sparse64(y, z):
    return crossentropy64(np.eye(z.shape[-1])[y], z)


def binary64(y, z):
    return (np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))).mean(axis=-1)


def smooth64(y, z):
    return crossentropy64(0.9 * y + 0.1 / z.shape[-1], z)


class Case(NamedTuple):
    """A function, a float64 reference, and labels and logits for which the Keras function fails in float16."""

    name: str
    reference: Callable
    y: np.ndarray
    z: np.ndarray
    arguments: dict = {}  # noqa: RUF012 - not modified
    right_on: tuple[str, ...] = ()

    @property
    def kind(self):
        return "".join(map(str.capitalize, self.name.split("_")))


FAR = np.array([[-60_000.0, 60_000.0, 0.0], [1.0, 2.0, 3.0]])
MANY = np.zeros((1, 70_000))
FIRST = np.zeros((1, 70_000), "float32")
FIRST[0, 0] = 1
CASES = {
    "one-hot": Case("categorical_crossentropy", crossentropy64, np.eye(3, dtype="float32")[[0, 2]], FAR),
    "one-hot, many": Case("categorical_crossentropy", crossentropy64, FIRST, MANY, right_on=("tensorflow",)),
    "one-hot, smooth": Case("categorical_crossentropy", smooth64, FIRST, MANY, {"label_smoothing": 0.1}),
    "sparse": Case("sparse_categorical_crossentropy", sparse64, np.array([0, 2]), FAR),
    "binary": Case("binary_crossentropy", binary64, np.ones((2, 2)), np.array([[20.0, 22.0], [18.0, 25.0]])),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Of JAX, in the functions of Keras: the number of classes is inf in float16.
overflowing = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


def error(values, expected):
    """Returns the largest relative error, or inf for nonfinite values."""
    return np.nan_to_num(np.abs(numpy(values).astype("float64") / expected - 1), nan=np.inf).max()


@pytest.mark.slow
@breaks_on_cpus
@overflowing
@every_case
def test_keras_functions_fail_in_float16(case):
    """The reason for this module."""
    z = ops.cast(case.z, "float16")
    values = getattr(keras.losses, case.name)(ops.array(case.y), z, from_logits=True, **case.arguments)
    assert (error(values, case.reference(case.y, case.z)) < 0.01) == (BACKEND in case.right_on)


@every_case
@pytest.mark.parametrize("logits", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("policy", ["mixed_float16", "float16", "float32"])
def test_functions_are_float32(case, logits, policy):
    """Compared with float64, whatever the dtype of the logits and the policy."""
    keras.config.set_dtype_policy(policy)
    z = ops.cast(case.z, logits)
    values = getattr(losses, case.name)(case.y, z, **case.arguments)
    assert dtype(values) == "float32"
    assert error(values, case.reference(case.y, numpy(ops.cast(z, "float32")).astype("float64"))) < 1e-5


@every_case
def test_gradients_are_those_of_float32(case):
    """Compared with the Keras function in float32; they have the dtype of the logits."""
    y, scale = ops.array(case.y), 1024.0

    def slope(module, name):
        def loss(z):
            return scale * ops.sum(getattr(module, case.name)(y, z, from_logits=True, **case.arguments))

        return gradient(loss, ops.convert_to_tensor(case.z, name))

    expected, found = slope(keras.losses, "float32"), slope(losses, "float16")
    assert dtype(found) == "float16"
    np.testing.assert_allclose(numpy(found).astype("float32"), numpy(expected), rtol=1e-3, atol=2.0**-24)


@overflowing
@every_case
@pytest.mark.usefixtures("float16_floatx")
def test_classes_are_float32_under_a_floatx_of_float16(case):
    """Keras classes compute in float16 then."""
    z, kind = ops.cast(case.z, "float16"), case.kind
    expected = case.reference(case.y, case.z)
    theirs = getattr(keras.losses, kind)(from_logits=True, reduction=None, **case.arguments)(ops.array(case.y), z)
    assert dtype(theirs) == "float16"
    assert not ON_CPU or (error(theirs, expected) < 0.01) == (BACKEND in case.right_on)
    ours = getattr(losses, kind)(reduction=None, **case.arguments)(ops.array(case.y), z)
    assert dtype(ours) == "float32"
    assert error(ours, expected) < 1e-5


def test_keras_classes_are_equal_under_a_floatx_of_float32():
    """Keras casts float16 logits to float32 itself."""
    for case in CASES.values():
        y, z = ops.array(case.y), ops.cast(case.z, "float16")
        theirs = getattr(keras.losses, case.kind)(from_logits=True, **case.arguments)(y, z)
        ours = getattr(losses, case.kind)(**case.arguments)(y, z)
        assert dtype(theirs) == dtype(ours) == "float32"
        assert numpy(theirs) == numpy(ours)


@pytest.mark.usefixtures("float16_floatx")
def test_means_of_many_examples_are_finite():
    """The sum of 8,192 losses of 11 exceeds 65504."""
    y, z = ops.zeros(8192, "int32"), ops.cast(np.tile([[0.0, 11.0]], (8192, 1)), "float16")
    assert np.isinf(numpy(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, z)))
    np.testing.assert_allclose(numpy(losses.SparseCategoricalCrossentropy()(y, z)), 11.0, rtol=1e-4)


@pytest.mark.usefixtures("float16_floatx")
def test_labels_above_2048_are_not_rounded():
    """Label 2049 is 2048 in float16."""
    y, z = ops.array([2049]), ops.cast(20 * np.eye(3000)[[2049]], "float16")
    assert numpy(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, z)) > 10
    assert 0 < numpy(losses.SparseCategoricalCrossentropy()(y, z)) < 1e-4


def test_only_the_ignored_class_is_ignored():
    """Keras compares in the dtype of the logits, where 2049 is 2048."""
    y, z = ops.array([2048, 2049]), ops.zeros((2, 3000), "float16")
    theirs = keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True, ignore_class=2049)
    np.testing.assert_array_equal(numpy(theirs), [0, 0])
    for found in (
        losses.sparse_categorical_crossentropy(y, z, ignore_class=2049),
        losses.SparseCategoricalCrossentropy(ignore_class=2049, reduction=None)(y, z),
    ):
        np.testing.assert_allclose(numpy(found), [np.log(3000), 0], rtol=1e-6)


COMPILED = {name: CASES[name] for name in ("one-hot", "sparse", "binary")}


@pytest.mark.parametrize(("case", "form"), covering(1, COMPILED, ["class", "function"]))
def test_compiled_models_train_save_and_load(case, form, tmp_path):
    """The loaded loss is the same, and the history has the float32 values of Keras."""
    keras.config.set_dtype_policy("mixed_float16")
    loss = getattr(losses, case.kind)(name="mine") if form == "class" else getattr(losses, case.name)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(case.z.shape[-1])])
    model.compile("sgd", loss)
    x, y = np.random.default_rng(0).normal(size=(2, 4)).astype("float32"), case.y
    expected = numpy(getattr(losses, case.name)(y, model(x))).mean()
    history = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    np.testing.assert_allclose(history[0], expected, rtol=1e-5)
    assert history[1] < history[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").loss
    assert again is loss if form == "function" else (type(again), again.name) == (type(loss), "mine")
    assert form == "function" or again.get_config() == loss.get_config()


def test_sample_weights_and_smoothing():
    """Other arguments of the Keras classes."""
    y, z = np.eye(3, dtype="float32")[[0, 2]], ops.cast(FAR, "float16")
    again = keras.losses.deserialize(
        keras.losses.serialize(losses.CategoricalCrossentropy(label_smoothing=0.1, reduction="sum"))
    )
    binary = losses.binary_crossentropy(y, z, label_smoothing=0.1)
    np.testing.assert_allclose(numpy(binary), binary64(0.9 * y + 0.05, FAR), rtol=1e-5)
    expected = (smooth64(y, FAR) * [0.5, 2.0]).sum()
    np.testing.assert_allclose(numpy(again(ops.array(y), z, sample_weight=[0.5, 2.0])), expected, rtol=1e-5)


@every_case
def test_probabilities_are_refused(case):
    """By functions and classes."""
    with pytest.raises(ValueError, match="from_logits"):
        getattr(losses, case.name)(case.y, case.z, from_logits=False)
    with pytest.raises(ValueError, match="from_logits"):
        getattr(losses, case.kind)(from_logits=False)
