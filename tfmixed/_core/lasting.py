"""What of a `GradScaler` lasts from one iteration to the next: its rule, its variables, and a dictionary of them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any, cast

import keras

from tfmixed._core import arguments, replica_sync
from tfmixed._core import state_dict as snapshots
from tfmixed._core.control_flow import in_graph, in_session_graph
from tfmixed._core.scaler_state import Observable, ScalingState
from tfmixed._core.step_tracker import Iteration
from tfmixed._core.turn import Turn
from tfmixed._core.variables import plain_variable
from tfmixed.scaling import ScalingRule, validation


class Lasting(Observable):
    """A scaler between two iterations: PyTorch's getters and setters look at it, and its state dictionary holds it.

    Args:
        rule: How the scale moves.
        enabled: As in `GradScaler`, like the rest.
        max_consecutive_skips: The same.
        event_capacity: The same.
    """

    def __init__(
        self, rule: ScalingRule, enabled: bool, max_consecutive_skips: int | None, event_capacity: int
    ) -> None:
        self.rule, self._enabled = rule, enabled
        self.max_consecutive_skips = arguments.skip_limit(max_consecutive_skips)
        self.event_capacity = validation.count("event_capacity", event_capacity, 1)
        self._begin()

    def _begin(self) -> None:
        self._scaling: ScalingState | None = None
        self._is_compiled = False
        self.distribute_strategy: Any = None
        self._turns: weakref.WeakKeyDictionary[Any, Turn] = weakref.WeakKeyDictionary()
        self._paths: list[str] = []

    def _state(self) -> ScalingState:
        # Made on first use: PyTorch's may be made before anything else, too.
        if in_session_graph():
            raise NotImplementedError(
                "GradScaler must be called eagerly or in a tf.function, received a call in a graph for a Session, "
                "which would not run what nobody fetches: tfmixed.compat.v1 serves such graphs"
            )
        if self._scaling is None:
            self.distribute_strategy = replica_sync.current()
            self._iteration = Iteration(plain_variable)
            self._scaling = ScalingState(self.rule, self.event_capacity, plain_variable)
        self._is_compiled |= in_graph()
        return self._scaling

    def is_enabled(self) -> bool:
        """Returns whether this scaler does anything."""
        return self._enabled

    def get_growth_factor(self) -> float:
        """Returns the factor of a growth.

        Raises:
            ValueError: The rule has none, or the scaler is not enabled; so do the next five.
        """
        return float(self._of_rule("growth_factor"))

    def get_backoff_factor(self) -> float:
        """Returns the factor of a backoff."""
        return float(self._of_rule("backoff_factor"))

    def get_growth_interval(self) -> int:
        """Returns how many good iterations in a row let the scale grow."""
        return int(self._of_rule("growth_interval"))

    def set_growth_factor(self, new_factor: float) -> None:
        """Sets the factor of a growth, before functions are compiled; so do the next two.

        Raises:
            RuntimeError: Functions were compiled with the rule as it was.
        """
        self._change("growth_factor", new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Sets the factor of a backoff."""
        self._change("backoff_factor", new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Sets how many good iterations in a row let the scale grow."""
        self._change("growth_interval", new_interval)

    def _of_rule(self, name: str) -> Any:
        if not hasattr(self.rule, name):
            raise ValueError(f"rule must have a {name} to get or set, received {self.rule}: see scaler.rule")
        return getattr(self.rule, name)

    def _change(self, name: str, value: Any) -> None:
        if self._of_rule(name) != value:
            self._take_rule(dataclasses.replace(cast("Any", self.rule), **{name: value}), name)
            self._state().rule = self.rule

    def _take_rule(self, rule: ScalingRule, argument: str) -> None:
        if self._is_compiled and not snapshots.move_alike(rule, self.rule):
            raise RuntimeError(
                f"{argument} must leave the rule that functions were compiled with, {self.rule}, received {rule}: "
                "set it before they are called"
            )
        self.rule = rule

    @property
    def variables(self) -> list[keras.Variable]:
        """What a checkpoint must hold of it: the rule's state and the counters."""
        return snapshots.variables(self._state())

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs, as plain numbers, texts and dictionaries; empty if not enabled.

        PyTorch's own entries are there as far as the rule has them, and are what is loaded where others say the same.
        Events are not: drain them before. Reads the device. To be called after `update`.
        """
        if not self._enabled:
            return {}
        return snapshots.take(self._state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where the scaler of `state_dict` stood: this class's or PyTorch's.

        Nothing is loaded unless all is sound. Without effect if not enabled.

        Args:
            state_dict: Of PyTorch's scaler it sets the factors too.

        Raises:
            ValueError: An entry is missing or out of range; the message names it.
            RuntimeError: It has another rule, and functions were compiled with this one.
        """
        if not self._enabled:
            return
        rule, values = snapshots.read(state_dict, self.rule)
        begins = not snapshots.move_alike(rule, self.rule)
        self._take_rule(rule, "state_dict")
        if begins:
            self._begin()
        state = self._state()
        state.rule = rule

        def write() -> None:
            state.assign(values)
            self._iteration.close(self._iteration.known())

        replica_sync.once(write, self.distribute_strategy)
