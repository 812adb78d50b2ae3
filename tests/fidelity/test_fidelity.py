"""Half-precision gradients compared with float32: `gradient_fidelity`, the callback, the command and the report."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
from backend import BACKEND, breaks_on_cpus, needs_tensorflow, tf
from keras import layers, ops
from typer.testing import CliRunner

import tfmixed
from tfmixed import gradient_fidelity, records
from tfmixed._cli.main import app
from tfmixed._islands import gradient_sums
from tfmixed._probe.tensor_hooks import round_significand
from tfmixed.callbacks import GradientFidelity, LossScaleLogger
from tfmixed.fidelity import GradientFidelity as Fidelity
from tfmixed.records import FidelityRecord, GradientError
from tfmixed.report import Report, read

pytestmark = pytest.mark.filterwarnings("ignore:policy .* is slow here")
RANDOM = np.random.default_rng(0)
ROWS = 4096


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No layer of another test keeps the sums in float32."""
    monkeypatch.setattr(gradient_sums, "_covered", weakref.WeakSet())


def compiled(*stack, optimizer="sgd"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([*stack, layers.Dense(3, dtype="float32")])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def rows():
    return RANDOM.normal(size=(ROWS, 8)).astype("float32"), RANDOM.integers(0, 3, ROWS)


def one_class(*shape):
    """Data whose gradients have one sign."""
    return np.ones((ROWS, *shape), "float32"), np.zeros(ROWS, "int32")


def convolution(kind, *shape):
    return lambda: compiled(keras.Input(shape), kind(4, 1, name="wrong"), layers.Flatten())


# A model with a gradient that the backend sums in half precision, its data, and the name of the variable.
POLICY, *WRONG = {
    "tensorflow": (
        "mixed_bfloat16",
        lambda: compiled(keras.Input((8,)), layers.Dense(16, name="wrong")),
        lambda: one_class(8),
        "bias",
    ),
    "jax": ("mixed_bfloat16", convolution(layers.Conv2D, 4, 4, 2), lambda: one_class(4, 4, 2), "bias"),
    "torch": ("mixed_float16", convolution(layers.Conv1D, 2, 8), lambda: one_class(2, 8), "kernel"),
}[BACKEND]


def measured(float32_sums, policy=POLICY, **arguments):
    make, data, _ = WRONG
    tfmixed.set_policy(policy, float32_sums=float32_sums)
    return gradient_fidelity(make(), data(), batch_size=ROWS, **arguments)


@breaks_on_cpus
def test_a_sum_in_half_precision_is_found():
    """It comes first, with the number of terms and the remedy."""
    fidelity = measured(float32_sums=False)
    first = next(iter(fidelity))
    assert first.layer == "wrong"
    assert first.name.endswith(WRONG[2])
    assert first.error > 0.03 > 5 * first.rounding
    assert f"{first.terms:,} terms stands in {POLICY[6:]}" in fidelity.explain(first)
    assert "set_policy" in fidelity.advice()
    assert [gradient.layer for gradient in fidelity.wrong] == ["wrong"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_float32_sums_are_expected(policy):
    """And rounding explains the whole error."""
    fidelity = measured(float32_sums=True, policy=policy, scale=1024.0)
    assert not fidelity.wrong
    assert {fidelity.explain(gradient) for gradient in fidelity} == {"expected"}
    assert all(gradient.error < 1.5 * gradient.rounding + 0.004 for gradient in fidelity)


def deep():
    """Normalizations, attention, dropout, recurrence: layers with many roundings."""
    x = keras.Input((6, 8))
    h = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")(x, x))
    h = layers.Dropout(0.2)(layers.GRU(8)(layers.Conv1D(8, 3, activation="gelu")(h)))
    model = keras.Model(x, layers.Dense(3, dtype="float32")(layers.BatchNormalization()(h)))
    model.compile(tfmixed.LossScaleOptimizer("adam"), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, (RANDOM.normal(size=(64, 6, 8)).astype("float32"), RANDOM.integers(0, 3, 64))


@pytest.mark.slow
def test_rounding_explains_a_deep_model():
    """The bias of attention keys has a true gradient of 0, and is noise."""
    tfmixed.set_policy("mixed_bfloat16")
    model, data = deep()
    fidelity = gradient_fidelity(model, data, steps=2)
    assert fidelity.record.batches == 2
    assert not fidelity.wrong, str(fidelity)
    noise = [gradient.name for gradient in fidelity if fidelity.explain(gradient).startswith("noise")]
    assert [name.rpartition("attention/")[2] for name in noise] == ["key/bias"]


@pytest.mark.slow
def test_nothing_is_changed():
    """Weights, statistics, optimizer and random states; and the training afterwards."""
    tfmixed.set_policy("mixed_bfloat16")
    results = []
    for is_measured in (True, False):
        keras.utils.set_random_seed(0)
        model, data = deep()
        data = results[0][0] if results else data
        model.fit(*data, verbose=0, shuffle=False)
        if is_measured:
            gradient_fidelity(model, data, steps=1)
        model.fit(*data, verbose=0, shuffle=False)
        results.append((data, [ops.convert_to_numpy(value) for value in model.get_weights()]))
    for measured_weights, weights in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(measured_weights, weights)


@pytest.mark.parametrize(("scale", "reason"), [(2.0**-24, "flushed"), (2.0**30, "overflow")])
def test_scales_that_do_not_fit(scale, reason):
    """Float16 gradients that vanish or overflow, with the share or the number."""
    fidelity = measured(True, "mixed_float16", scale=scale)
    first = next(iter(fidelity))
    assert reason in fidelity.explain(first)
    assert first.flushed > 0.5 or first.nonfinite > 0


def test_the_scale_in_use_is_that_of_the_optimizer():
    tfmixed.set_policy("mixed_float16")
    model = compiled(keras.Input((8,)), layers.Dense(4), optimizer=tfmixed.LossScaleOptimizer("sgd", 512))
    assert gradient_fidelity(model, rows()).record.scale == 512
    assert gradient_fidelity(model, rows(), scale=2.0).record.scale == 2


class OwnSum(layers.Layer):
    """A custom layer whose gradient is a sum of 512 terms, which differentiation adds up one by one."""

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(8,), initializer="zeros")

    def call(self, x):
        weight = ops.cast(ops.convert_to_tensor(self.weight), x.dtype)
        return ops.scan(lambda carry, _: (carry + weight / 512, None), x, length=512)[0]


def test_sums_of_custom_code_are_found():
    """In half precision, where nothing sums in float32."""
    tfmixed.set_policy("mixed_bfloat16", promote=False)
    model = compiled(keras.Input((8,)), OwnSum(name="own"))
    fidelity = gradient_fidelity(model, rows(), batch_size=ROWS)
    assert [gradient.layer for gradient in fidelity.wrong] == ["own"]


class Penalized(keras.Model):
    """A model whose loss contains the gradient of its output with respect to its input."""

    def __init__(self):
        super().__init__()
        self.hidden, self.top = layers.Dense(8, "tanh"), layers.Dense(1, dtype="float32")

    def call(self, x):
        return self.top(self.hidden(x))

    def train_step(self, data):
        x = ops.convert_to_tensor(keras.utils.unpack_x_y_sample_weight(data)[0])
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                output = self(x)
            loss = ops.mean(ops.square(ops.cast(inner.gradient(output, x), "float32")))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


@needs_tensorflow
def test_second_derivatives_are_rounded_too():
    """Simulated rounding has the derivative 1."""
    tfmixed.set_policy("mixed_bfloat16")
    model = Penalized()
    model.compile("sgd")
    model(np.ones((1, 8), "float32"))
    fidelity = gradient_fidelity(model, rows()[0][:64], batch_size=64)
    assert len(fidelity) == 3
    assert all(0 < gradient.rounding < 0.1 for gradient in fidelity)
    assert not fidelity.wrong


@pytest.mark.filterwarnings("ignore:invalid value")
def test_values_that_are_not_finite_in_float32():
    """A NaN in the data is not an overflow, and its JSON is valid."""
    tfmixed.set_policy("mixed_bfloat16")
    x, y = rows()
    x[0, 0] = np.nan
    fidelity = gradient_fidelity(compiled(keras.Input((8,)), layers.Dense(4)), (x, y), batch_size=64)
    assert "not finite in float32" in fidelity.explain(fidelity.wrong[0])
    assert "NaN" not in fidelity.to_json()


def test_models_without_half_precision_are_refused():
    with pytest.raises(ValueError, match="half precision"):
        gradient_fidelity(compiled(keras.Input((8,)), layers.Dense(4)), rows())


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"batch_size": 0}, {"scale": -1.0}])
def test_bad_arguments(arguments):
    tfmixed.set_policy("mixed_bfloat16")
    with pytest.raises(ValueError, match=next(iter(arguments))):
        gradient_fidelity(compiled(keras.Input((8,)), layers.Dense(4)), rows(), **arguments)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_simulated_rounding_is_that_of_a_cast(dtype, bits):
    """Within the exponents of the format, including ties."""
    values = RANDOM.normal(size=10_000).astype("float32")
    values = np.concatenate([values, np.float32(1) + np.arange(64, dtype="float32") * 2.0 ** -(bits + 1)])
    rounded = ops.convert_to_numpy(round_significand(ops.convert_to_tensor(values), bits))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    normal = np.abs(values) > 2.0**-13
    np.testing.assert_array_equal(rounded[normal], values.astype(kind).astype("float32")[normal])


