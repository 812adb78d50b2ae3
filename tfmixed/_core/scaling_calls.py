"""Explicit scaling calls of a training loop: they tell `apply` whether its gradients are still scaled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from tfmixed._core.control_flow import graph
from tfmixed._core.seen import Seen
from tfmixed._utils import user_warnings

# Gradients that `apply` gets: of a scaled loss, unscaled, or of a scaled loss that Keras 2's other call may unscale.
State = Literal["scaled", "unscaled", "loss scaled"]

_NEVER_SCALED = (
    "apply was given gradients of a loss that was never scaled: it divides them by the loss scale, as in Keras 3, and "
    "this loop called neither scale_loss nor get_scaled_loss of this optimizer. Differentiate scale_loss(loss)."
)
_TOO_SMALL = (
    "get_unscaled_gradients was called for a loss that was never scaled: it divides gradients by the loss scale, and "
    "this loop called neither scale_loss nor get_scaled_loss of this optimizer. Differentiate get_scaled_loss(loss)."
)
_UNKNOWN = (
    "apply cannot know whether its gradients are scaled: this optimizer served scale_loss and get_unscaled_gradients, "
    "at least one of them in another compiled function than apply. Compile that call and apply in one function, or use "
    "one of the two styles only."
)


class Calls:
    """Scaling calls of one optimizer, by the function that makes them.

    The last call that is made in the function of `apply`, compiled or eager, decides, if no function that leaves
    `apply` to another one says the opposite. Where that function makes no call, the others decide, and must agree.
    Reading a property is not a call.

    Args:
        scales: False for a scale that is always 1, with which every order of calls is right.
    """

    warn: Callable[[str], None] = staticmethod(user_warnings.warn)
    """Function that reports a loss that was never scaled. `tfmixed run` ends the script instead."""

    def __init__(self, scales: bool) -> None:
        self._scales = scales
        self._eager: State | None = None
        self._traced: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self._applying: weakref.WeakSet[Any] = weakref.WeakSet()  # traced functions that call apply
        self._relied: set[State] = set()  # what traced functions that only apply rely on
        self._is_scaled = False  # a loss was scaled once
        self._losses, self._given, self._returned = Seen(), Seen(), Seen()
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, (self._scales,)

    def scale(self, state: State, losses: Iterable[Any]) -> None:
        """Notes a call that scales `losses`.

        Raises:
            RuntimeError: If one of them is scaled already.
        """
        if self.has_scaled(losses):
            raise RuntimeError(
                "The loss is scaled already, and its gradients would be too large by the loss scale. Call one of "
                "scale_loss and get_scaled_loss, once."
            )
        self._is_scaled = True
        self._note(state)

    def scaled(self, losses: Iterable[Any]) -> None:
        """Notes scaled losses."""
        self._losses.add(losses)

    def has_scaled(self, losses: Iterable[Any]) -> bool:
        """Returns whether one of these is a loss that was scaled."""
        return self._scales and any(loss in self._losses for loss in losses)

    def unscale(self, grads: Iterable[Any]) -> None:
        """Notes a call that unscales `grads`.

        Raises:
            RuntimeError: If one of them is unscaled already.
        """
        grads = list(grads)
        if self._scales and any(gradient in self._returned for gradient in grads):
            raise RuntimeError("get_unscaled_gradients was given gradients that it had returned. Call it once.")
        if not self._is_scaled:
            self._warn(_TOO_SMALL)
        self._given.add(grads)
        self._note("unscaled")

    def unscaled(self, grads: Iterable[Any]) -> None:
        """Notes unscaled gradients."""
        self._returned.add(grads)

    @property
    def state(self) -> State | None:
        """State of gradients by the last call in the function that runs or is traced now; None without a call."""
        here = graph()
        return self._eager if here is None else self._traced.get(here)

    def end_fit(self) -> None:
        """Forgets the eager calls of `fit`: a loop of the user that follows makes its own."""
        self._eager = None

    def are_unscaled(self, grads: Sequence[Any]) -> bool:
        """Returns whether the gradients that are applied here are unscaled.

        Raises:
            RuntimeError: If that cannot be known.
        """
        here, own = graph(), self.state
        if here is not None:
            self._applying.add(here)
        if not self._scales:
            return False
        returned, given = (any(gradient in seen for gradient in grads) for seen in (self._returned, self._given))
        if returned and given:
            raise RuntimeError("apply was given gradients of which some are unscaled and some are not.")
        if returned or given:
            return returned
        states = {state for function, state in self._traced.items() if function not in self._applying}
        if (nearest := self._eager if own is None else own) is not None:
            states.add(nearest)
        if {"scaled", "unscaled"} <= states:
            raise RuntimeError(_UNKNOWN)
        if not states:
            self._warn(_NEVER_SCALED)
        elif here is not None and own is None:
            self._relied |= {"unscaled" if "unscaled" in states else "scaled"}
        return "unscaled" in states

    def _note(self, state: State) -> None:
        here = graph()
        if here is None:
            self._eager = state
        else:
            self._traced[here] = state
        if self._scales and {"scaled": "unscaled", "unscaled": "scaled"}.get(state) in self._relied:
            raise RuntimeError(_UNKNOWN)

    def _warn(self, message: str) -> None:
        if self._scales and message not in self._warned:
            self._warned.add(message)
            self.warn(message)
