"""One iteration of a training loop: which optimizers were unscaled and have stepped, and what their gradients said.

All of it is in variables, so that each part of an iteration may run eagerly or in a compiled function of its own. A
mark, such as "was unscaled", is the number of the iteration, counted from 1, in which it was made: nobody clears it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy
from keras import ops

from tfmixed import gradients
from tfmixed.branching import in_graph
from tfmixed.events import NO_VARIABLE
from tfmixed.gradients import Verdict
from tfmixed.state import Outcome, Variables

_COUNT, _NUMBER = numpy.int32(0), numpy.float32(0)
_START = {
    "updates": _COUNT,
    "steps": _COUNT,
    "skipped": _COUNT,
    "culprit": numpy.int32(NO_VARIABLE),
    "norm": _NUMBER,
    "amax": _NUMBER,
}
Stage = Literal["ready", "unscaled", "stepped"]
AddVariable = Callable[..., keras.Variable]


class Iteration(Variables):
    """What all optimizers share in an iteration.

    Args:
        add_variable: As in `Variables`.
    """

    def __init__(self, add_variable: AddVariable) -> None:
        super().__init__(_START, add_variable)
        self._stages: weakref.WeakKeyDictionary[Any, dict[Turn, tuple[Stage, int]]] = weakref.WeakKeyDictionary()

    def mark(self, finite: Any = True) -> Any:
        """Returns the mark of this iteration. Made of `finite`: what a dataset's end cuts off leaves no mark."""
        return self.read("updates") + self._one(finite)

    def add(self, step: Outcome) -> None:
        """Takes in what the step of one optimizer says."""
        first = self.read("culprit")
        skipped = ops.cast(ops.logical_not(step.finite), first.dtype)
        values = {
            "steps": self.read("steps") + self._one(step.finite),
            "skipped": self.read("skipped") + skipped,
            "culprit": ops.where(ops.equal(first, NO_VARIABLE), ops.cast(step.culprit, first.dtype), first),
            "norm": ops.hypot(self.read("norm"), step.norm),
            "amax": ops.maximum(self.read("amax"), step.amax),
        }
        self.assign(values)

    def outcome(self) -> Outcome:
        """Returns what all steps of this iteration say together."""
        finite = ops.equal(self.read("skipped"), 0)
        return Outcome(finite, self.read("culprit"), self.read("norm"), self.read("amax"))

    def close(self) -> None:
        """Begins the next iteration."""
        updates = self.read("updates")
        self.assign({**_START, "updates": updates + self._one(True)})
        if in_graph():
            self._stages.pop(_graph(), None)

    def stage(self, turn: Turn) -> Stage:
        """Returns how far an optimizer is, `"ready"` where that is not known.

        While a graph is made, nothing is known but what was made in it; and not even that once it calls a function,
        which may hold an update.
        """
        if not in_graph():
            return turn.stage(int(self.mark()))
        stage, seen = self._stages.get(_graph(), {}).get(turn, ("ready", 0))
        later = _graph().get_operations()[seen:] if stage != "ready" else []
        calls = any(attribute.HasField("func") for each in later for attribute in each.node_def.attr.values())
        return "ready" if calls else stage

    def check(self, turn: Turn, grads: Sequence[Any], method: Literal["unscale", "step"]) -> None:
        """Raises if it is known that a method is not to be called now, or not with these gradients.

        Raises:
            RuntimeError: It says what came out of order, and the order.
        """
        stage = self.stage(turn)
        if method == "unscale" and stage != "ready":
            raise _wrong_order(
                f"unscale must be called at most once and before step, received an optimizer {stage} already"
            )
        if stage == "stepped":
            raise _wrong_order("step must be called once for each optimizer, received one that has stepped already")
        if all(each is None for each in grads):
            raise _wrong_order(f"{method} must be given a gradient, received {len(grads)} times None")
        if stage == "unscaled" and turn.has_scaled(grads):
            raise _wrong_order("step must be given what unscale returned, received gradients that are still scaled")

    def check_stepped(self) -> None:
        """Raises if it is known that nothing has stepped.

        Raises:
            RuntimeError: It says the order.
        """
        if not in_graph() and int(self.read("steps")) == 0:
            raise _wrong_order("update must follow step, received no step since the last update")

    def remember(self, turn: Turn, stage: Stage) -> None:
        """Notes while a graph is made how far it brings an optimizer."""
        if in_graph():
            self._stages.setdefault(_graph(), {})[turn] = stage, len(_graph().get_operations())

    def _one(self, finite: Any) -> Any:
        return ops.cast(ops.logical_or(finite, ops.logical_not(finite)), self.variables["updates"].dtype)


