"""Exceptions of tfmixed."""

from __future__ import annotations

import math
from collections.abc import Mapping

_OVERFLOW = (
    "Try lowering the learning rate, clipping gradients (`clipnorm` of the inner optimizer), a `min_scale` below 1 in "
    "the rule, or float32 where it is needed: tfmixed.audit(model) names the layers, tfmixed.force_float32(model) "
    "fixes them."
)
_BAD_LOSS = (
    "no loss scale fixes that. Look for non-finite inputs, a log or a division near 0, weights that diverged "
    "under a high learning rate, or a forward pass that overflows float16: tfmixed.audit(model, inputs) names the "
    "layer."
)

ADVICE = f"{_OVERFLOW} If the loss itself is not finite: {_BAD_LOSS}"


def _worst(overflows: Mapping[str, int]) -> str:
    """Returns a sentence with the three variables whose gradients were not finite most often, or `""`."""
    paths = sorted(overflows, key=lambda path: -overflows[path])[:3]
    names = ", ".join(f"{path} ({overflows[path]} times)" for path in paths if overflows[path])
    return f" Most frequent overflows: {names}." if names else ""


class ConfigError(ValueError):
    """A configuration file or a `Config` is not valid. The message names the file and the key."""


class UsageError(ValueError):
    """A command cannot run as requested. The message says what to change, in one line."""


class LossScaleExhausted(FloatingPointError):  # noqa: N818  # a state of the run, like StopIteration
    """Every step overflows, and the loss scale cannot decrease further.

    Args:
        scale: The loss scale.
        since_step: The first of the consecutive skipped steps, counted from 0 in attempted steps.
        skips: Number of consecutive skipped steps.
        overflows: For each variable by path, the number of these steps in which its gradient was not finite.
        loss: The last loss, or None if it is unknown. In `fit`, the mean of the epoch. Defaults to None.
    """

    def __init__(
        self, scale: float, since_step: int, skips: int, overflows: Mapping[str, int], loss: float | None = None
    ) -> None:
        self.scale, self.since_step, self.skips = scale, since_step, skips
        self.overflows, self.loss = dict(overflows), loss
        super().__init__(
            f"All {skips} steps since step {since_step} had non-finite gradients and were skipped. The loss scale "
            f"is {scale:g} and cannot decrease further.{_worst(overflows)} {self._advice()}"
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.scale, self.since_step, self.skips, self.overflows, self.loss)

    def _advice(self) -> str:
        if self.loss is not None and not math.isfinite(self.loss):
            return f"The loss itself is {self.loss} (in `fit`: that of a batch of this epoch): {_BAD_LOSS}"
        return _OVERFLOW if self.loss is not None else ADVICE
