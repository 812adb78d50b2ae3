"""The exceptions that tfmixed raises beyond Python's own."""

from __future__ import annotations

import math
from collections.abc import Mapping

_OVERFLOW = (
    "Try lowering the learning rate, clipping gradients (`clipnorm` on the inner optimizer), a `min_scale` below 1 in "
    "the rule, or float32 where it is needed: tfmixed.audit(model) names the layers, tfmixed.force_float32(model) "
    "mends them."
)
_BAD_LOSS = (
    "no loss scale mends that. Look for inputs that are not finite, a log or a division near 0, weights that diverged "
    "under a high learning rate, or a forward pass that leaves float16: tfmixed.audit(model, inputs) shows in which "
    "layer."
)

ADVICE = f"{_OVERFLOW} If the loss itself is not finite: {_BAD_LOSS}"


def _worst(overflows: Mapping[str, int]) -> str:
    """Returns the three variables whose gradients were not finite most often, as a sentence after another one."""
    paths = sorted(overflows, key=lambda path: -overflows[path])[:3]
    named = ", ".join(f"{path} ({overflows[path]} times)" for path in paths if overflows[path])
    return f" Not finite most often: {named}." if named else ""


class ConfigError(ValueError):
    """A configuration file cannot be used; the message names file, key and remedy."""


class UsageError(ValueError):
    """A command cannot do what it was asked to; the message says what to change, in one line."""


class LossScaleExhausted(FloatingPointError):  # noqa: N818  # a state of the run, like StopIteration
    """Step after step overflows, and the loss scale cannot fall any further.

    Args:
        scale: The loss scale.
        since_step: The first attempted step, counted from 0, of this row of skipped ones.
        skips: How many they are.
        overflows: For each variable by path, in how many of them its gradient was not finite.
        loss: The last loss, where the observer knows it; `fit` knows the mean of an epoch.
    """

    def __init__(
        self, scale: float, since_step: int, skips: int, overflows: Mapping[str, int], loss: float | None = None
    ) -> None:
        self.scale, self.since_step, self.skips = scale, since_step, skips
        self.overflows, self.loss = dict(overflows), loss
        super().__init__(f"{self._row()} {self._advice()}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.scale, self.since_step, self.skips, self.overflows, self.loss)

    def _row(self) -> str:
        return (
            f"All {self.skips} steps since step {self.since_step} had gradients that are not finite and were skipped; "
            f"the loss scale stands at {self.scale:g} and does not fall any further.{_worst(self.overflows)}"
        )

    def _advice(self) -> str:
        if self.loss is not None and not math.isfinite(self.loss):
            return f"The loss itself is {self.loss} (in `fit`: that of a batch of this epoch): {_BAD_LOSS}"
        return _OVERFLOW if self.loss is not None else ADVICE
