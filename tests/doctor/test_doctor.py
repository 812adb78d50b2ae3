from __future__ import annotations

import dataclasses
import json
import re
import sys

import keras
import pytest
from keras import layers

from tfmixed import hardware
from tfmixed._cli import load_model
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
    state = dataclasses.replace(backend_settings.read(), **changes)
    return " / ".join(diagnosis.warnings(Hardware(devices), state))


def found(model, multiple=8):
    odd = tile_alignment.odd_widths(model, multiple)
    return [(each.layer.removeprefix(f"{model.name}/"), each.name, each.width, each.better) for each in odd]


def test_this_machine_is_examined():
    """Hardware, switches and policy agree with their sources, and nothing is measured unasked."""
    found = diagnosis.examine()
    assert found.hardware == hardware.describe()
    assert (found.policy, found.reason) == (found.hardware.policy, found.hardware.reason)
    assert found.switches.backend == keras.backend.backend()
    assert found.switches.policy == keras.config.dtype_policy().name
    assert found.switches.cores >= 1
    assert found.measured is None
    assert found.widths is None


def test_switches_tell_which_variables_are_set(monkeypatch):
    """Those that steer speed, and no others."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/dev/null")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    state = backend_settings.read()
    assert state.variables["XLA_FLAGS"] == "--xla_dump_to=/dev/null"
    assert set(state.variables) <= set(backend_settings.VARIABLES)
    assert state.tf32 is False


def test_all_is_measured():
    """Positive numbers for each dtype; float32 products are neither 1 MFLOP/s nor 1 EFLOP/s."""
    measured = diagnosis.examine(measure=True).measured
    assert [speed.dtype for speed in measured.speeds] == ["float32", "bfloat16", "float16"]
    assert all(speed.matmul_tflops > 0 and speed.conv_tflops > 0 for speed in measured.speeds)
    assert 1e-6 < measured.of("float32").matmul_tflops < 1e6
    assert 1e-3 < measured.bandwidth_gb_s < 1e5


def test_rates_are_medians_of_runs_in_turns():
    """Each work runs once a round."""
    order = []
    works = [speed_test.Work(lambda name=name: order.append(name), 10.0) for name in "ab"]
    assert all(rate > 0 for rate in speed_test.rates(works, rounds=3))
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("devices", "changes", "warning"),
    [
        (
            (CPU,),
            {"backend": "tensorflow", "onednn": False, "variables": {"TF_ENABLE_ONEDNN_OPTS": "0"}},
            r"oneDNN is off \(TF_ENABLE_ONEDNN_OPTS is 0\).*set TF_ENABLE_ONEDNN_OPTS=1",
        ),
        ((CPU,), {"policy": "mixed_float16"}, r"policy is mixed_float16, and float16 is slow.*use mixed_bfloat16"),
        ((CPU,), {}, "float16 is emulated on CPUs"),
        ((hardware.cpu(frozenset(), "old"),), {}, "no bfloat16 arithmetic.*saves memory on it and no time"),
        ((CPU, hardware.gpu("P100", (6, 0))), {}, r"P100: compute capability 6\.0 has no tensor cores.*no time"),
        ((CPU, hardware.gpu("V100", (7, 0))), {"policy": "mixed_bfloat16"}, "bfloat16 is slow here: use mixed_float16"),
    ],
)
def test_what_makes_mixed_precision_useless_is_warned_of(devices, changes, warning):
    """By name, and with what to do instead."""
    assert re.search(warning, warned(*devices, **changes))


def test_a_gpu_that_the_backend_does_not_see_is_warned_of(tmp_path, monkeypatch):
    """Where its driver runs."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(diagnosis, "_NVIDIA_DRIVER", tmp_path / "version")
    assert "JAX sees no GPU: install its CUDA build" in warned(CPU, backend="jax")
    assert "sees no GPU" not in warned(CPU, hardware.gpu("H100", (9, 0)))


def test_a_good_machine_is_not_warned_of():
    """A GPU with tensor cores, or bfloat16 on a CPU that has it."""
    assert warned(CPU, hardware.gpu("H100", (9, 0)), policy="mixed_float16", onednn=False) == ""
    assert "slow" not in warned(CPU, policy="mixed_bfloat16", onednn=True)


def test_half_precision_that_is_slower_than_float32_is_warned_of():
    """Where the hardware promises otherwise."""
    machine, state = Hardware((CPU,)), backend_settings.read()
    (slow,) = set(diagnosis.warnings(machine, state, SLOW)) - set(diagnosis.warnings(machine, state))
    assert slow.startswith("bfloat16 should be faster than float32 here, and its matrix products are 0.5 times as fast")
    assert set(diagnosis.warnings(machine, state, FAST)) == set(diagnosis.warnings(machine, state))


def test_odd_widths_of_dense_and_conv_layers_are_found():
    """Inner and outer width of each kernel, with the next multiple; depthwise kernels multiply no matrices."""
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
    """Head sizes, units of cells, and the width of an embedding, whose rows are only looked up."""
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


def test_layers_that_stay_in_float32_need_no_multiples():
    """An island in a half-precision model; in a float32 model each layer could become half."""
    stack = [keras.Input((8,)), layers.Dense(8), Float32(layers.Dense(10))]
    assert [width[1:] for width in found(keras.Sequential(stack))] == [("units", 10, 16)]
    keras.config.set_dtype_policy("mixed_bfloat16")
    stack = [keras.Input((8,)), layers.Dense(8), Float32(layers.Dense(10))]
    assert found(keras.Sequential(stack)) == []


def test_it_prints_what_a_person_looks_for():
    """Device, policy, switches, speeds with their ratio to float32, bandwidth, warnings; ten layers at most."""
    odd = tuple(Width(f"layer_{number}[a]", "Dense", "units", 10, 16) for number in range(13))
    text = str(diagnosis.Diagnosis(Hardware((CPU,)), backend_settings.read(), ("beware",), FAST, odd))
    for words in ("some CPU", "AVX512-BF16", "mixed_bfloat16", "TF32", "2 x", "0.5 x", "50 GB/s", "! beware"):
        assert words in text
    assert "layer_9[a] (Dense)" in text
    assert "layer_10" not in text
    assert "and 3 more" in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_holds_all_of_it():
    """The same values, policy and reason included."""
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
    """A directory with modules in it, as the current one."""
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
    """A module of the current directory, or what model.save wrote."""
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
    """One line: what was received, and what is wrong with it."""
    with pytest.raises(UsageError, match=message) as caught:
        load_model.load_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("here")
def test_what_fails_inside_the_users_code_is_raised_as_it_is():
    """Its traceback is what helps."""
    with pytest.raises(ValueError, match="from inside"):
        load_model.load_model("zoo_of_doctor:broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_of_doctor"):
        load_model.load_model("needy_of_doctor:good")
