"""The state of a loss scaler as a dictionary of plain values: PyTorch's five entries, and what they lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import keras
from keras import ops

from tfmixed._core.scaler_state import ScalingState
from tfmixed.scaling import ScalingRule, validation

_FACTORS = ("growth_factor", "backoff_factor", "growth_interval")
_TRACKER = "_growth_tracker"
_COUNTERS = ("attempted_steps", "skipped_steps", "consecutive_skips")


def variables(state: ScalingState) -> list[keras.Variable]:
    """Returns the variables that hold what `take` takes."""
    return [state.variables[ScalingState.name_of(name)] for name in (*state.rule.start()._fields, *_COUNTERS)]


def take(state: ScalingState) -> dict[str, Any]:
    """Returns the rule, its state and the counters. Reads the device."""
    rule = state.rule
    fields = rule.start()._fields
    now = {name: _plain(state.read(ScalingState.name_of(name))) for name in (*fields, *_COUNTERS)}
    pytorch = {"scale": now["scale"], **{name: getattr(rule, name) for name in _FACTORS if hasattr(rule, name)}}
    if "good_steps" in fields:
        pytorch[_TRACKER] = now["good_steps"]
    return {**pytorch, "rule": rule.get_config(), "state": now}


def read(saved: Mapping[str, Any], rule: ScalingRule) -> tuple[ScalingRule, dict[str, Any]]:
    """Returns the rule of a snapshot, and the values of the variables of its state by their names.

    Args:
        saved: What `take` returned, or the state dictionary of a `torch.amp.GradScaler`; of two entries that say the
            same that of PyTorch counts.
        rule: The present one. What `saved` does not say is as it has it.

    Raises:
        ValueError: An entry is missing or out of range; the message names it.
    """
    if "rule" in saved:
        rule = ScalingRule.from_config(_nested(saved, "rule"))
    scale = validation.scale("scale", _entry(saved, "scale"))
    fits = {name: _entry(saved, name) for name in _FACTORS if hasattr(rule, name)}
    if fits:
        rule = dataclasses.replace(cast("Any", rule), **fits)
    low, high = rule.bounds
    start = rule.start()
    names = (*start._fields, *_COUNTERS)
    state = {**start._asdict(), **dict.fromkeys(_COUNTERS, 0)}
    if "state" in saved:
        own = _nested(saved, "state")
        state = {name: _entry(own, name) for name in names}
    state["scale"] = validation.number("scale", scale, least=low, most=high)
    if "good_steps" in start._fields:
        state["good_steps"] = validation.count(_TRACKER, _entry(saved, _TRACKER), -(2**31))
    values = {}
    for name in names:
        whole = name in _COUNTERS or getattr(start, name).dtype.kind == "i"
        value = validation.count(name, state[name], -(2**31)) if whole else validation.number(name, state[name])
        values[ScalingState.name_of(name)] = value
    return rule, values


def move_alike(one: ScalingRule, other: ScalingRule) -> bool:
    """Returns whether two rules do the same from the same state: they may start from different scales."""
    first, second = ({**rule.get_config(), "initial_scale": None} for rule in (one, other))
    return first == second


def _nested(saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = saved[name]
    if not isinstance(entry, dict):
        raise ValueError(f"state_dict[{name!r}] must be a dictionary, received {entry!r}")
    return entry


def _entry(saved: Mapping[str, Any], name: str) -> Any:
    if name not in saved:
        hint = "" if saved else ": a scaler that is not enabled saves nothing"
        raise ValueError(f"state_dict must hold {name!r}, received {sorted(saved)}{hint}")
    return saved[name]


def _plain(value: Any) -> Any:
    return ops.convert_to_numpy(value).item()
