"""`set_policy` and `policy_scope`."""

from __future__ import annotations

import warnings

import keras
import pytest
from backend import needs_tensorflow

import tfmixed
from tfmixed import hardware, policy_scope, set_policy


def test_auto_selects_the_recommended_policy_and_prints_the_reason(capsys):
    """In one line on standard error."""
    machine = hardware.describe()
    assert set_policy("auto").name == keras.config.dtype_policy().name == machine.policy
    assert capsys.readouterr().err == f"tfmixed: policy {machine.policy}: {machine.reason}\n"


@needs_tensorflow
def test_auto_considers_visible_devices_only(monkeypatch):
    """GPUs hidden by `set_visible_devices` do not count."""
    import tensorflow as tf

    visible, details = ["a GPU"], {"a GPU": {"compute_capability": (7, 0)}}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible if kind == "GPU" else [])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    with policy_scope("auto") as policy:
        assert policy.name == "mixed_float16"
    visible.clear()
    with policy_scope("auto") as policy:
        assert policy.name == hardware.cpu().policy


@pytest.mark.skipif("float16" in hardware.describe().main.fast, reason="float16 is fast here")
def test_a_slow_policy_warns_once_and_names_a_faster_one(monkeypatch):
    """With the reason."""
    monkeypatch.setattr(tfmixed.policy, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            set_policy("mixed_float16")
    (message,) = [str(warning.message) for warning in caught]
    machine = hardware.describe()
    assert "slow" in message
    assert machine.reason in message
    assert repr(machine.policy) in message


def test_policy_scope_restores_the_policy():
    """Also after an error."""
    before = keras.config.dtype_policy()
    with policy_scope("float64") as policy:
        assert policy.name == keras.config.dtype_policy().name == "float64"
    with pytest.raises(RuntimeError), policy_scope("float64"):
        raise RuntimeError
    assert keras.config.dtype_policy() == before


@pytest.mark.parametrize("policy", ["mixed_fp16", 16])
def test_an_unknown_policy_is_refused_and_changes_nothing(policy):
    """The error lists names that exist."""
    before = keras.config.dtype_policy()
    with pytest.raises(ValueError, match="mixed_float16"):
        set_policy(policy)
    assert keras.config.dtype_policy() == before


def test_a_policy_object_is_set_unchanged():
    """Keras policies are accepted."""
    assert set_policy(keras.DTypePolicy("float64")).name == "float64"