def test_callback_and_report(tmp_path):
    """Snapshots go to the log of the run, and training is not affected."""
    path, weights = tmp_path / "log.jsonl", []
    for with_callback in (True, False):
        tfmixed.set_policy("mixed_float16")
        keras.utils.set_random_seed(0)
        model = compiled(keras.Input((8,)), layers.Dense(4), optimizer=tfmixed.LossScaleOptimizer("adam", 256))
        watch = [GradientFidelity(path, every=4)] if with_callback else []
        model.fit(*(data[:256] for data in fixed()), epochs=1, verbose=0, callbacks=[LossScaleLogger(path), *watch])
        weights.append([ops.convert_to_numpy(value) for value in model.get_weights()])
        if with_callback:
            found = [record for record in records.read_log(path) if isinstance(record, FidelityRecord)]
            assert [record.step for record in found] == [0, 4]
            assert found[0].scale == 256
            assert watch[0].last.record == found[-1]
            assert "Gradient fidelity" in str(Report([read(path)]).sections())
    for left, right in zip(*weights, strict=True):
        np.testing.assert_array_equal(left, right)


def fixed():
    random = np.random.default_rng(1)
    return random.normal(size=(ROWS, 8)).astype("float32"), random.integers(0, 3, ROWS)


def error(name="d/bias", dtype="bfloat16", error=0.001, rounding=0.001, flushed=0.0, nonfinite=0, terms=4096):
    return GradientError(name, name.partition("/")[0], dtype, 8, terms, error, rounding, 0.99, flushed, nonfinite)


