"""Tracks which optimizers have unscaled and stepped in an iteration of a custom loop, and whether they overflowed.

The state is in variables, so that each part of an iteration can run eagerly or in its own compiled function. A mark,
such as `unscaled`, is the number of the iteration in which it was set, counted from 1, and is never cleared. An
optimizer that was unscaled after its last step, in an earlier iteration, is "left".
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import numpy

from tfmixed._core import gradients
from tfmixed._core import scalar_ops as ops
from tfmixed._core.control_flow import current_graph
from tfmixed._core.event_buffer import NO_VARIABLE
from tfmixed._core.finite_check import CheckResult
from tfmixed._core.scaler_state import one_depending_on
from tfmixed._core.scaling_calls import TensorSet
from tfmixed._core.variables import AddVariable, Variables

Stage = Literal["ready", "unscaled", "stepped", "left"]
Method = Literal["unscale", "step"]

_COUNT, _NUMBER = numpy.int32(0), numpy.float32(0)
_ITERATION = {
    "updates": _COUNT,
    "begun": _COUNT,  # 1 once any gradients were checked
    "overflows": _COUNT,  # 1 once some of them were not finite
    "repeats": _COUNT,  # steps of optimizers that had stepped already
    "first_overflow": numpy.int32(NO_VARIABLE),
    "norm": _NUMBER,
    "amax": _NUMBER,
}
# Gradients that any scaler has unscaled, which must not be divided by a scale again.
_UNSCALED = TensorSet()


class OptimizerSteps(Variables):
    """Progress of one optimizer in an iteration.

    Args:
        add_variable: Function that creates a variable.
    """

    def __init__(self, add_variable: AddVariable) -> None:
        # `unscale_result`: whether the unscaled gradients are finite, and the place of the first that is not.
        start = {"unscaled": _COUNT, "stepped": _COUNT, "unscale_result": numpy.zeros(2, "float32")}
        super().__init__(start, add_variable)
        self._add_variable = add_variable
        self.trained: list[Any] = []  # variables that it was given, in order of appearance
        self._numbers: list[int] = []  # their indices among those of all optimizers
        self._counters: dict[str, int] = {}  # variables that count overflows, and of how many of `trained`
        self._scaled, self._unscaled = TensorSet(), TensorSet()  # gradients given to unscale, and returned by it
        self.has_unknown_variables = False  # in the last unscale

    def add(self, variables: Sequence[Any], paths: list[str]) -> list[int]:
        """Returns the indices of `variables` in `trained`. New ones are added, and their paths to those of all."""
        places = {id(variable): index for index, variable in enumerate(self.trained)}
        new = [variable for variable in variables if id(variable) not in places]
        for variable in new:
            places[id(variable)] = len(self.trained)
            self.trained.append(variable)
            self._numbers.append(len(paths))
            paths.append(gradients.path(variable))
        if new:  # in another variable, since functions that are compiled already count in the present ones
            name = f"overflows_{len(self._counters)}"
            self._counters[name] = len(new)
            self.create({name: numpy.zeros(len(new), "int32")}, self._add_variable)
        return [places[id(variable)] for variable in variables]

    def check_raw(self, variables: Sequence[Any]) -> None:
        """Checks that unscale has not divided what is not a gradient, such as the scales of float8 layers.

        Raises:
            RuntimeError: If unscale did not know that these variables hold their gradients.
        """
        raw = [gradients.path(variable) for variable in variables if gradients.holds_gradient(variable)]
        if self.has_unknown_variables and raw:
            raise RuntimeError(
                f"`unscale` cannot tell which gradients replace variables ({', '.join(raw)}). Build the optimizer "
                "first with `optimizer.build(variables)`, and pass a gradient or None for each variable."
            )

    def stage(self, mark: int) -> Stage:
        """Returns the stage of this optimizer in the iteration of that mark. Reads the device."""
        stepped, unscaled = int(self.read("stepped")), int(self.read("unscaled"))
        if stepped == mark:
            return "stepped"
        if unscaled == mark:
            return "unscaled"
        return "left" if unscaled > stepped else "ready"

    def has_stepped(self, mark: Any) -> Any:
        """Returns whether it has stepped in the iteration of that mark, a boolean scalar."""
        return ops.equal(self.read("stepped"), mark)

    def is_unscaled(self, mark: Any) -> Any:
        """Returns whether its gradients of this iteration are unscaled and not yet applied, a boolean scalar."""
        return ops.logical_and(ops.logical_not(self.has_stepped(mark)), ops.equal(self.read("unscaled"), mark))

    def remember(self, scaled: Sequence[Any], unscaled: Sequence[Any]) -> None:
        """Remembers the gradients given to unscale and those returned for them."""
        pairs = [pair for pair in zip(scaled, unscaled, strict=True) if pair[0] is not pair[1]]
        self._scaled, self._unscaled = (TensorSet(pair[index] for pair in pairs) for index in (0, 1))
        _UNSCALED.add(pair[1] for pair in pairs)

    def has_scaled(self, grads: Sequence[Any]) -> bool:
        """Returns whether one of these gradients was given to unscale, and so is still scaled."""
        return any(gradient in self._scaled for gradient in grads)

    def has_foreign(self, grads: Sequence[Any], allows_own: bool) -> bool:
        """Returns whether any scaler has unscaled one of these, except for this optimizer's own if allowed."""
        return any(gradient in _UNSCALED and not (allows_own and gradient in self._unscaled) for gradient in grads)

    def complete(self, result: CheckResult, was_unscaled: Any, present: Sequence[int]) -> CheckResult:
        """Returns the result of step's check together with that of unscale, whose norm and amax count already.

        Args:
            result: Result for the gradients as they are now.
            was_unscaled: Boolean scalar, True if unscale has checked them before.
            present: Indices of the variables that have a gradient.
        """
        finite, place = ops.unstack(self.read("unscale_result"), 2)
        overflowed = ops.logical_and(was_unscaled, ops.equal(finite, 0.0))
        place = ops.clip(ops.cast(place, "int32"), 0, len(present) - 1)
        index = ops.take(ops.convert_to_tensor(present, "int32"), place)
        is_first = ops.equal(ops.arange(len(self.trained), dtype="int32"), index)
        return CheckResult(
            finite=ops.logical_and(result.finite, ops.logical_not(overflowed)),
            squares=ops.where(overflowed, ops.where(is_first, math.inf, 0.0), result.squares),
            norm=ops.where(was_unscaled, 0.0, result.norm),
            amax=ops.where(was_unscaled, 0.0, _amax(result)),
        )

    def count(self, result: CheckResult, is_row: Any) -> Any:
        """Counts overflows, from 0 unless the last step was skipped, and returns the first variable's index."""
        start, overflowed = 0, result.overflowed
        for name, size in self._counters.items():
            counts = self.read(name)
            added = ops.cast(overflowed[start : start + size], counts.dtype)
            self.assign({name: ops.where(is_row, counts, ops.zeros_like(counts)) + added})
            start += size
        numbers = ops.convert_to_tensor(self._numbers, "int32")
        number = ops.take(numbers, ops.maximum(result.first_overflow, 0))
        return ops.where(result.finite, NO_VARIABLE, number)

    def overflow_counts(self, since: int) -> dict[str, int]:
        """Returns the number of overflows by path, if it has stepped since a mark. Reads the device."""
        if int(self.read("stepped")) < since:
            return {}
        counts = [count for name in self._counters for count in ops.convert_to_numpy(self.read(name)).tolist()]
        return dict(zip(map(gradients.path, self.trained), counts, strict=True))


