"""State dict of a `GradScaler`, with PyTorch's five entries, and the getters and setters of its rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import keras
from keras import ops

from tfmixed._core import replica_sync
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._core.scaler_state import ScalerState
from tfmixed._core.step_tracker import StepTracker
from tfmixed.scaling import ScalingRule, validation

_FACTORS = ("growth_factor", "backoff_factor", "growth_interval")
_TRACKER = "_growth_tracker"
_COUNTERS = ("attempted_steps", "skipped_steps", "consecutive_skips")


class StateDict(ScalerBase):
    """Mixin with PyTorch's methods that read and set the state of a scaler between two iterations."""

    distribute_strategy: Any
    _enabled: bool
    _is_compiled: bool
    _step_tracker: StepTracker

    def _reset(self) -> None:
        raise NotImplementedError

    def get_growth_factor(self) -> float:
        """Returns the factor of a growth. A `ValueError` is raised if the rule has none."""
        return float(self._rule_attribute("growth_factor"))

    def get_backoff_factor(self) -> float:
        """Returns the factor of a backoff. A `ValueError` is raised if the rule has none."""
        return float(self._rule_attribute("backoff_factor"))

    def get_growth_interval(self) -> int:
        """Returns the finite iterations before a growth. A `ValueError` is raised if the rule has none."""
        return int(self._rule_attribute("growth_interval"))

    def set_growth_factor(self, new_factor: float) -> None:
        """Sets the factor of a growth. A `RuntimeError` is raised once functions are compiled."""
        self._set_rule_attribute("growth_factor", new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Sets the factor of a backoff. A `RuntimeError` is raised once functions are compiled."""
        self._set_rule_attribute("backoff_factor", new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Sets the finite iterations before a growth. A `RuntimeError` is raised once functions are compiled."""
        self._set_rule_attribute("growth_interval", new_interval)

    def _rule_attribute(self, name: str) -> Any:
        if not hasattr(self.rule, name):
            raise ValueError(f"The rule must have `{name}` to get or set it. Received: rule={self.rule}")
        return getattr(self.rule, name)

    def _set_rule_attribute(self, name: str, value: Any) -> None:
        if self._rule_attribute(name) != value:
            self._set_rule(dataclasses.replace(cast("Any", self.rule), **{name: value}), name)
            self._state().rule = self.rule

    def _set_rule(self, rule: ScalingRule, argument: str) -> None:
        if self._is_compiled and not _are_alike(rule, self.rule):
            raise RuntimeError(
                f"`{argument}` must not change the rule that functions were compiled with, {self.rule}. Set it before "
                f"they are called. Received: {rule}"
            )
        self.rule = rule

    @property
    def variables(self) -> list[keras.Variable]:
        """Variables for a checkpoint: the rule's state and the counters."""
        return [self._state().variables[ScalerState.name_of(name)] for name in _names(self.rule)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for `load_state_dict` as plain numbers, strings and dictionaries; empty if not enabled.

        PyTorch's own entries are included as far as the rule has them, and take precedence over others when loaded.
        Events are not included: drain them first. Call it after `update`. Reads the device.
        """
        return _taken(self._state()) if self._enabled else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from the state of this class's or PyTorch's scaler. Does nothing if not enabled.

        Args:
            state_dict: State from `state_dict` of this class or of PyTorch's scaler, which also sets the factors.
                Nothing is loaded if an entry is wrong.

        Raises:
            ValueError: If an entry is missing or out of range.
            RuntimeError: If it has another rule than functions were compiled with.
        """
        if not self._enabled:
            return
        rule, values = _read(state_dict, self.rule)
        is_other = not _are_alike(rule, self.rule)
        self._set_rule(rule, "state_dict")
        if is_other:
            self._reset()
        self._state().rule = rule
        replica_sync.run_jointly_once(functools.partial(self._restore, values), self.distribute_strategy)

    def _restore(self, values: Mapping[str, Any]) -> None:
        self._state().assign(values)
        self._step_tracker.close()


def _names(rule: ScalingRule) -> tuple[str, ...]:
    return (*rule.start()._fields, *_COUNTERS)


def _taken(state: ScalerState) -> dict[str, Any]:
    """Returns the rule, its state and the counters as a dictionary. Reads the device."""
    rule = state.rule
    now = {name: ops.convert_to_numpy(state.read(ScalerState.name_of(name))).item() for name in _names(rule)}
    pytorch = {"scale": now["scale"], **{name: getattr(rule, name) for name in _FACTORS if hasattr(rule, name)}}
    if "good_steps" in now:
        pytorch[_TRACKER] = now["good_steps"]
    return {**pytorch, "rule": rule.get_config(), "state": now}


def _read(saved: Mapping[str, Any], rule: ScalingRule) -> tuple[ScalingRule, dict[str, Any]]:
    """Returns the rule of a state dict, and the values of its variables by name.

    Args:
        saved: State dict of this class or of a `torch.amp.GradScaler`. PyTorch's entries take precedence.
        rule: The present rule, for what `saved` does not contain.

    Raises:
        ValueError: If an entry is missing or out of range.
    """
    if "rule" in saved:
        rule = ScalingRule.from_config(_nested(saved, "rule"))
    scale = validation.scale("scale", _entry(saved, "scale"))
    factors = {name: _entry(saved, name) for name in _FACTORS if hasattr(rule, name)}
    if factors:
        rule = dataclasses.replace(cast("Any", rule), **factors)
    low, high = rule.bounds
    start, names = rule.start(), _names(rule)
    state = {**start._asdict(), **dict.fromkeys(_COUNTERS, 0)}
    if "state" in saved:
        own = _nested(saved, "state")
        state = {name: _entry(own, name) for name in names}
    state["scale"] = validation.number("scale", scale, least=low, most=high)
    if "good_steps" in start._fields:
        state["good_steps"] = validation.count(_TRACKER, _entry(saved, _TRACKER), -(2**31))
    values = {}
    for name in names:
        is_whole = name in _COUNTERS or getattr(start, name).dtype.kind == "i"
        value = validation.count(name, state[name], -(2**31)) if is_whole else validation.number(name, state[name])
        values[ScalerState.name_of(name)] = value
    return rule, values


def _are_alike(rule: ScalingRule, present: ScalingRule) -> bool:
    """Returns whether two rules do the same from the same state. Their initial scales may differ."""
    own, theirs = ({**config.get_config(), "initial_scale": None} for config in (rule, present))
    return own == theirs


def _nested(saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = saved[name]
    if not isinstance(entry, dict):
        raise ValueError(f"`state_dict[{name!r}]` must be a dictionary. Received: {entry!r}")
    return entry


def _entry(saved: Mapping[str, Any], name: str) -> Any:
    if name not in saved:
        hint = "" if saved else " A scaler that is not enabled saves nothing."
        raise ValueError(f"`state_dict` must have the entry {name!r}.{hint} Received: {sorted(saved)}")
    return saved[name]
