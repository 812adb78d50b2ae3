"""What happens in a run, as frozen records."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

# Raised when lines change so that an earlier version would misread them; a new field with a default does not.
FORMAT = 1

Reason = Literal["overflow", "growth", "set"]
Kind = Literal["activation", "weight"]


@dataclass(frozen=True)
class RunRecord:
    """The begin of a run, or of its continuation.

    Args:
        step: The attempted step that comes next, counted from 0.
        loss_scale: The scale of that step.
        started: Local time with its offset, ISO 8601.
        model: The model's name.
        policy: Name of the dtype policy.
        rule: Name and parameters of the scaling rule.
        optimizer: Name of the inner optimizer.
        devices: The devices of this machine, the one that decides first.
        versions: Of Python, tfmixed, Keras and its backend.
        format: Version of the format of the lines that follow; 1 where a line has none.
    """

    event: ClassVar[str] = "run"
    step: int
    loss_scale: float
    started: str
    model: str
    policy: str
    rule: dict[str, Any]
    optimizer: str
    devices: list[str]
    versions: dict[str, str]
    format: int = FORMAT

    def __str__(self) -> str:
        return f"step {self.step}: {self.model} under {self.policy}, loss scale {short(self.loss_scale)}"


@dataclass(frozen=True)
class ScaleChange:
    """One change of the loss scale.

    Args:
        step: The attempted step that changed it, counted from 0; skipped steps count.
        old_scale: The scale that this step's loss was multiplied by.
        new_scale: The scale of the next step.
        reason: `"overflow"`: a gradient of this step was not finite. `"growth"`: enough
            finite steps. `"set"`: chosen by hand, or lowered by the statistics of a rule.
        variable: Path of the first variable whose gradient was not finite, on an overflow.
        epoch: The epoch it was seen in, where the observer knows it.
    """

    event: ClassVar[str] = "scale_change"
    step: int
    old_scale: float
    new_scale: float
    reason: Reason
    variable: str | None = None
    epoch: int | None = None

    def __str__(self) -> str:
        guilty = f"  {self.variable}" if self.variable else ""
        change = f"{short(self.old_scale)} -> {short(self.new_scale)}"
        return f"step {self.step}: loss scale {change} ({self.reason}){guilty}"


@dataclass(frozen=True)
class EventsLost:
    """Scale changes that the ring on the device overwrote before anybody drained it.

    Args:
        count: How many.
        before_step: The step of the first change after the gap.
        epoch: The epoch in which the loss was noticed.
    """

    event: ClassVar[str] = "events_lost"
    count: int
    before_step: int
    epoch: int | None = None

    @property
    def step(self) -> int:
        """Where it stands among the other records."""
        return self.before_step

    def __str__(self) -> str:
        return f"{self.count} scale changes before step {self.before_step} were lost: raise `event_capacity`"


@dataclass(frozen=True)
class Progress:
    """Where a run stands at the end of an epoch.

    Args:
        step: The last attempted step, counted from 0.
        epoch: The epoch that ended.
        loss_scale: The scale of the next step.
        skipped_steps: How many steps were skipped so far.
        gradient_norm: Unscaled, global, of the last step. None where it was not finite.
        loss: The mean of the epoch as `fit` reports it. None where nobody knows it or it was not finite.
    """

    event: ClassVar[str] = "progress"
    step: int
    epoch: int | None
    loss_scale: float
    skipped_steps: int
    gradient_norm: float | None = None
    loss: float | None = None

    def __str__(self) -> str:
        return f"step {self.step}: {self.skipped_steps} steps skipped so far, loss scale {short(self.loss_scale)}"


@dataclass(frozen=True)
class GradientRange:
    """The magnitudes of one tensor's gradient, over some batches.

    Args:
        name: Path of the variable, or of the layer whose output it is.
        kind: `"weight"` or `"activation"`.
        layer: Path of the layer that it belongs to.
        dtype: What holds this gradient when the model trains: `"float16"`, `"bfloat16"`, `"float32"`, ...
        zeros: How many values are 0.
        nonfinite: How many are infinite or NaN.
        largest: The largest finite magnitude; 0 where there is none but 0.
        smallest: The smallest magnitude other than 0; 0 where there is none.
        octaves: For each exponent e how many magnitudes fall in [2^e, 2^(e+1)), in four parts: exactly 2^e; up to
            2^e (2 - 2^-10); from there up to 2^e (2 - 2^-11); the rest. These are the limits at which float16 rounds to
            its smallest number, to its smallest normal one, and to infinity, so that counts are exact for each power
            of two as a scale. Exponent -127 holds what is subnormal in float32.
        noise: Is it rounding noise, a sum that cancels to nearly 0 by theory? Then it decides nothing.
    """

    name: str
    kind: Kind
    layer: str
    dtype: str
    zeros: int
    nonfinite: int
    largest: float
    smallest: float
    octaves: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    noise: bool = False

    @property
    def nonzeros(self) -> int:
        """How many values are finite and not 0."""
        return sum(map(sum, self.octaves.values()))


@dataclass(frozen=True)
class RangesRecord:
    """The magnitudes of all gradients of a model, over some batches.

    Args:
        step: The attempted step before which they were measured, counted from 0. None outside of a run.
        epoch: Its epoch, where the observer knows it.
        precision: What they were computed in: `"float32"`, `"float16"` or `"bfloat16"`.
        scale: The loss scale that they were computed with; the magnitudes are those after unscaling.
        batches: How many batches were measured.
        model: The model's name.
        ranges: One for each layer's output and each variable.
        format: As in `RunRecord`: such a line can be a file by itself.
    """

    event: ClassVar[str] = "gradient_ranges"
    step: int | None
    epoch: int | None
    precision: str
    scale: float
    batches: int
    model: str
    ranges: list[GradientRange]
    format: int = FORMAT

    def __str__(self) -> str:
        return f"step {self.step}: ranges of {len(self.ranges)} gradients of {self.model} in {self.precision}"


Change = ScaleChange | EventsLost
Record = RunRecord | ScaleChange | EventsLost | Progress | RangesRecord


def short(scale: float) -> str:
    """Returns a scale as people write it: `2^15`, or `1000`."""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:g}"
