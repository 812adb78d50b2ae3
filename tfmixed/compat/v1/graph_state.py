"""State of loss scaling in TensorFlow 1 graphs: one set of variables for each graph, created on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import tensorflow as tf
from keras import ops

from tfmixed._core import gradients
from tfmixed._core.event_buffer import NO_VARIABLE
from tfmixed._core.finite_check import CheckResult
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._core.scaler_state import ScalerState
from tfmixed._core.variables import plain_variable
from tfmixed.compat.v1.graph_ops import Origins, in_control_flow
from tfmixed.scaling import ScalingRule

V1 = tf.compat.v1
SCOPE = "tfmixed"
EVENT_CAPACITY = 256
# Names of variables are part of checkpoints. "pending_culprit" holds the index of a variable that overflowed.
_PENDING = {
    "pending_count": numpy.int32(0),
    "pending_bad": numpy.int32(0),
    "pending_culprit": numpy.int32(NO_VARIABLE),
    "pending_squares": numpy.float32(0),
    "pending_amax": numpy.float32(0),
}
_LAST = {"last_culprit": numpy.int32(NO_VARIABLE), "last_culprit_steps": numpy.int32(0)}
_ATTRIBUTE = "_tfmixed"
_EAGER_PATHS: list[str] = []


class Finding(NamedTuple):
    """Result of a finite check in float32 scalars, which travels with the gradients as one vector.

    Args:
        overflow: 1 if a gradient is not finite, else 0.
        variable: Index of the first variable that overflowed, or `NO_VARIABLE`.
        squares: Sum of the squares of all gradients.
        amax: Largest absolute value, or 0 if it was not measured.
    """

    overflow: Any
    variable: Any
    squares: Any
    amax: Any

    @classmethod
    def of(cls, result: CheckResult, indices: Sequence[int]) -> Finding:
        """Returns the finding for variables of these indices."""
        known = ops.convert_to_tensor(numpy.array([*indices, NO_VARIABLE], "float32"))
        position = ops.where(result.finite, len(indices), ops.cast(ops.argmax(result.overflowed), "int32"))
        amax = ops.zeros((), "float32") if result.amax is None else result.amax
        overflow = 1.0 - ops.cast(result.finite, "float32")
        return cls(overflow, ops.take(known, position), ops.square(result.norm), amax)


class GraphState(ScalerState):
    """The state of one scaler in one graph.

    Gradients are checked when they are computed. The finding travels with them, and also stays in pending variables
    until a step is applied. So an overflow survives clipping, accumulation over several session runs, and a `tf.cond`.
    A step whose gradients only come from `compute_gradients` in the same run uses the travelling findings alone.

    Args:
        rule: The scaling rule.
        mirror: A variable that is kept equal to the scale. Defaults to None.
    """

    def __init__(self, rule: ScalingRule, mirror: Any = None) -> None:
        self._tensors: dict[str, Any] = {}
        super().__init__(rule, EVENT_CAPACITY, plain_variable)
        self.create({**_PENDING, **_LAST}, plain_variable)
        self._mirror = mirror
        self._graph = None if tf.executing_eagerly() else V1.get_default_graph()
        self.paths = _EAGER_PATHS if self._graph is None else _registry_of(self._graph).paths
        if self._graph is not None:
            # Read now, because a finalized graph accepts no more operations.
            self._tensors = {name: self.read(name) for name in self.variables}

    def read(self, name: str) -> Any:
        """Returns the current value of a variable. At the top of a graph, it is always the same tensor."""
        if name in self._tensors and V1.get_default_graph() is self._graph and not in_control_flow(self._graph):
            return self._tensors[name]
        # A checkpoint of a run with another rule may hold a scale out of bounds.
        value = super().read(name)
        return ops.clip(value, *self.rule.bounds) if name == "dynamic_scale" else value

    def indices(self, variables: Sequence[Any]) -> list[int]:
        """Returns the indices of variables among those of all scalers in this graph."""
        names = [gradients.path(variable).removesuffix(":0") for variable in variables]
        self.paths += [name for name in dict.fromkeys(names) if name not in self.paths]
        return [self.paths.index(name) for name in names]

    def record(self, result: CheckResult, indices: Sequence[int]) -> Any:
        """Stores the check of computed gradients as pending, and returns the finding as a vector."""
        finding = Finding.of(result, indices)
        self._add_pending(1, finding.overflow, finding.squares)
        old, amax = self.read("pending_culprit"), self.read("pending_amax")
        variable = ops.where(finding.overflow > 0, ops.cast(finding.variable, old.dtype), old)
        self.assign({"pending_culprit": variable, "pending_amax": ops.maximum(amax, finding.amax)})
        return ops.stack(finding)

    def advance_from(self, result: CheckResult, indices: Sequence[int], origins: Origins) -> Any:
        """Advances the state by one step, and returns whether to apply the gradients.

        Args:
            result: Finite check of the gradients to apply.
            indices: Indices of their variables.
            origins: Origins of the gradients.
        """
        now = Finding.of(result, indices)
        computed = self._combine(origins.findings) if origins.complete else self._take_pending(now, origins.findings)
        finite = ops.logical_and(result.finite, computed.overflow <= 0)
        variable = ops.cast(ops.where(computed.overflow > 0, computed.variable, now.variable), "int64")
        amax = computed.amax if self.rule.needs_amax else None
        self.advance(CheckResult(finite, None, ops.sqrt(computed.squares), amax, first=variable))
        self._count_overflows(finite, variable)
        if self._mirror is not None:
            self._mirror.assign(self.read("dynamic_scale"))
        return finite if self.rule.skip_nonfinite else ops.ones_like(finite)

    def _combine(self, findings: Sequence[Any]) -> Finding:
        """Returns the findings of several computations as one, and removes them from the pending variables."""
        table = ops.stack(findings)
        overflow, variable, _, amax = ops.unstack(ops.max(table, axis=0))
        squares = table[:, 2]
        self._add_pending(-len(findings), -ops.sum(table[:, 0]), -ops.sum(_finite(squares)))
        return Finding(overflow, variable, ops.mean(squares), amax)

    def _take_pending(self, now: Finding, findings: Sequence[Any]) -> Finding:
        """Returns the findings since the last step, and resets the pending variables.

        Args:
            now: The finding for the gradients to apply, for gradients that `compute_gradients` did not compute.
            findings: Findings of this run, which a step that runs in parallel may have taken.
        """
        count = ops.cast(self.read("pending_count"), "float32")
        pending = ops.cast(self.read("pending_bad"), "float32")
        overflow = ops.max(ops.stack([pending, *(finding[0] for finding in findings)]))
        variable = ops.cast(self.read("pending_culprit"), "float32")
        squares = ops.where(overflow > 0, numpy.inf, self.read("pending_squares") / ops.maximum(count, 1.0))
        amax = self.read("pending_amax")
        self.assign(_PENDING)
        is_pending = count > 0
        return Finding(
            overflow, variable, ops.where(is_pending, squares, now.squares), ops.where(is_pending, amax, now.amax)
        )

    def _add_pending(self, count: int, overflow: Any, squares: Any) -> None:
        # One operation for each variable, because several computations may run in parallel.
        for name, value in (("count", count), ("bad", overflow), ("squares", _finite(squares))):
            variable = self.variables["pending_" + name].value
            variable.assign_add(ops.cast(value, variable.dtype))

    def _count_overflows(self, finite: Any, variable: Any) -> None:
        last, steps = self.read("last_culprit"), self.read("last_culprit_steps")
        variable = ops.cast(variable, last.dtype)
        count = ops.where(ops.equal(variable, last), steps + 1, ops.ones_like(steps))
        self.assign({"last_culprit": variable, "last_culprit_steps": ops.where(finite, ops.zeros_like(steps), count)})


class GraphScaler(ScalerBase):
    """Base class of scalers with a `GraphState`, which only counts overflows of the last variable that overflowed."""

    def _overflow_counts(self) -> dict[str, int]:
        state = self._state()
        index = int(state.read("last_culprit"))
        return {} if index < 0 else {self._paths[index]: int(state.read("last_culprit_steps"))}


class _Registry(NamedTuple):
    """Attribute of a graph.

    Args:
        states: State and scale tensor of each scaler.
        paths: Names of the variables of all scalers. One may check gradients that another applies.
    """

    states: dict[GraphStates, tuple[GraphState, Any]]
    paths: list[str]


class GraphStates:
    """The states of one scaler: one for each graph, and one for eager code and its functions.

    Args:
        rule: The scaling rule.
        mirror: A variable of TensorFlow's own loss scale that is kept equal to the scale in its graph. Defaults to
            None.
    """

    def __init__(self, rule: ScalingRule, mirror: Any = None) -> None:
        self.rule = rule
        self._mirror = mirror
        self.eager: GraphState | None = None

    def here(self) -> GraphState:
        """Returns the state in the current graph, and creates it if needed."""
        with tf.init_scope():
            if tf.executing_eagerly():
                self.eager = self.eager or GraphState(self.rule, self._mirror_in(None))
                return self.eager
            graph = V1.get_default_graph()
            states = _registry_of(graph).states
            if self not in states:
                states[self] = self._create_in(graph)
            return states[self][0]

    def scale(self) -> Any:
        """Returns the scale of the current step. At the top of a graph, it is the tensor `tfmixed/loss_scale:0`."""
        state, graph = self.here(), V1.get_default_graph()
        if not tf.executing_eagerly() and not in_control_flow(graph) and self in _registry_of(graph).states:
            return _registry_of(graph).states[self][1]
        return state.read("dynamic_scale")

    def _create_in(self, graph: Any) -> tuple[GraphState, Any]:
        with V1.name_scope(None):
            scope = graph.unique_name(SCOPE)
        with V1.name_scope(scope + "/"):
            state = GraphState(self.rule, self._mirror_in(graph))
            # Read at the start of a step, so that a parallel update cannot change it.
            return state, tf.identity(state.read("dynamic_scale"), "loss_scale")

    def _mirror_in(self, graph: Any) -> Any:
        return self._mirror if getattr(self._mirror, "graph", None) is graph else None


def _registry_of(graph: Any) -> _Registry:
    if not hasattr(graph, _ATTRIBUTE):
        setattr(graph, _ATTRIBUTE, _Registry({}, []))
    registry: _Registry = getattr(graph, _ATTRIBUTE)
    return registry


def _finite(values: Any) -> Any:
    return ops.where(ops.isfinite(values), values, 0.0)
