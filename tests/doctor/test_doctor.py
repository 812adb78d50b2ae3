from __future__ import annotations

import dataclasses
import json
import re
import sys

import keras
import numpy as np
import pytest
from backend import BACKEND
from keras import layers

from tfmixed import hardware
from tfmixed._cli import load_model
from tfmixed._utils import timing
from tfmixed.doctor import backend_settings, diagnosis, speed_test, tile_alignment
from tfmixed.doctor.speed_test import Measured, Speed
from tfmixed.doctor.tile_alignment import Width
from tfmixed.errors import UsageError
from tfmixed.hardware import Hardware
from tfmixed.layers import Float32

CPU = hardware.cpu(frozenset({"avx512_bf16"}), "some CPU")
FAST = Measured((Speed("float32", 1.0, 1.0), Speed("bfloat16", 2.0, 2.0), Speed("float16", 0.5, 0.5)), 50.0)
SLOW = Measured((Speed("float32", 1.0, 1.0), Speed("bfloat16", 0.5, 2.0), Speed("float16", 0.5, 0.5)), 50.0)


def warned(*devices, **changes):
    settings = dataclasses.replace(backend_settings.read(), **changes)
    return " / ".join(diagnosis.warnings(Hardware(devices), settings))


def found(model, multiple=8):
    widths = tile_alignment.odd_widths(model, multiple)
    return [(width.layer.removeprefix(f"{model.name}/"), width.name, width.width, width.better) for width in widths]


def test_this_machine_is_examined():
    """Hardware, settings and policy agree with their sources. Nothing is measured by default."""
    found = diagnosis.examine()
    assert found.hardware == hardware.describe()
    assert (found.policy, found.reason) == (found.hardware.policy, found.hardware.reason)
    assert found.switches.backend == BACKEND
    assert found.switches.policy == keras.config.dtype_policy().name
    assert found.switches.cores >= 1
    assert found.measured is None
    assert found.widths is None


def test_settings_include_environment_variables(monkeypatch):
    """Only variables that affect speed are included."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/dev/null")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    settings = backend_settings.read()
    assert settings.variables["XLA_FLAGS"] == "--xla_dump_to=/dev/null"
    assert set(settings.variables) <= set(backend_settings.VARIABLES)
    assert settings.tf32 is False


def test_speeds_are_measured(monkeypatch):
    """Every dtype is measured, here on the smallest sizes."""
    monkeypatch.setattr(speed_test, "_MATMUL_SIZES", (8,))
    monkeypatch.setattr(speed_test, "_CONV_CHANNELS", (8,))
    monkeypatch.setattr(speed_test, "_MIN_SECONDS", 1e-5)
    monkeypatch.setattr(speed_test, "_CPU_LENGTH", 2**16)
    measured = diagnosis.examine(measure=True).measured
    assert [speed.dtype for speed in measured.speeds] == ["float32", "bfloat16", "float16"]
    assert all(speed.matmul_tflops > 0 and speed.conv_tflops > 0 for speed in measured.speeds)
    assert measured.bandwidth_gb_s > 0


@pytest.mark.slow
def test_measured_speeds_are_plausible():
    """Products in float32 are between 1 MFLOP/s and 1 EFLOP/s."""
    measured = diagnosis.examine(measure=True).measured
    assert [speed.dtype for speed in measured.speeds] == ["float32", "bfloat16", "float16"]
    assert all(speed.matmul_tflops > 0 and speed.conv_tflops > 0 for speed in measured.speeds)
    assert 1e-6 < measured.of("float32").matmul_tflops < 1e6
    assert 1e-3 < measured.bandwidth_gb_s < 1e5


@pytest.mark.parametrize("in_place", [False, True])
def test_a_work_chains_its_steps(in_place):
    """Every step takes the result of the one before. Only an in-place work keeps the result."""
    work = speed_test.Work(keras.ops.add, keras.ops.zeros((2,)), keras.ops.ones((2,)), 1.0, 3, in_place)
    work.run()
    assert float(work.values[0]) == (3.0 if in_place else 0.0)


def test_the_addition_writes_in_place():
    """The array holds the sum of all runs."""
    work = speed_test.addition(16)
    work.run()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(work.values), np.full(16, 2.0))


def test_timed_functions_are_interleaved():
    """Every round calls each function once, and the order rotates."""
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleaved(functions, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert all(len(seconds) == 3 and min(seconds) >= 0 for seconds in times.values())
    assert timing.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


@pytest.mark.parametrize(
    ("devices", "changes", "warning"),
    [
        (
            (CPU,),
            {"backend": "tensorflow", "onednn": False, "variables": {"TF_ENABLE_ONEDNN_OPTS": "0"}},
            "oneDNN is off",
        ),
        ((CPU,), {"policy": "mixed_float16"}, "mixed_float16.*use mixed_bfloat16"),
        ((CPU,), {}, "emulated"),
        ((hardware.cpu(frozenset(), "old"),), {}, "no bfloat16 arithmetic.*saves memory"),
        ((CPU, hardware.gpu("P100", (6, 0))), {}, r"P100: compute capability 6\.0.*no time"),
        ((CPU, hardware.gpu("V100", (7, 0))), {"policy": "mixed_bfloat16"}, "use mixed_float16"),
    ],
)
def test_slow_mixed_precision_is_warned_of(devices, changes, warning):
    """The warning names the device or policy and a remedy."""
    assert re.search(warning, warned(*devices, **changes))


def test_a_gpu_that_the_backend_does_not_see_is_warned_of(tmp_path, monkeypatch):
    """The NVIDIA driver is loaded, but the backend has no GPU."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(diagnosis, "_NVIDIA_DRIVER", tmp_path / "version")
    assert "JAX sees no GPU" in warned(CPU, backend="jax")
    assert "sees no GPU" not in warned(CPU, hardware.gpu("H100", (9, 0)))