class StepTracker(Variables):
    """State that all optimizers share in an iteration, and the checks of the order of calls.

    The order is known eagerly, from the device. While a graph is built it is known only if all calls so far were traced
    in that graph, since Python does not see when other compiled functions run.

    Args:
        add_variable: Function that creates a variable.
    """

    def __init__(self, add_variable: AddVariable) -> None:
        super().__init__(_ITERATION, add_variable)
        self._has_scaled = self._scales_in_graphs = False
        self._graph: weakref.ref[Any] | None = None  # the first graph
        self._is_one_graph = True
        self._stages: weakref.WeakKeyDictionary[OptimizerSteps, Stage] = weakref.WeakKeyDictionary()  # in that graph
        self._is_closed = False  # in that graph, the last call was update

    def _knows_order(self, graph: Any) -> bool:
        if self._graph is None:
            self._graph = weakref.ref(graph)
        self._is_one_graph &= self._graph() is graph
        return self._is_one_graph

    def stage(self, steps: OptimizerSteps) -> Stage | None:
        """Returns the stage of an optimizer, or None if it is not known."""
        graph = current_graph()
        if graph is not None:
            return self._stages.get(steps) if self._knows_order(graph) else None
        stage = steps.stage(int(self.mark()))
        return "ready" if stage == "left" and (self._has_scaled or self._scales_in_graphs) else stage

    def note_scale(self) -> None:
        """Notes that a loss is scaled, so that gradients given from now on may be new."""
        graph = current_graph()
        if graph is None:
            self._has_scaled = True
            return
        self._scales_in_graphs = True
        self._knows_order(graph)
        for steps in [steps for steps, stage in self._stages.items() if stage == "left"]:
            self._stages[steps] = "ready"

    def _note(self, steps: OptimizerSteps, stage: Stage) -> None:
        if current_graph() is not None:
            self._stages[steps], self._is_closed = stage, False

    def mark(self, finite: Any = True) -> Any:
        """Returns the mark of this iteration, computed from `finite`: see `one_depending_on`."""
        updates = self.read("updates")
        return updates + one_depending_on(finite, updates.dtype)

    def unscale(self, steps: OptimizerSteps, result: CheckResult) -> None:
        """Records the finite check of an optimizer's gradients when they are unscaled, before a clip changes them."""
        place = ops.stack([ops.cast(number, "float32") for number in (result.finite, result.first_overflow)])
        steps.assign({"unscale_result": place, "unscaled": self.mark(result.finite)})
        self._add(result, NO_VARIABLE)
        self._note(steps, "unscaled")

    def step(self, steps: OptimizerSteps, result: CheckResult, is_row: Any) -> None:
        """Records the finite check of an optimizer's gradients when it steps or skips; `is_row`: after a skip."""
        mark = self.mark(result.finite)
        repeats = steps.has_stepped(mark)
        first = steps.count(result, is_row)
        steps.assign({"stepped": mark})
        self._add(result, first, repeats)
        self._note(steps, "stepped")

    @ops.quiet
    def _add(self, result: CheckResult, first_overflow: Any, repeats: Any = False) -> None:
        """Adds the result of one optimizer. The norm of a second check of the same gradients is 0."""
        first, overflows = self.read("first_overflow"), self.read("overflows")
        dtype, number = overflows.dtype, ops.cast(first_overflow, first.dtype)
        values = {
            "begun": one_depending_on(result.finite, dtype),
            "overflows": ops.maximum(overflows, ops.cast(ops.logical_not(result.finite), dtype)),
            "repeats": self.read("repeats") + ops.cast(repeats, dtype),
            "first_overflow": ops.where(ops.equal(first, NO_VARIABLE), number, first),
            "norm": ops.hypot(self.read("norm"), result.norm),
            "amax": ops.maximum(self.read("amax"), _amax(result)),
        }
        self.assign(values)

    def result(self) -> CheckResult:
        """Returns the result of all gradients of this iteration together."""
        finite = ops.equal(self.read("overflows"), 0)
        return CheckResult(finite, None, self.read("norm"), self.read("amax"), self.read("first_overflow"))

    def close(self) -> None:
        """Begins the next iteration."""
        self.assign({**_ITERATION, "updates": self.mark()})
        graph = current_graph()
        if graph is None:
            self._has_scaled = False
        elif self._knows_order(graph):
            self._close_graph()

    def _close_graph(self) -> None:
        after: dict[Stage, Stage] = {"unscaled": "left", "stepped": "ready"}
        for steps, stage in list(self._stages.items()):
            self._stages[steps] = after.get(stage, stage)
        self._is_closed = True

    def check(self, steps: OptimizerSteps, grads: Sequence[Any], method: Method) -> None:
        """Raises a RuntimeError if a method, or one of its gradients, is known to be out of order."""
        stage = self.stage(steps)
        if method == "unscale" and stage in ("unscaled", "stepped"):
            raise _wrong_order(f"`unscale` was called for an optimizer that has {stage} already")
        if stage == "stepped":
            raise _wrong_order("`step` was called twice for one optimizer")
        if all(gradient is None for gradient in grads):
            raise _wrong_order(f"`{method}` needs at least one gradient, and received {len(grads)} times None")
        if stage == "unscaled" and steps.has_scaled(grads):
            raise _wrong_order("`step` received gradients that are still scaled, instead of what `unscale` returned")
        if method == "step" and stage == "left":
            raise _wrong_order("`step` received gradients of an earlier iteration: no loss has been scaled since")
        if steps.has_foreign(grads, allows_own=method == "step" and stage in ("unscaled", None)):
            raise _wrong_order(
                f"`{method}` received gradients that were unscaled for another optimizer, by another scaler or in "
                "another iteration"
            )

    def check_update(self) -> None:
        """Raises a RuntimeError if no optimizer has unscaled or stepped, or one is known to have stepped twice."""
        graph = current_graph()
        is_closed = int(self.read("begun")) == 0 if graph is None else self._knows_order(graph) and self._is_closed
        if is_closed:
            raise _wrong_order("`update` was called without `unscale` or `step` since the last `update`")
        if graph is None and int(self.read("repeats")) > 0:
            raise _wrong_order("`step` was called twice for one optimizer, in compiled functions")


def _amax(result: CheckResult) -> Any:
    return 0.0 if result.amax is None else result.amax


def _wrong_order(message: str) -> RuntimeError:
    return RuntimeError(
        f"{message}. In each iteration call `scale`, then for each optimizer `unscale` (optional) and `step`, then "
        "`update`."
    )