class Turn(Variables):
    """What one optimizer does in an iteration.

    Args:
        optimizer: Kept, so that its id stays its own.
        add_variable: As in `Variables`.
    """

    def __init__(self, optimizer: Any, add_variable: AddVariable) -> None:
        start = {"unscaled": _COUNT, "stepped": _COUNT, "evidence": numpy.zeros(4, "float32")}
        super().__init__(start, add_variable)
        self.optimizer, self._add_variable = optimizer, add_variable
        self.trained: list[Any] = []  # the variables that it was given, in order of appearance
        self._numbers: list[int] = []  # their places among those of all optimizers
        self.scaled: list[Any] = []  # weak references to the gradients that were unscaled

    def watch(self, variables: Sequence[Any], paths: list[str]) -> list[int]:
        """Returns the indices of `variables` among all that it was given; new ones join `paths`, those of all."""
        places = {id(variable): index for index, variable in enumerate(self.trained)}
        for variable in variables:
            if id(variable) not in places:
                places[id(variable)] = len(self.trained)
                self.trained.append(variable)
                self._numbers.append(len(paths))
                paths.append(gradients.path(variable))
        if "overflows" not in self.variables or self.variables["overflows"].shape[0] < len(self.trained):
            self.make({"overflows": numpy.zeros(len(self.trained), "int32")}, self._add_variable)
        return [places[id(variable)] for variable in variables]

    def stage(self, mark: int) -> Stage:
        """Returns how far it is in the iteration of that mark. Reads the device."""
        if int(self.read("stepped")) == mark:
            return "stepped"
        return "unscaled" if int(self.read("unscaled")) == mark else "ready"

    def has_scaled(self, grads: Sequence[Any]) -> bool:
        """Returns whether one of these gradients is, itself, one that was unscaled, and so is still scaled."""
        scaled = {id(reference()) for reference in self.scaled} - {id(None)}
        return any(id(each) in scaled for each in grads)

    def is_unscaled(self, mark: Any) -> Any:
        """Returns whether its gradients of this iteration are unscaled and not yet applied, a boolean scalar."""
        is_new = ops.not_equal(self.read("stepped"), mark)
        return ops.logical_and(is_new, ops.equal(self.read("unscaled"), mark))

    def keep(self, verdict: Verdict, mark: Any) -> None:
        """Keeps what unscaled gradients say before anybody changes them."""
        numbers = (verdict.finite, verdict.culprit, verdict.norm, 0.0 if verdict.amax is None else verdict.amax)
        evidence = ops.stack([ops.cast(number, "float32") for number in numbers])
        self.assign({"evidence": evidence, "unscaled": mark})

    def complete(self, verdict: Verdict, unscaled: Any, present: Sequence[int]) -> Verdict:
        """Returns `verdict` with what was kept of the same gradients.

        Args:
            verdict: On the gradients as they are now.
            unscaled: Boolean scalar: was anything kept?
            present: The indices of the variables that have a gradient.
        """
        finite, place, norm, amax = ops.unstack(self.read("evidence"), 4)
        overflowed = ops.logical_and(unscaled, ops.equal(finite, 0.0))
        place = ops.clip(ops.cast(place, "int32"), 0, len(present) - 1)
        guilty = ops.take(ops.convert_to_tensor(present, "int32"), place)
        only = ops.equal(ops.arange(len(self.trained), dtype="int32"), guilty)
        return verdict._replace(
            finite=ops.logical_and(verdict.finite, ops.logical_not(overflowed)),
            bad=ops.where(overflowed, only, verdict.bad),
            norm=ops.where(unscaled, norm, verdict.norm),
            amax=ops.where(unscaled, amax, 0.0 if verdict.amax is None else verdict.amax),
        )

    def step(self, verdict: Verdict, mark: Any, is_row: Any) -> Outcome:
        """Counts the overflows, anew unless in a row of skipped steps, and returns what all need to know."""
        counts = self.read("overflows")
        counts = ops.where(is_row, counts, ops.zeros_like(counts)) + ops.cast(verdict.bad, counts.dtype)
        self.assign({"overflows": counts, "stepped": mark})
        numbers = ops.convert_to_tensor(self._numbers, "int32")
        number = ops.take(numbers, ops.maximum(verdict.culprit, 0))
        culprit = ops.where(verdict.finite, NO_VARIABLE, number)
        return Outcome(verdict.finite, culprit, verdict.norm, verdict.amax)

    def overflows(self, since: int) -> dict[str, int]:
        """Returns how often which gradient was not finite, if it stepped since a mark. Reads the device."""
        if int(self.read("stepped")) < since:
            return {}
        counts = ops.convert_to_numpy(self.read("overflows")).tolist()
        return dict(zip(map(gradients.path, self.trained), counts, strict=True))


def _wrong_order(message: str) -> RuntimeError:
    return RuntimeError(
        f"{message}. In each iteration the order is: scale, then for each optimizer unscale (if at all) and step, then "
        "update"
    )


def _graph() -> Any:
    import tensorflow

    return tensorflow.compat.v1.get_default_graph()
