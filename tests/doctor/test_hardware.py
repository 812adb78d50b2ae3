from __future__ import annotations

import sys
from pathlib import Path

import backend  # noqa: F401  # selects this file for JAX and PyTorch too
import pytest

from tfmixed import hardware
from tfmixed.hardware import Hardware


@pytest.mark.parametrize(
    ("capability", "policy", "fast"),
    [
        ((6, 1), "float32", ()),
        ((7, 0), "mixed_float16", ("float16",)),
        ((7, 5), "mixed_float16", ("float16",)),
        ((8, 0), "mixed_bfloat16", ("bfloat16", "float16")),
        ((9, 0), "mixed_bfloat16", ("bfloat16", "float16")),
        (None, "float32", ()),
    ],
)
def test_the_policy_of_a_gpu_depends_on_its_compute_capability(capability, policy, fast):
    """Tensor cores were introduced with 7.0 (float16) and 8.0 (bfloat16)."""
    device = hardware.gpu("some GPU", capability)
    assert (device.policy, device.fast) == (policy, fast)
    assert "compute capability" in device.reason


@pytest.mark.parametrize(
    ("features", "policy"),
    [
        ({"amx_bf16", "amx_tile"}, "mixed_bfloat16"),
        ({"avx512_bf16"}, "mixed_bfloat16"),
        ({"avx512f", "avx512_fp16"}, "float32"),
        (set(), "float32"),
    ],
)
def test_the_policy_of_a_cpu_depends_on_its_bfloat16_instructions(features, policy):
    """Requires AMX-BF16 or AVX512-BF16. TensorFlow does not use float16 instructions."""
    assert hardware.cpu(frozenset(features), "some CPU").policy == policy


def test_features_name_the_instruction_sets():
    """The order is fixed. Float16 instructions are listed, though they do not affect the policy."""
    flags = {"avx512_fp16", "amx_bf16", "avx512_bf16", "avx2", "avx_ne_convert", "amx_fp16"}
    features = ("AMX-BF16", "AVX512-BF16", "AMX-FP16", "AVX512-FP16", "AVX-NE-CONVERT")
    assert hardware.cpu(frozenset(flags)).features == features
    assert hardware.cpu(frozenset({"avx2"})).features == ()
    assert hardware.gpu("H100", (9, 0)).features == ()


@pytest.mark.parametrize(("capability", "text"), [((6, 1), "6.1"), ((7, 5), "7.5"), ((10, 0), "10.0"), (None, None)])
def test_gpus_report_their_compute_capability(capability, text):
    """It is `None` if the driver does not report it."""
    assert hardware.gpu("some GPU", capability).compute_capability == text


def test_the_weakest_accelerator_decides():
    """The CPU determines the policy only without an accelerator."""
    cpu = hardware.cpu(frozenset(), "CPU")
    old, new = hardware.gpu("old", (7, 0)), hardware.gpu("new", (9, 0))
    assert Hardware((cpu,)).policy == "float32"
    assert Hardware((cpu, new)).policy == "mixed_bfloat16"
    assert Hardware((cpu, new, old)).policy == "mixed_float16"
    assert Hardware((cpu, hardware.tpu("v5e"))).reason == "TPUs multiply in bfloat16"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/cpuinfo")
def test_the_cpu_agrees_with_proc_cpuinfo():
    """The policy matches the CPU flags."""
    flags = Path("/proc/cpuinfo").read_text().split()
    device = hardware.describe().devices[0]
    assert device.kind == "cpu"
    assert (device.policy == "mixed_bfloat16") is bool({"amx_bf16", "avx512_bf16"} & set(flags))


def test_it_prints_as_a_table():
    """The table has a row for each device."""
    text = str(Hardware((hardware.gpu("H100", (9, 0)),)))
    for word in ("device", "fast in", "H100", "mixed_bfloat16", "compute capability 9.0"):
        assert word in text
