"""What a training loop has called of its optimizer: it says whether the gradients that it applies are unscaled yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import keras

from tfmixed import outside
from tfmixed.branching import graph
from tfmixed.seen import Seen

Call = Literal["scale_loss", "get_scaled_loss", "get_unscaled_gradients", "loss_scale"]

_ADVICE = {
    "still scaled": "get_scaled_loss was called and get_unscaled_gradients was not: apply divides the gradients by the "
    "scale itself, as in Keras 3. Pass them through get_unscaled_gradients first, as in Keras 2, or call scale_loss "
    "instead of get_scaled_loss.",
    "too small": "get_unscaled_gradients was called for a loss that was never scaled: the gradients come out too small "
    "by the scale. Differentiate get_scaled_loss(loss).",
    "never scaled": "apply was given gradients of a loss that was never scaled: it divides them by the scale for "
    "nothing. Differentiate scale_loss(loss).",
    "scaled twice": "a loss was scaled that is scaled already: the gradients come out too large by the scale. Call one "
    "of scale_loss and get_scaled_loss, once.",
    "unscaled twice": "get_unscaled_gradients was given gradients that it had returned: they come out too small by the "
    "scale. Call it once.",
    "unknown": "apply cannot tell whether its gradients are scaled: this optimizer has served scale_loss and "
    "get_unscaled_gradients, and which of them made these was not seen in Python. It takes them for {}. Compile the "
    "call and apply in one function, or keep to one of the two.",
}


class Calls:
    """Notes the calls of one optimizer, and warns, once each, where they do not fit together.

    Calls make a round: it ends with the first call after an `apply`, or with an `apply` of a variable that was applied
    in it already. Of a compiled function Python sees the first step alone, so what such a function called and did not
    apply itself may be called in any later round too, unseen. What `get_unscaled_gradients` was given and returned is
    known by identity besides, which tells more than any call.

    Args:
        scales: False for a scale that is always 1: there nothing can go wrong.
    """

    refuse: Callable[[str], None] | None = None
    """What is called with the advice instead of a warning: for an optimizer that its script does not know of."""

    def __init__(self, scales: bool) -> None:
        self._scales = scales
        self._round: dict[Call, Any] = {}  # and in which graph, None where Python sees each of them
        self._read: dict[Call, Any] = {}  # the scale, since the last call
        self._applied: set[int] = set()
        self._apart: set[Call] = set()  # in compiled functions that do not apply
        self._scaled, self._unscaled, self._losses = Seen(), Seen(), Seen()
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, (self._scales,)

    @property
    def expects_scaled(self) -> bool:
        """Whether the step that comes has scaled its loss, as far as Python sees, or need not."""
        pending = self._has_scaled() and not self._applied
        return not self._scales or pending or bool(self._read) or bool(self._apart - {"get_unscaled_gradients"})

    def loss_scale(self) -> None:
        """Notes that somebody reads the scale, maybe to scale by hand."""
        self._read = {"loss_scale": _place()}

    def scale(self, call: Literal["scale_loss", "get_scaled_loss"], losses: Iterable[Any]) -> None:
        """Notes Keras 3's call, after which `apply` unscales, or Keras 2's, after which somebody else does."""
        if any(each in self._losses for each in losses):
            self._say("scaled twice")
        self._note(call)
        if call == "scale_loss":
            self._round.pop("get_unscaled_gradients", None)

    def scaled(self, losses: Iterable[Any]) -> None:
        """Notes what a loss became."""
        self._losses.add(losses)

    def get_unscaled_gradients(self, grads: Iterable[Any]) -> None:
        """Notes Keras 2's other call: `apply` finds the gradients unscaled."""
        grads = list(grads)
        if any(each in self._unscaled for each in grads):
            self._say("unscaled twice")
        self._note("get_unscaled_gradients")
        if not self._has_scaled():
            self._say("too small")
        self._scaled.add(grads)

    def unscaled(self, grads: Iterable[Any]) -> None:
        """Notes what gradients became."""
        self._unscaled.add(grads)

    def apply(self, grads: Iterable[Any], indices: Iterable[int]) -> bool:
        """Returns whether the gradients that are applied, to these of the variables, are unscaled already."""
        if not self._applied.isdisjoint(indices):
            self._begin()
        self._take_in_what_was_read()
        self._applied.update(indices)
        here = _place()
        is_unscaled = self._is_unscaled(list(grads), here)
        self._apart |= {call for call, place in self._round.items() if place is not None and place != here}
        return is_unscaled

    def _is_unscaled(self, grads: list[Any], here: Any) -> bool:
        if any(each in self._unscaled for each in grads):
            return True
        is_known = any(each in self._scaled for each in grads)
        if not is_known and "get_unscaled_gradients" in self._round:
            return True
        is_known |= here is not None and self._round.get("scale_loss") == here
        if not is_known and "get_unscaled_gradients" in self._apart:
            is_unscaled = "scale_loss" not in self._round
            if "scale_loss" in self._apart or not is_unscaled:
                self._say("unknown", "unscaled" if is_unscaled else "scaled")
            return is_unscaled
        if not self._has_scaled():
            self._say("never scaled")
        elif not is_known and self._round.keys() | self._apart == {"get_scaled_loss"}:
            self._say("still scaled")
        return False

    def _has_scaled(self) -> bool:
        return bool((self._round.keys() | self._apart) - {"get_unscaled_gradients"})

    def _note(self, call: Call) -> None:
        if self._applied:
            self._begin()
        self._take_in_what_was_read()
        self._round[call] = _place()

    def _take_in_what_was_read(self) -> None:
        self._round |= self._read
        self._read = {}

    def _begin(self) -> None:
        self._round, self._applied = {}, set()

    def _say(self, what: str, *details: str) -> None:
        if not self._scales or what in self._said:
            return
        self._said.add(what)
        advice = _ADVICE[what].format(*details)
        if self.refuse is not None:
            self.refuse(advice)
        else:
            outside.warn(advice)


def _place() -> Any:
    """Returns what tells the graph that is being made from others; None where all runs at once."""
    if keras.backend.backend() == "jax":
        return object()  # what it compiles cannot be told from outside
    here = graph()
    return None if here is None else weakref.ref(here)