def test_a_good_machine_is_not_warned_of():
    """Covers a GPU with tensor cores, and bfloat16 on a CPU that supports it."""
    assert warned(CPU, hardware.gpu("H100", (9, 0)), policy="mixed_float16", onednn=False) == ""
    assert "slow" not in warned(CPU, policy="mixed_bfloat16", onednn=True)


def test_half_precision_that_is_slower_than_float32_is_warned_of():
    """The hardware supports bfloat16, but it measures slower."""
    machine, settings = Hardware((CPU,)), backend_settings.read()
    (slow,) = set(diagnosis.warnings(machine, settings, SLOW)) - set(diagnosis.warnings(machine, settings))
    assert slow.startswith("bfloat16")
    assert "0.5 times" in slow
    assert set(diagnosis.warnings(machine, settings, FAST)) == set(diagnosis.warnings(machine, settings))


def test_odd_widths_of_dense_and_conv_layers_are_found():
    """Covers the inner and outer width of kernels. Depthwise kernels are not matrix products."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 16)),
            layers.Conv2D(30, 3, name="conv"),
            layers.DepthwiseConv2D(3),
            layers.SeparableConv2D(24, 3, name="separable"),
            layers.Conv2DTranspose(12, 3, name="transpose"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(64, name="dense"),
            layers.Dense(10, name="logits"),
        ]
    )
    assert found(model) == [
        ("conv", "filters", 30, 32),
        ("separable", "inputs", 30, 32),
        ("transpose", "filters", 12, 16),
        ("dense", "inputs", 12, 16),
        ("logits", "units", 10, 16),
    ]


def test_odd_widths_of_attention_recurrence_and_embeddings_are_found():
    """Covers head sizes, units of recurrent cells and the width of an embedding, but not its rows."""
    tokens = keras.Input((6,))
    vectors = layers.Embedding(1001, 20, name="embedding")(tokens)
    attended = layers.MultiHeadAttention(4, 6, name="attention")(vectors, vectors)
    hidden = layers.LSTM(33, name="lstm")(attended)
    all_widths = found(keras.Model(tokens, layers.Dense(8, name="last")(hidden)))
    assert ("embedding", "output_dim", 20, 24) in all_widths
    assert ("attention", "key_dim", 6, 8) in all_widths
    assert ("attention/query", "inputs", 20, 24) in all_widths
    assert ("attention/query", "units", 24, 24) not in all_widths
    assert ("lstm/lstm_cell", "units", 33, 40) in all_widths
    assert ("last", "inputs", 33, 40) in all_widths


def test_float32_layers_of_a_half_precision_model_are_ignored():
    """In a float32 model all layers are checked."""
    stack = [keras.Input((8,)), layers.Dense(8), Float32(layers.Dense(10))]
    assert [width[1:] for width in found(keras.Sequential(stack))] == [("units", 10, 16)]
    keras.config.set_dtype_policy("mixed_bfloat16")
    stack = [keras.Input((8,)), layers.Dense(8), Float32(layers.Dense(10))]
    assert found(keras.Sequential(stack)) == []


def test_half_precision_variables_are_checked_against_the_optimizer():
    """The compiled one, or Adam if there is none."""
    keras.config.set_dtype_policy("bfloat16")
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64)], name="mine")
    (warning,) = set(diagnosis.examine(model).warnings) - set(diagnosis.examine().warnings)
    assert re.search(r"'mine'.*Adam.* beta_2 = 0\.999", warning)
    model.compile("nadam", "mse")
    (warning,) = set(diagnosis.examine(model).warnings) - set(diagnosis.examine().warnings)
    assert re.search(r"Nadam updates 2 bfloat16 .*beta_2.*LowPrecisionOptimizer", warning)
    model.compile("sgd", "mse")
    assert diagnosis.examine(model).warnings == diagnosis.examine().warnings


def test_a_diagnosis_prints_as_tables():
    """Prints devices, policy, settings, speeds, warnings, and at most ten layers."""
    odd = tuple(Width(f"layer_{number}[a]", "Dense", "units", 10, 16) for number in range(13))
    text = str(diagnosis.Diagnosis(Hardware((CPU,)), backend_settings.read(), ("beware",), FAST, odd))
    for words in ("some CPU", "AVX512-BF16", "mixed_bfloat16", "TF32", "2 x", "0.5 x", "50 GB/s", "! beware"):
        assert words in text
    assert "layer_9[a] (Dense)" in text
    assert "layer_10" not in text
    assert "and 3 more" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_diagnosis_is_json():
    """The JSON has all fields, with policy and reason."""
    odd = (Width("logits", "Dense", "units", 10, 16),)
    found = diagnosis.Diagnosis(Hardware((CPU,)), backend_settings.read(), ("beware",), FAST, odd)
    read = json.loads(found.to_json())
    assert set(read) == {"policy", "reason", "hardware", "switches", "warnings", "measured", "widths"}
    assert read["policy"] == "mixed_bfloat16"
    assert read["hardware"]["devices"][0]["features"] == ["AVX512-BF16"]
    speed = {"dtype": "float16", "matmul_tflops": 0.5, "conv_tflops": 0.5, "matmul_ratio": 0.5, "conv_ratio": 0.5}
    assert read["measured"] == {"speeds": [*read["measured"]["speeds"][:2], speed], "bandwidth_gb_s": 50.0}
    assert read["widths"] == [{"layer": "logits", "kind": "Dense", "name": "units", "width": 10, "better": 16}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with modules."""
    (tmp_path / "zoo_of_doctor.py").write_text(
        "import keras\n"
        "def good(): return keras.Sequential([keras.Input((4,)), keras.layers.Dense(30, name='dense')])\n"
        "def unbuilt(): return keras.Sequential([keras.layers.Dense(3)])\n"
        "def number(): return 3\n"
        "def step(): return good(), [[1.0] * 4], [1.0]\n"
        "def many(): return good(), 1, 2, 3\n"
        "def broken(): raise ValueError('from inside')\n"
        "constant = 3\n"
    )
    (tmp_path / "needy_of_doctor.py").write_text("import no_such_thing_of_doctor\n")
    (tmp_path / "text.keras").write_text("no zip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("zoo_of_doctor", None)


def test_models_come_from_functions_and_files(here):
    """Covers a module of the current directory and a saved model."""
    model = load_model.load_model("zoo_of_doctor:good")
    assert found(model) == [("dense", "inputs", 4, 8), ("dense", "units", 30, 32)]
    assert found(load_model.load_model("zoo_of_doctor:step")) == found(model)
    model.save(here / "model.keras")
    assert found(load_model.load_model("model.keras")) == found(model)
    assert len(diagnosis.examine(model).widths) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zoo_of_doctor", "'zoo_of_doctor'"),
        (":good", "':good'"),
        ("no_zoo:good", "no_zoo"),
        ("zoo_of_doctor.inner:good", "zoo_of_doctor.inner"),
        ("zoo_of_doctor:bad", "no attribute"),
        ("zoo_of_doctor:constant", "callable"),
        ("zoo_of_doctor:number", "returned 3"),
        ("zoo_of_doctor:many", "returned"),
        ("zoo_of_doctor:unbuilt", "not built"),
        ("../zoo_of_doctor:good", "module name"),
        ("zoo_of_doctor.py:good", "module name"),
        ("none.keras", "no such file"),
        ("text.keras", "not written by"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_bad_model_is_named_with_the_reason(spec, message):
    """The error is one line with the value and the reason."""
    with pytest.raises(UsageError, match=message) as caught:
        load_model.load_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("here")
def test_errors_in_user_code_are_raised_unchanged():
    """The traceback points to the user's code."""
    with pytest.raises(ValueError, match="from inside"):
        load_model.load_model("zoo_of_doctor:broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_of_doctor"):
        load_model.load_model("needy_of_doctor:good")
