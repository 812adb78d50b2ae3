"""What a training loop has called of its optimizer: it says whether the gradients that it applies are unscaled yet."""

from __future__ import annotations

import warnings

_ADVICE = {
    "still scaled": "get_scaled_loss was called and get_unscaled_gradients was not: apply divides the gradients by the "
    "scale itself, as in Keras 3. Pass them through get_unscaled_gradients first, as in Keras 2, or call scale_loss "
    "instead of get_scaled_loss.",
    "too small": "get_unscaled_gradients was called for a loss that was never scaled: the gradients come out too small "
    "by the scale. Differentiate get_scaled_loss(loss).",
    "never scaled": "apply was given gradients of a loss that was never scaled: it divides them by the scale for "
    "nothing. Differentiate scale_loss(loss).",
    "unknown": "apply cannot tell whether its gradients are scaled: this optimizer has served scale_loss and "
    "get_unscaled_gradients, and neither was called in Python since the last apply. It takes them for {}. Compile the "
    "call and apply in one function, or keep to one of the two.",
}


class Calls:
    """Notes the calls of one optimizer, and warns, once each, where they do not fit together.

    What a call says holds until another says otherwise, beyond the next `apply`: of a loop that is compiled, in parts
    or as a whole, Python sees the first step alone.

    Args:
        scales: False for a scale that is always 1: there nothing can go wrong.
    """

    def __init__(self, scales: bool) -> None:
        self._scales = scales
        self._seen: set[str] = set()
        self._said: set[str] = set()
        self._unscaled = self._fresh = False

    def scale_loss(self) -> None:
        """Notes Keras 3's call: `apply` unscales."""
        self._note("scale_loss", unscaled=False)

    def get_scaled_loss(self) -> None:
        """Notes Keras 2's call. Who unscales, `get_unscaled_gradients` says."""
        self._seen.add("get_scaled_loss")

    def get_unscaled_gradients(self) -> None:
        """Notes Keras 2's other call: `apply` finds the gradients unscaled."""
        if not self._seen & {"scale_loss", "get_scaled_loss"}:
            self._say("too small")
        self._note("get_unscaled_gradients", unscaled=True)

    def apply(self) -> bool:
        """Returns whether the gradients that are applied are unscaled already."""
        if not self._seen:
            self._say("never scaled")
        elif self._seen == {"get_scaled_loss"}:
            self._say("still scaled")
        elif not self._fresh and self._seen >= {"scale_loss", "get_unscaled_gradients"}:
            self._say("unknown", "unscaled" if self._unscaled else "scaled")
        self._fresh = False
        return self._unscaled

    def _note(self, call: str, unscaled: bool) -> None:
        self._seen.add(call)
        self._unscaled, self._fresh = unscaled, True

    def _say(self, what: str, *details: str) -> None:
        if self._scales and what not in self._said:
            self._said.add(what)
            warnings.warn(_ADVICE[what].format(*details), stacklevel=4)
