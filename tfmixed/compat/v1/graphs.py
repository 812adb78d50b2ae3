"""The state of loss scaling in TensorFlow 1's graphs: one set of variables for each graph, made on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import tensorflow as tf
from keras import ops

from tfmixed._core import gradients
from tfmixed._core.event_buffer import NO_VARIABLE
from tfmixed._core.finite_check import CheckResult, FiniteCheck, StepResult
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._core.scaler_state import ScalerState
from tfmixed._core.variables import plain_variable
from tfmixed.compat.v1.control_flow import in_control_flow
from tfmixed.compat.v1.origins import Origins
from tfmixed.scaling import ScalingRule

V1 = tf.compat.v1
SCOPE = "tfmixed"
EVENT_CAPACITY = 256
_PENDING = {
    "pending_count": numpy.int32(0),
    "pending_bad": numpy.int32(0),
    "pending_culprit": numpy.int32(NO_VARIABLE),
    "pending_squares": numpy.float32(0),
    "pending_amax": numpy.float32(0),
}
_ATTRIBUTE = "_tfmixed"
_EAGER_PATHS: list[str] = []
_LAST = {"last_culprit": numpy.int32(NO_VARIABLE), "last_culprit_steps": numpy.int32(0)}


class Found(NamedTuple):
    """What gradients were found to be like: float32 scalars.

    Args:
        bad: 1 if one is not finite, else 0.
        culprit: The place of its variable, or `NO_VARIABLE`.
        squares: The sum of their squares.
        amax: Their largest absolute value, 0 where nobody asked.
    """

    bad: Any
    culprit: Any
    squares: Any
    amax: Any

    @classmethod
    def of(cls, result: CheckResult, indices: Sequence[int]) -> Found:
        """Returns the result of a check for variables in these places."""
        places = ops.convert_to_tensor(numpy.array([*indices, NO_VARIABLE], "float32"))
        bad = 1.0 - ops.cast(result.finite, "float32")
        culprit = ops.take(
            places, ops.where(result.finite, len(indices), ops.cast(ops.argmax(result.overflowed), "int32"))
        )
        amax = ops.zeros((), "float32") if result.amax is None else result.amax
        return cls(bad, culprit, ops.square(result.norm), amax)


class GraphState(ScalerState):
    """The state of one scaler in one graph.

    Gradients are judged when they are computed. What is found goes along with them, and is kept in variables too until
    a step is taken: neither clipping, nor adding up over several runs of a session, nor a `tf.cond` in between can
    hide an overflow. A step whose gradients come from `compute_gradients` alone, within its run, asks for no more.

    Args:
        rule: How the scale moves.
        mirror: A variable that is to hold the scale too, or None.
    """

    def __init__(self, rule: ScalingRule, mirror: Any = None) -> None:
        self._known: dict[str, Any] = {}
        super().__init__(rule, EVENT_CAPACITY, plain_variable)
        self.create({**_PENDING, **_LAST}, plain_variable)
        self._mirror = mirror
        self._graph = None if tf.executing_eagerly() else V1.get_default_graph()
        self.paths = _EAGER_PATHS if self._graph is None else _kept_by(self._graph).paths
        if self._graph is not None:
            # A graph that is final takes no more operations, and is asked all the same.
            self._known = {name: self.read(name) for name in self.variables}

    def read(self, name: str) -> Any:
        """Returns the present value of a variable: at the top of a graph always the same tensor."""
        at_top = name in self._known and V1.get_default_graph() is self._graph and not in_control_flow(self._graph)
        if at_top:
            return self._known[name]
        # A checkpoint of a run with another rule may hold a scale that this one cannot reach.
        value = super().read(name)
        return ops.clip(value, *self.rule.bounds) if name == "dynamic_scale" else value

    def indices(self, variables: Sequence[Any]) -> list[int]:
        """Returns the places of variables among all that were seen in this graph, by whatever scaler."""
        names = [gradients.path(variable).removesuffix(":0") for variable in variables]
        self.paths += [name for name in dict.fromkeys(names) if name not in self.paths]
        return [self.paths.index(name) for name in names]

    def record(self, check: FiniteCheck, evidence: Any, indices: Sequence[int]) -> Any:
        """Keeps in mind what gradients were found to be like when they were computed; returns it, as a vector."""
        found = Found.of(check.result(evidence), indices)
        self._add(1, found.bad, found.squares)
        known, amax = self.read("pending_culprit"), self.read("pending_amax")
        culprit = ops.where(found.bad > 0, ops.cast(found.culprit, known.dtype), known)
        self.assign({"pending_culprit": culprit, "pending_amax": ops.maximum(amax, found.amax)})
        return ops.stack(found)

    def conclude(self, check: FiniteCheck, evidence: Any, indices: Sequence[int], origins: Origins) -> Any:
        """Ends a step: moves the scale, and returns whether to apply the gradients."""
        result = check.result(evidence)
        now = Found.of(result, indices)
        before = self._told(origins.found) if origins.complete else self._remembered(now, origins.found)
        finite = ops.logical_and(result.finite, before.bad <= 0)
        culprit = ops.cast(ops.where(before.bad > 0, before.culprit, now.culprit), "int64")
        amax = before.amax if self.rule.needs_amax else None
        self.advance(StepResult(finite, culprit, ops.sqrt(before.squares), amax))
        self._note_culprit(finite, culprit)
        if self._mirror is not None:
            self._mirror.assign(self.read("dynamic_scale"))
        return finite if self.rule.skip_nonfinite else ops.ones_like(finite)

    def _told(self, found: Sequence[Any]) -> Found:
        """Returns what tensors say, each of one computation, and takes back what was remembered of them."""
        table = ops.stack(found)
        bad, culprit, _, amax = ops.unstack(ops.max(table, axis=0))
        squares = table[:, 2]
        self._add(-len(found), -ops.sum(table[:, 0]), -ops.sum(_finite(squares)))
        # Of several towers the root of the mean square.
        return Found(bad, culprit, ops.mean(squares), amax)

    def _remembered(self, now: Found, found: Sequence[Any]) -> Found:
        """Returns what was found since the last step, and forgets it: runs of the session may lie in between."""
        count, squares = ops.cast(self.read("pending_count"), "float32"), self.read("pending_squares")
        told = [each[0] for each in found]  # another step that runs beside this one may have taken it
        bad = ops.max(ops.stack([ops.cast(self.read("pending_bad"), "float32"), *told]))
        culprit = ops.cast(self.read("pending_culprit"), "float32")
        mean = ops.where(bad > 0, numpy.inf, squares / ops.maximum(count, 1.0))
        amax = self.read("pending_amax")
        self.assign(_PENDING)
        return Found(bad, culprit, *(ops.where(count > 0, *pair) for pair in ((mean, now.squares), (amax, now.amax))))

    def _add(self, count: int, bad: Any, squares: Any) -> None:
        # One operation each: several computations may do so at once.
        for name, value in (("count", count), ("bad", bad), ("squares", _finite(squares))):
            variable = self._tensor_of("pending_" + name)
            variable.assign_add(ops.cast(value, variable.dtype))

    def _note_culprit(self, finite: Any, culprit: Any) -> None:
        last, steps = self.read("last_culprit"), self.read("last_culprit_steps")
        culprit = ops.cast(culprit, last.dtype)
        again = ops.where(ops.equal(culprit, last), steps + 1, ops.ones_like(steps))
        self.assign({"last_culprit": culprit, "last_culprit_steps": ops.where(finite, ops.zeros_like(steps), again)})

    def _tensor_of(self, name: str) -> Any:
        return self.variables[name].value


class Blaming(ScalerBase):
    """What tells of the scaling of a graph: of the variables that overflow it knows the last one alone."""

    def _overflow_counts(self) -> dict[str, int]:
        state = self._state()
        culprit = int(state.read("last_culprit"))
        return {} if culprit < 0 else {self._paths[culprit]: int(state.read("last_culprit_steps"))}


class _Kept(NamedTuple):
    """What a graph keeps.

    Args:
        states: Those of its scalers, and the tensor of each one's scale.
        paths: The names of the variables that its scalers have seen: one may check what another applies.
    """

    states: dict[Scalings, tuple[GraphState, Any]]
    paths: list[str]


class Scalings:
    """The states of one scaler, one in each graph; eager code and its functions share one.

    Args:
        rule: How the scale moves.
        mirror: A variable of TensorFlow's own loss scale that follows ours in its graph, or None.
    """

    def __init__(self, rule: ScalingRule, mirror: Any = None) -> None:
        self.rule = rule
        self._mirror = mirror
        self.eager: GraphState | None = None

    def here(self) -> GraphState:
        """Returns the state in the present graph, and makes it if need be."""
        with tf.init_scope():
            if tf.executing_eagerly():
                self.eager = self.eager or GraphState(self.rule, self._mirror_in(None))
                return self.eager
            graph = V1.get_default_graph()
            states = _kept_by(graph).states
            if self not in states:
                states[self] = self._made_in(graph)
            return states[self][0]

    def scale(self) -> Any:
        """Returns the scale of the present step; at the top of a graph it is a tensor named `tfmixed/loss_scale`."""
        state, graph = self.here(), V1.get_default_graph()
        known = () if tf.executing_eagerly() or in_control_flow(graph) else _kept_by(graph).states.get(self, ())
        return known[1] if known else state.read("dynamic_scale")

    def _made_in(self, graph: Any) -> tuple[GraphState, Any]:
        with V1.name_scope(None):
            scope = graph.unique_name(SCOPE)
        with V1.name_scope(scope + "/"):
            state = GraphState(self.rule, self._mirror_in(graph))
            # Read where a step begins: no update that runs beside it can change it.
            return state, tf.identity(state.read("dynamic_scale"), "loss_scale")

    def _mirror_in(self, graph: Any) -> Any:
        its = getattr(self._mirror, "graph", None) if graph is not None else None
        return self._mirror if its is graph else None


def _kept_by(graph: Any) -> _Kept:
    # By the graph itself, with which it ends.
    if not hasattr(graph, _ATTRIBUTE):
        setattr(graph, _ATTRIBUTE, _Kept({}, []))
    kept: _Kept = getattr(graph, _ATTRIBUTE)
    return kept


def _finite(values: Any) -> Any:
    return ops.where(ops.isfinite(values), values, 0.0)
