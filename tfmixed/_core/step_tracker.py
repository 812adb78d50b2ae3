"""One iteration of a training loop: which optimizers were unscaled and have stepped, and what their gradients said.

All of it is in variables, so that each part of an iteration may run eagerly or in a compiled function of its own. A
mark, such as "was unscaled", is the number of the iteration, counted from 1, in which it was made: nobody clears it.
An optimizer whose last mark says "unscaled", and is of an earlier iteration, was left halfway.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
from keras import ops

from tfmixed._core.control_flow import graph, in_graph
from tfmixed._core.event_buffer import NO_VARIABLE
from tfmixed._core.finite_check import Verdict
from tfmixed._core.scaler_state import Outcome
from tfmixed._core.turn import Stage, Turn
from tfmixed._core.variables import AddVariable, Variables

_COUNT, _NUMBER = numpy.int32(0), numpy.float32(0)
_START = {
    "updates": _COUNT,
    "begun": _COUNT,  # 1 once any gradients were judged
    "overflows": _COUNT,  # 1 once some of them were not finite
    "repeats": _COUNT,  # steps of optimizers that had stepped already
    "culprit": numpy.int32(NO_VARIABLE),
    "norm": _NUMBER,
    "amax": _NUMBER,
}
Method = Literal["unscale", "step"]


@dataclass
class Notes:
    """What was called while one graph is made, so far.

    Args:
        stages: How far each optimizer is; of others nothing is known.
        is_closed: The last call was `update`.
        operations: How many the graph had then.
    """

    stages: dict[Turn, Stage] = field(default_factory=dict)
    is_closed: bool = False
    operations: int = 0


class Iteration(Variables):
    """What all optimizers share in an iteration.

    Args:
        add_variable: As in `Variables`.
    """

    def __init__(self, add_variable: AddVariable) -> None:
        super().__init__(_START, add_variable)
        self._notes: weakref.WeakKeyDictionary[Any, Notes] = weakref.WeakKeyDictionary()
        self._has_scaled = self._scales_in_graphs = False

    def mark(self, finite: Any = True) -> Any:
        """Returns the mark of this iteration. Made of `finite`: what a dataset's end cuts off leaves no mark."""
        return self.read("updates") + self._one_made_of(finite)

    def unscale(self, turn: Turn, verdict: Verdict, known: Notes) -> None:
        """Takes in what an optimizer's gradients said when they were unscaled.

        Args:
            known: Before all that brings the optimizer there: that holds calls too.
        """
        self._add(turn.keep(verdict, self.mark(verdict.finite)))
        self._note(turn, "unscaled", known)

    def step(self, turn: Turn, verdict: Verdict, is_row: Any, known: Notes) -> None:
        """Takes in what an optimizer's gradients said when it stepped, or skipped.

        Args:
            is_row: Boolean scalar: was the last step skipped?
            known: As in `unscale`.
        """
        mark = self.mark(verdict.finite)
        repeats = turn.has_stepped(mark)
        self._add(turn.step(verdict, mark, is_row), repeats)
        self._note(turn, "stepped", known)

    def _add(self, said: Outcome, repeats: Any = False) -> None:
        """Takes in what the gradients of one optimizer say; what they say twice counts once.

        Args:
            said: Its norm only where it was not added before.
            repeats: Boolean scalar: had the optimizer stepped already?
        """
        first, bad = self.read("culprit"), self.read("overflows")
        values = {
            "begun": self._one_made_of(said.finite),
            "overflows": ops.maximum(bad, ops.cast(ops.logical_not(said.finite), bad.dtype)),
            "repeats": self.read("repeats") + ops.cast(repeats, bad.dtype),
            "culprit": ops.where(ops.equal(first, NO_VARIABLE), ops.cast(said.culprit, first.dtype), first),
            "norm": ops.hypot(self.read("norm"), said.norm),
            "amax": ops.maximum(self.read("amax"), said.amax),
        }
        self.assign(values)

    def outcome(self) -> Outcome:
        """Returns what all gradients of this iteration say together."""
        finite = ops.equal(self.read("overflows"), 0)
        return Outcome(finite, self.read("culprit"), self.read("norm"), self.read("amax"))

    def close(self, known: Notes) -> None:
        """Begins the next iteration.

        Args:
            known: Before all that ends this one.
        """
        updates = self.read("updates")
        self.assign({**_START, "updates": updates + self._one_made_of(True)})
        if not in_graph():
            self._has_scaled = False
            return
        after: dict[Stage, Stage] = {"unscaled": "left", "stepped": "ready"}
        stages = {turn: after.get(stage, stage) for turn, stage in known.stages.items()}
        self._write(stages, is_closed=True)

    def _note(self, turn: Turn, stage: Stage, known: Notes) -> None:
        """Notes while a graph is made how far it brings an optimizer."""
        if in_graph():
            self._write({**known.stages, turn: stage})

    def note_scale(self) -> None:
        """Notes that a loss is scaled: gradients that come from now on may be new."""
        if not in_graph():
            self._has_scaled = True
            return
        self._scales_in_graphs = True
        noted = self.known()
        stages: dict[Turn, Stage] = {turn: "ready" if at == "left" else at for turn, at in noted.stages.items()}
        self._write(stages, noted.is_closed)

    def _write(self, stages: dict[Turn, Stage], is_closed: bool = False) -> None:
        here = graph()
        self._notes[here] = Notes(stages, is_closed, len(here.get_operations()))

    def known(self) -> Notes:
        """Returns what is known while a graph is made: nothing once it calls a function, which may hold an update."""
        here = graph()
        if here is None:
            return Notes()
        notes = self._notes.get(here, Notes())
        later = here.get_operations()[notes.operations :] if notes.operations else []
        calls = any(attribute.HasField("func") for each in later for attribute in each.node_def.attr.values())
        return Notes() if calls else notes

    def stage(self, turn: Turn) -> Stage | None:
        """Returns how far an optimizer is; None where that is not known, because a graph is made."""
        if in_graph():
            return self.known().stages.get(turn)
        stage = turn.stage(int(self.mark()))
        return "ready" if stage == "left" and (self._has_scaled or self._scales_in_graphs) else stage

    def check(self, turn: Turn, grads: Sequence[Any], method: Method) -> None:
        """Raises if it is known that a method is not to be called now, or not with these gradients.

        Raises:
            RuntimeError: It says what came out of order, and the order.
        """
        stage = self.stage(turn)
        if method == "unscale" and stage in ("unscaled", "stepped"):
            raise _wrong_order(
                f"unscale must be called at most once and before step, received an optimizer {stage} already"
            )
        if stage == "stepped":
            raise _wrong_order("step must be called once for each optimizer, received one that has stepped already")
        if all(each is None for each in grads):
            raise _wrong_order(f"{method} must be given a gradient, received {len(grads)} times None")
        if stage == "unscaled" and turn.has_scaled(grads):
            raise _wrong_order("step must be given what unscale returned, received gradients that are still scaled")
        if method == "step" and stage == "left":
            raise _wrong_order(
                "step must be given gradients of this iteration, received an optimizer whose gradients were unscaled "
                "in an earlier one, and no loss was scaled since"
            )
        if turn.has_foreign(grads, own=method == "step" and stage in ("unscaled", None)):
            raise _wrong_order(
                f"{method} must not be given gradients that were unscaled for another optimizer, by another scaler or "
                "in another iteration, received such"
            )

    def check_update(self) -> None:
        """Raises if it is known that nothing was judged, or an optimizer has stepped twice.

        Raises:
            RuntimeError: It says the order.
        """
        if self.known().is_closed if in_graph() else int(self.read("begun")) == 0:
            raise _wrong_order("update must follow unscale or step, received neither since the last update")
        if not in_graph() and int(self.read("repeats")) > 0:
            raise _wrong_order("step must be called once for each optimizer, received two compiled calls of one")

    def _one_made_of(self, finite: Any) -> Any:
        return ops.cast(ops.logical_or(finite, ops.logical_not(finite)), self.variables["updates"].dtype)


def _wrong_order(message: str) -> RuntimeError:
    return RuntimeError(
        f"{message}. In each iteration the order is: scale, then for each optimizer unscale (if at all) and step, then "
        "update"
    )
