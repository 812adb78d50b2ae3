"""What one optimizer does in an iteration of a training loop, in variables: marks of when, and what was not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy
from keras import ops

from tfmixed._core import gradients
from tfmixed._core.event_buffer import NO_VARIABLE
from tfmixed._core.finite_check import Verdict
from tfmixed._core.scaler_state import Outcome
from tfmixed._core.seen import Seen
from tfmixed._core.variables import AddVariable, Variables

Stage = Literal["ready", "unscaled", "stepped", "left"]

_COUNT = numpy.int32(0)
# What any scaler has unscaled: it must not be divided by a scale again.
_UNSCALED = Seen()


class Turn(Variables):
    """What one optimizer does in an iteration.

    Args:
        add_variable: As in `Variables`.
    """

    def __init__(self, add_variable: AddVariable) -> None:
        # `verdict`: whether the gradients that were unscaled are finite, and the place of the first that is not.
        super().__init__({"unscaled": _COUNT, "stepped": _COUNT, "verdict": numpy.zeros(2, "float32")}, add_variable)
        self._add_variable = add_variable
        self.trained: list[Any] = []  # the variables that it was given, in order of appearance
        self._numbers: list[int] = []  # their places among those of all optimizers
        self._counts: dict[str, int] = {}  # variables that count overflows, and of how many of `trained` each
        self._scaled, self._unscaled = Seen(), Seen()  # what unscale was given, and what it returned
        self.is_blind = False  # unscale could not know the variables

    def watch(self, variables: Sequence[Any], paths: list[str]) -> list[int]:
        """Returns the indices of `variables` among all that it was given; new ones join `paths`, those of all."""
        places = {id(variable): index for index, variable in enumerate(self.trained)}
        new = [variable for variable in variables if id(variable) not in places]
        for variable in new:
            places[id(variable)] = len(self.trained)
            self.trained.append(variable)
            self._numbers.append(len(paths))
            paths.append(gradients.path(variable))
        if new:  # variables of their own: functions that are compiled already go on counting in the others
            name = f"overflows_{len(self._counts)}"
            self._counts[name] = len(new)
            self.make({name: numpy.zeros(len(new), "int32")}, self._add_variable)
        return [places[id(variable)] for variable in variables]

    def check_raw(self, variables: Sequence[Any]) -> None:
        """Raises if unscale has divided what is no gradient, since it could not know.

        Raises:
            RuntimeError: It says what to do.
        """
        own = [gradients.path(variable) for variable in variables if gradients.holds_gradient(variable)]
        if self.is_blind and own:
            raise RuntimeError(
                f"unscale must not divide what overwrites {', '.join(own)}, and cannot tell it of an optimizer that is "
                "not built with the variables of its gradients: call `optimizer.build(variables)` before, and give "
                "unscale a gradient or None for each"
            )

    def stage(self, mark: int) -> Stage:
        """Returns how far it is in the iteration of that mark. Reads the device."""
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

    def keep(self, verdict: Verdict, mark: Any) -> Outcome:
        """Keeps what unscaled gradients say before anybody changes them, and returns what all need to know."""
        said = ops.stack([ops.cast(number, "float32") for number in (verdict.finite, verdict.culprit)])
        self.assign({"verdict": said, "unscaled": mark})
        return Outcome(verdict.finite, NO_VARIABLE, verdict.norm, _amax(verdict))

    def hand_out(self, scaled: Sequence[Any], unscaled: Sequence[Any]) -> None:
        """Remembers what unscale was given, and what it returns instead."""
        pairs = [(one, other) for one, other in zip(scaled, unscaled, strict=True) if one is not other]
        self._scaled, self._unscaled = (Seen(each) for each in zip(*pairs, strict=True)) if pairs else (Seen(), Seen())
        _UNSCALED.add(other for _, other in pairs)

    def has_scaled(self, grads: Sequence[Any]) -> bool:
        """Returns whether one of these is, itself, what was given to unscale, and so is still scaled."""
        return any(each in self._scaled for each in grads)

    def has_foreign(self, grads: Sequence[Any], own: bool) -> bool:
        """Returns whether one of these was returned by unscale, of this optimizer where it may not be its `own`."""
        return any(each in _UNSCALED and not (own and each in self._unscaled) for each in grads)

    def complete(self, verdict: Verdict, was_unscaled: Any, present: Sequence[int]) -> Verdict:
        """Returns `verdict` with what was kept of the same gradients; their norm and size count already.

        Args:
            verdict: On the gradients as they are now.
            was_unscaled: Boolean scalar: was anything kept?
            present: The indices of the variables that have a gradient.
        """
        finite, place = ops.unstack(self.read("verdict"), 2)
        overflowed = ops.logical_and(was_unscaled, ops.equal(finite, 0.0))
        place = ops.clip(ops.cast(place, "int32"), 0, len(present) - 1)
        guilty = ops.take(ops.convert_to_tensor(present, "int32"), place)
        only = ops.equal(ops.arange(len(self.trained), dtype="int32"), guilty)
        return verdict._replace(
            finite=ops.logical_and(verdict.finite, ops.logical_not(overflowed)),
            bad=ops.where(overflowed, only, verdict.bad),
            norm=ops.where(was_unscaled, 0.0, verdict.norm),
            amax=ops.where(was_unscaled, 0.0, _amax(verdict)),
        )

    def step(self, verdict: Verdict, mark: Any, is_row: Any) -> Outcome:
        """Counts the overflows, anew unless in a row of skipped steps, and returns what all need to know."""
        start = 0
        for name, size in self._counts.items():
            counts = self.read(name)
            bad = ops.cast(verdict.bad[start : start + size], counts.dtype)
            self.assign({name: ops.where(is_row, counts, ops.zeros_like(counts)) + bad})
            start += size
        self.assign({"stepped": mark})
        numbers = ops.convert_to_tensor(self._numbers, "int32")
        number = ops.take(numbers, ops.maximum(verdict.culprit, 0))
        return Outcome(verdict.finite, ops.where(verdict.finite, NO_VARIABLE, number), verdict.norm, _amax(verdict))

    def overflows(self, since: int) -> dict[str, int]:
        """Returns how often which gradient was not finite, if it stepped since a mark. Reads the device."""
        if int(self.read("stepped")) < since:
            return {}
        counts = [count for name in self._counts for count in ops.convert_to_numpy(self.read(name)).tolist()]
        return dict(zip(map(gradients.path, self.trained), counts, strict=True))


def _amax(verdict: Verdict) -> Any:
    return 0.0 if verdict.amax is None else verdict.amax