def fidelity_of(*gradients, float32_sums=False):
    return Fidelity(FidelityRecord(3, 1, 8.0, 2, "model", float32_sums, list(gradients)))


def test_order_and_explanations():
    """The worst first; noise is wrong only if it is far beyond rounding."""
    found = fidelity_of(
        error("a/ok"),
        error("b/sum", error=0.9),
        error("c/noise", error=5.0, rounding=3.0, flushed=0.1),
        error("d/inf", nonfinite=2),
        dataclasses.replace(error("g/nan"), unknown=3),
        error("e/zero", dtype="float16", flushed=0.5),
        error("f/float32", dtype="float32", error=0.1, terms=0),
    )
    kinds = {gradient.name[2:]: found.explain(gradient).partition(":")[0] for gradient in found}
    assert set(list(kinds)[:2]) == {"inf", "nan"}
    assert {name for name, kind in kinds.items() if kind == "wrong"} == {"inf", "nan", "sum", "zero", "float32"}
    assert len(found.wrong) == 5
    assert kinds["noise"] == "noise"
    assert "5 of 7" in found.summary()
    assert "dtype float32" in fidelity_of(error(error=1.0), float32_sums=True).advice()
    assert fidelity_of(error()).advice() == ""


def test_renderings():
    """Rows, a limit, JSON and HTML."""
    found = fidelity_of(error("a/ok"), error("b/sum", error=0.9))
    assert found.table(top=1).row_count == 1
    assert "1 more" in tfmixed._utils.rich_text.text(found.explained(1))
    values = json.loads(found.to_json())
    assert [gradient["name"] for gradient in values["gradients"]] == ["b/sum", "a/ok"]
    assert values["wrong"] == 1
    assert "<pre" in found._repr_html_()
    assert "b/sum" in found._repr_html_()
    assert records.from_line(records.to_line(found.record)) == found.record


SPEC = """
    import keras, numpy as np, tfmixed

    def model():
        tfmixed.set_policy("mixed_bfloat16")
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model, np.ones((4096, 8)), np.zeros(4096)
"""


@needs_tensorflow
@breaks_on_cpus
def test_command(tmp_path, monkeypatch):
    """Exit code 1 if a gradient is wrong, 0 if none is, 2 for a usage error."""
    (tmp_path / "zoo_of_fidelity.py").write_text(textwrap.dedent(SPEC))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(app, ["fidelity", *arguments])

    spec = "zoo_of_fidelity:model", "--batch", "4096"
    assert run(*spec).exit_code == 0
    wrong = run(*spec, "--no-float32-sums", "--json")
    assert wrong.exit_code == 1
    assert json.loads(wrong.stdout)["wrong"] >= 1
    assert "more" in run(*spec, "--top", "1").stdout
    sys.modules.pop("zoo_of_fidelity", None)
