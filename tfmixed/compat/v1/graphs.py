"""The state of loss scaling in TensorFlow 1's graphs: one set of variables for each graph, made on first use."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy
import tensorflow as tf
from keras import ops

from tfmixed import gradients
from tfmixed.events import NO_VARIABLE
from tfmixed.scaling import ScalingRule
from tfmixed.state import Outcome, ScalingState
from tfmixed.verdicts import Judge

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
_LAST = {"last_culprit": numpy.int32(NO_VARIABLE), "last_culprit_steps": numpy.int32(0)}


class GraphState(ScalingState):
    """The state of one scaler in one graph.

    Gradients are judged when they are computed, and what is found is kept in variables until a step is taken: neither
    clipping, nor adding up over several runs of a session, nor a `tf.cond` in between can hide an overflow.

    Args:
        rule: How the scale moves.
        mirror: A variable that is to hold the scale too, or None.
    """

    def __init__(self, rule: ScalingRule, mirror: Any = None) -> None:
        self._known: dict[str, Any] = {}
        super().__init__(rule, EVENT_CAPACITY, _add_variable)
        self.make({**_PENDING, **_LAST}, _add_variable)
        self.paths: list[str] = []
        self._mirror = mirror
        self._graph = None if tf.executing_eagerly() else V1.get_default_graph()
        if self._graph is not None:
            # A graph that is final takes no more operations, and is asked all the same.
            self._known = {name: self.read(name) for name in self.variables}

    def read(self, name: str) -> Any:
        """Returns the present value of a variable: at the top of a graph always the same tensor."""
        at_top = name in self._known and V1.get_default_graph() is self._graph and not _in_control_flow(self._graph)
        return self._known[name] if at_top else super().read(name)

    def indices(self, variables: Sequence[Any]) -> list[int]:
        """Returns the places of variables among all that were seen in this graph."""
        names = [gradients.path(variable).removesuffix(":0") for variable in variables]
        self.paths += [name for name in dict.fromkeys(names) if name not in self.paths]
        return [self.paths.index(name) for name in names]

    def record(self, judge: Judge, evidence: Any, scale: Any, indices: Sequence[int]) -> Any:
        """Keeps in mind what gradients were found to be like when they were computed; returns a tensor to wait for.

        What counts is added in one operation: several towers may do so at once.
        """
        verdict = judge.verdict(evidence, scale)
        bad, culprit = ops.logical_not(verdict.finite), _named(verdict, indices)
        amax = self.read("pending_amax") if verdict.amax is None else verdict.amax
        for name, value in (("count", 1), ("bad", bad), ("squares", ops.square(verdict.norm))):
            self._tensor_of("pending_" + name).assign_add(ops.cast(value, self._tensor_of("pending_" + name).dtype))
        known = self.read("pending_culprit")
        self.assign(
            {
                "pending_culprit": ops.where(bad, ops.cast(culprit, known.dtype), known),
                "pending_amax": ops.maximum(self.read("pending_amax"), amax),
            }
        )
        return tf.identity(bad)

    def conclude(self, judge: Judge, evidence: Any, indices: Sequence[int]) -> tuple[Any, Any]:
        """Ends a step: moves the scale, and returns whether to apply the gradients and what to divide them by."""
        verdict = judge.verdict(evidence, ops.ones((), "float32"))
        was_bad = self.read("pending_bad") > 0
        finite = ops.logical_and(verdict.finite, ops.logical_not(was_bad))
        here = ops.cast(_named(verdict, indices), "int64")
        culprit = ops.where(was_bad, ops.cast(self.read("pending_culprit"), "int64"), here)
        self.advance(Outcome(finite, culprit, self._norm(verdict.norm), self._amax(verdict.amax)))
        self._note_culprit(finite, culprit)
        self.assign(_PENDING)
        if self._mirror is not None:
            self._mirror.assign(self.read("dynamic_scale"))
        return finite if self.rule.skip_nonfinite else ops.ones_like(finite), verdict.divisor

    def _norm(self, norm: Any) -> Any:
        # Before clipping, where that is known: of several towers or accumulated batches the root of the mean square.
        count = self.read("pending_count")
        mean = self.read("pending_squares") / ops.cast(ops.maximum(count, 1), "float32")
        return ops.where(count > 0, ops.sqrt(mean), norm)

    def _amax(self, amax: Any) -> Any:
        if amax is None:
            return None
        return ops.where(self.read("pending_count") > 0, self.read("pending_amax"), amax)

    def _note_culprit(self, finite: Any, culprit: Any) -> None:
        last, steps = self.read("last_culprit"), self.read("last_culprit_steps")
        culprit = ops.cast(culprit, last.dtype)
        again = ops.where(ops.equal(culprit, last), steps + 1, ops.ones_like(steps))
        self.assign({"last_culprit": culprit, "last_culprit_steps": ops.where(finite, ops.zeros_like(steps), again)})

    def _tensor_of(self, name: str) -> Any:
        return self.variables[name].value


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
        self._states: weakref.WeakKeyDictionary[Any, tuple[GraphState, Any]] = weakref.WeakKeyDictionary()

    def here(self) -> GraphState:
        """Returns the state in the present graph, and makes it if need be."""
        with tf.init_scope():
            if tf.executing_eagerly():
                self.eager = self.eager or GraphState(self.rule, self._mirror_in(None))
                return self.eager
            graph = V1.get_default_graph()
            if graph not in self._states:
                self._states[graph] = self._made_in(graph)
            return self._states[graph][0]

    def scale(self) -> Any:
        """Returns the scale of the present step; at the top of a graph it is a tensor named `tfmixed/loss_scale`."""
        state, graph = self.here(), V1.get_default_graph()
        at_top = not tf.executing_eagerly() and graph in self._states and not _in_control_flow(graph)
        return self._states[graph][1] if at_top else state.read("dynamic_scale")

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


def as_one(function: Callable[..., Any], *tensors: Any) -> Any:
    """Returns what `function` returns. In a graph its reads and writes run in the order in which they stand there."""
    if tf.executing_eagerly():
        return function(*tensors)
    return tf.function(function, autograph=False)(*tensors)


@contextlib.contextmanager
def variables_outside(scope: str) -> Iterator[None]:
    """Lets variables that are made within a branch have the names that they would have without it.

    TensorFlow 1's conditionals put their own scope before them; a float32 checkpoint would not fit any more.

    Args:
        scope: The name scope around the branch.
    """
    with V1.name_scope("apply"):
        inner = tf.get_current_name_scope()

        def make(next_creator: Callable[..., Any], **arguments: Any) -> Any:
            present = tf.get_current_name_scope()
            wanted = (scope + present[len(inner) :]).lstrip("/") if (present + "/").startswith(inner + "/") else present
            with tf.init_scope(), V1.name_scope(wanted + "/" if wanted else None):
                return next_creator(**arguments)

        with contextlib.ExitStack() as scopes:
            here = V1.get_default_graph()
            scopes.enter_context(V1.variable_creator_scope(make))
            with tf.init_scope():  # slots are made there, whatever the branch is
                if V1.get_default_graph() is not here:
                    scopes.enter_context(V1.variable_creator_scope(make))
            yield


def _named(verdict: Any, indices: Sequence[int]) -> Any:
    places = ops.convert_to_tensor(numpy.array([*indices, NO_VARIABLE], "int64"))
    return ops.take(places, ops.where(verdict.finite, len(indices), ops.cast(ops.argmax(verdict.bad), "int32")))


def _in_control_flow(graph: Any) -> bool:
    return graph._get_control_flow_context() is not None


def _add_variable(shape: Any, initializer: Any, dtype: str, name: str) -> keras.Variable:
    return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=False, name=name)
