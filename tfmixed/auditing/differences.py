"""Where a step in half precision parts from the same step in float32, and what to say about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import keras

from tfmixed.auditing.hazards import Found, Hazard
from tfmixed.auditing.tracing import loss_scale


class Values(NamedTuple):
    """What is known of the values of one tensor.

    Args:
        bad: How many are infinite or NaN.
        zeros: How many are 0.
        largest: The largest magnitude of the finite ones.
        mean: Their mean magnitude.
        size: How many there are.
    """

    bad: int
    zeros: int
    largest: float
    mean: float
    size: int


@dataclass(frozen=True)
class Difference:
    """One tensor that came out otherwise in half precision though all that it was computed from had not.

    Args:
        layer: In whose call it was computed.
        op: The type of its `tf.Operation`; for the gradient of a variable, that one's path.
        dtype: The half-precision format.
        half: Its values in half precision.
        full: Those in float32.
        backward: Is it a gradient?
    """

    layer: keras.Operation | None
    op: str
    dtype: str
    half: Values
    full: Values
    backward: bool = False

    @property
    def overflowed(self) -> int:
        """Values that are infinite or NaN, and finite in float32."""
        return max(0, self.half.bad - self.full.bad)

    @property
    def vanished(self) -> float:
        """The share of values other than 0 that became 0."""
        nonzero = self.full.size - self.full.zeros
        return max(0, self.half.zeros - self.full.zeros) / nonzero if nonzero else 0.0

    @property
    def deviation(self) -> float:
        """How far the mean magnitude is off, relative to float32's."""
        return abs(self.half.mean / self.full.mean - 1) if self.full.mean else 0.0

    @property
    def parted(self) -> bool:
        """Whether it is wrong, and not merely rounded."""
        return self.overflowed > 0 or self.vanished > 0.05 or self.deviation > 0.02


def found_in(differences: Sequence[Difference], model: keras.Model) -> Iterator[Found]:
    """Yields what differences mean: the values that came out otherwise, and gradients of variables as two groups."""
    for each in differences:
        if not each.backward:
            yield None, each.layer, _of_values(each)
    gradients = [each for each in differences if each.backward]
    for name, group in (
        ("overflow", [each for each in gradients if each.overflowed]),
        ("underflow", [each for each in gradients if not each.overflowed]),
    ):
        if group:
            yield None, None, _of_gradients(name, group, model)


def _of_values(each: Difference) -> Hazard:
    full, size = each.full, each.half.size
    op = f"a cast to {each.dtype}" if each.op == "Cast" else each.op
    if each.overflowed:
        risk = f"{each.overflowed:,} of {size:,} values overflowed: in float32 they reach {full.largest:.3g} ({op})"
        return Hazard("overflow", each.dtype, "severe", risk)
    if each.vanished > 0.05:
        risk = f"{each.vanished:.0%} of the values became 0: in float32 their mean is {full.mean:.2g} ({op})"
        return Hazard("underflow", each.dtype, "severe" if each.vanished > 0.5 else "warning", risk)
    risk = f"off by {each.deviation:.0%}: the mean is {each.half.mean:.3g}, in float32 {full.mean:.3g} ({op})"
    return Hazard("wrong values", each.dtype, "severe" if each.deviation > 0.1 else "warning", risk)


def _of_gradients(name: str, group: list[Difference], model: keras.Model) -> Hazard:
    scale = float(loss_scale(model))
    grave = max(group, key=lambda each: (each.overflowed / each.full.size, each.vanished))
    total, where = len(model.trainable_variables), f"at a loss scale of {scale:,.0f}, those of {grave.op} most of all"
    if name == "overflow":
        risk = f"gradients of {len(group)} of {total} variables overflow {where}"
        return Hazard(
            "gradient overflow", grave.dtype, "note", risk, "a smaller scale; a dynamic one finds it by itself"
        )
    risk = f"more than half of the gradients of {len(group)} of {total} variables become 0 {where}"
    return Hazard("gradient underflow", grave.dtype, "warning", risk, "a larger loss scale")
