from __future__ import annotations

import subprocess
import sys

import keras
import pytest
from backend import needs_tensorflow

from tfmixed import hardware, policy_scope, set_policy


def test_auto_takes_what_the_hardware_is_fast_in_and_says_why(capsys):
    """One line on standard error."""
    machine = hardware.describe()
    assert set_policy("auto").name == keras.config.dtype_policy().name == machine.policy
    assert capsys.readouterr().err == f"tfmixed: policy {machine.policy}: {machine.reason}\n"


@needs_tensorflow
def test_auto_asks_for_what_tensorflow_shows_each_time(monkeypatch):
    """Not for GPUs that `set_visible_devices` hides."""
    import tensorflow as tf

    visible, details = ["a GPU"], {"a GPU": {"compute_capability": (7, 0)}}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible if kind == "GPU" else [])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    with policy_scope("auto") as policy:
        assert policy.name == "mixed_float16"
    visible.clear()
    with policy_scope("auto") as policy:
        assert policy.name == hardware.cpu().policy


ONCE = """
import warnings, tfmixed
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        tfmixed.set_policy("mixed_float16")
for warning in caught:
    if "mixed_float16" in str(warning.message):
        print(warning.message)
"""


@pytest.mark.skipif("float16" in hardware.describe().main.fast, reason="float16 is fast here")
def test_a_slow_policy_warns_once_and_says_what_to_use():
    """With the reason, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", ONCE], capture_output=True, text=True, timeout=120, check=True)
    (line,) = run.stdout.splitlines()
    machine = hardware.describe()
    assert line.startswith("policy 'mixed_float16' is slow here: ")
    assert machine.reason in line
    assert f"Use {machine.policy!r}" in line


def test_scope_restores_the_policy_also_after_an_error():
    """Whatever happens inside."""
    before = keras.config.dtype_policy()
    with policy_scope("float64") as policy:
        assert policy.name == keras.config.dtype_policy().name == "float64"
    with pytest.raises(RuntimeError), policy_scope("float64"):
        raise RuntimeError
    assert keras.config.dtype_policy() == before


@pytest.mark.parametrize("policy", ["mixed_fp16", 16])
def test_an_unknown_policy_is_refused_and_changes_nothing(policy):
    """The message names the spellings that exist."""
    before = keras.config.dtype_policy()
    with pytest.raises(ValueError, match=rf'policy must be "auto", .* received {policy!r}'):
        set_policy(policy)
    assert keras.config.dtype_policy() == before


def test_a_policy_object_is_taken_as_it_is():
    """Keras's own objects work too."""
    assert set_policy(keras.DTypePolicy("float64")).name == "float64"
