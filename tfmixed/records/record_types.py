"""Record types of a run log. The types of their fields are what `from_line` accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from tfmixed.formats import FLOAT32

# Raised when an earlier version would misread the lines. A new field with a default does not need a new format.
FORMAT = 1

Reason = Literal["overflow", "growth", "set"]
Kind = Literal["activation", "weight"]

_LARGEST_INT = 2**53  # the largest integer up to which float64 is exact
Count = Annotated[int, Meta(ge=0, le=_LARGEST_INT)]
Scale = Annotated[float, Meta(gt=0, le=FLOAT32.max)]
Magnitude = Annotated[float, Meta(ge=0, le=FLOAT32.max)]
Share = Annotated[float, Meta(ge=0, le=1)]
Norm = Annotated[float, Meta(ge=0)]
Exponent = Annotated[int, Meta(ge=-127, le=127)]  # of a float32
_Int = Annotated[int, Meta(ge=-_LARGEST_INT, le=_LARGEST_INT)]
Updates = dict[str, dict[_Int, tuple[Count, Norm]]]  # see `GradientRange`
_Parameter = bool | _Int | float | str | list[Any] | dict[str, Any] | None


@dataclass(frozen=True)
class RunRecord:
    """The start of a run, or of its continuation.

    Args:
        step: The next attempted step, counted from 0.
        loss_scale: The scale of that step.
        started: Local time with its UTC offset, in ISO 8601.
        model: The model's name.
        policy: Name of the dtype policy.
        rule: Name and parameters of the scaling rule.
        optimizer: Class name of the inner optimizer.
        devices: The devices of this machine, the main one first.
        versions: Versions of Python, tfmixed, Keras and its backend.
        format: Version of the log format. Defaults to the current one; a line without it has format 1.
    """

    event: ClassVar[str] = "run"
    step: Count
    loss_scale: Scale
    started: str
    model: str
    policy: str
    rule: dict[str, _Parameter]
    optimizer: str
    devices: list[str]
    versions: dict[str, str]
    format: Count = FORMAT

    def __str__(self) -> str:
        return f"step {self.step}: {self.model} under {self.policy}, loss scale {short(self.loss_scale)}"


@dataclass(frozen=True)
class ScaleChange:
    """A change of the loss scale.

    Args:
        step: The attempted step that changed it, counted from 0. Skipped steps count.
        old_scale: The scale that the loss of this step was multiplied by.
        new_scale: The scale of the next step.
        reason: `"overflow"` if a gradient of this step was not finite, `"growth"` after enough finite steps, or
            `"set"` if it was assigned or lowered by the statistics of a rule.
        variable: On an overflow, the path of the first variable whose gradient was not finite.
        epoch: The epoch of the step. None if it is unknown.
    """

    event: ClassVar[str] = "scale_change"
    step: Count
    old_scale: Scale
    new_scale: Scale
    reason: Reason
    variable: str | None = None
    epoch: Count | None = None

    def __str__(self) -> str:
        variable = f"  {self.variable}" if self.variable else ""
        change = f"{short(self.old_scale)} -> {short(self.new_scale)}"
        return f"step {self.step}: loss scale {change} ({self.reason}){variable}"


@dataclass(frozen=True)
class EventsLost:
    """Scale changes that the event buffer on the device overwrote before they were collected.

    Args:
        count: Number of changes.
        before_step: The step of the first change after the gap.
        epoch: The epoch in which the loss was noticed.
    """

    event: ClassVar[str] = "events_lost"
    count: Count
    before_step: Count
    epoch: Count | None = None

    @property
    def step(self) -> int:
        """Position among the other records: `before_step`."""
        return self.before_step

    def __str__(self) -> str:
        return f"{self.count} scale changes before step {self.before_step} were lost: raise `event_capacity`"


@dataclass(frozen=True)
class Progress:
    """The state of a run at the end of an epoch.

    Args:
        step: The last attempted step, counted from 0.
        epoch: The epoch that ended.
        loss_scale: The scale of the next step.
        skipped_steps: Number of steps skipped so far.
        gradient_norm: Global norm of the unscaled gradients of the last step. None if it was not finite.
        loss: Mean of the epoch, as reported by `fit`. None if it is unknown or was not finite.
    """

    event: ClassVar[str] = "progress"
    step: Count
    epoch: Count | None
    loss_scale: Scale
    skipped_steps: Count
    gradient_norm: Norm | None = None
    loss: float | None = None

    def __str__(self) -> str:
        return f"step {self.step}: {self.skipped_steps} steps skipped so far, loss scale {short(self.loss_scale)}"


@dataclass(frozen=True)
class GradientRange:
    """The magnitudes of one gradient tensor over some batches.

    Args:
        name: Path of the variable, or of the layer whose output it is.
        kind: `"weight"` or `"activation"`.
        layer: Path of the layer that it belongs to.
        dtype: Dtype of this gradient in training: `"float16"`, `"bfloat16"`, `"float32"`, ...
        zeros: Number of values that are 0.
        nonfinite: Number of values that are infinite or NaN.
        largest: The largest finite magnitude. 0 if all finite values are 0.
        smallest: The smallest magnitude other than 0. 0 if there is none.
        octaves: For each exponent e, the number of magnitudes in [2^e, 2^(e+1)), in four parts: exactly 2^e; up to
            2^e (2 - 2^-10); from there up to 2^e (2 - 2^-11); the rest. At these limits float16 rounds to its smallest
            number, to its smallest normal number and to infinity, so counts are exact for each power of two as a
            scale. Exponent -127 counts magnitudes that are subnormal in float32.
        noise: True if the gradient is rounding noise: a sum that is 0 in theory. It is ignored in all advice.
        updates: Sizes of the optimizer's updates, relative to the distance from the value to the next number. For each
            half-precision format and each exponent e, the number and the sum of those in [2^e, 2^(e+1)) distances. A
            tie that returns to an even value counts as less, so that rounding to nearest discards those below 2^-1.
            Empty if they are unknown.
        rounded_to: The half-precision dtype that holds the variable, if training rounds updates to nearest. Empty if
            training keeps what rounding discards.
    """

    name: str
    kind: Kind
    layer: str
    dtype: str
    zeros: Count
    nonfinite: Count
    largest: Magnitude
    smallest: Magnitude
    octaves: dict[Exponent, tuple[Count, Count, Count, Count]] = field(default_factory=dict)
    noise: bool = False
    updates: Updates = field(default_factory=dict)
    rounded_to: str = ""

    @property
    def nonzeros(self) -> int:
        """Number of values that are finite and not 0."""
        return sum(map(sum, self.octaves.values()))


@dataclass(frozen=True)
class RangesRecord:
    """The magnitudes of all gradients of a model over some batches.

    Args:
        step: The attempted step before which they were measured, counted from 0. None outside of a run.
        epoch: The epoch of that step. None if it is unknown.
        precision: Dtype of the computation: `"float32"`, `"float16"` or `"bfloat16"`.
        scale: The loss scale of the computation. The magnitudes are unscaled.
        batches: Number of batches measured.
        model: The model's name.
        ranges: One entry for the output of each layer and for each variable.
        format: Version of the log format, as in `RunRecord`: a file may consist of this line alone.
    """

    event: ClassVar[str] = "gradient_ranges"
    step: Count | None
    epoch: Count | None
    precision: str
    scale: Scale
    batches: Count
    model: str
    ranges: list[GradientRange]
    format: Count = FORMAT

    def __str__(self) -> str:
        return f"step {self.step}: ranges of {len(self.ranges)} gradients of {self.model} in {self.precision}"


@dataclass(frozen=True)
class GradientError:
    """The gradient of one variable in half precision, compared with that in float32. All vectors are flattened.

    Args:
        name: Path of the variable.
        layer: Path of the layer that holds it.
        dtype: Dtype in which the layer computes.
        size: Number of elements.
        terms: Number of rows that the layer returns: the terms of the sum that the gradient of a bias is.
        error: Norm of the difference, divided by the norm in float32.
        rounding: The same for float32 arithmetic with weights, outputs and gradients rounded: the error that rounding
            alone explains.
        cosine: Cosine of the angle between both.
        flushed: Share of the nonzero values that half precision flushes to 0.
        nonfinite: Number of values that are infinite or NaN in half precision and finite in float32. Values that are
            not finite in one of the runs are left out of the other numbers.
        unknown: Number of values that are infinite or NaN in float32. Defaults to 0.
        updates: The same as in `GradientRange`.
        rounded_to: The same as in `GradientRange`.
    """

    name: str
    layer: str
    dtype: str
    size: Count
    terms: Count
    error: Magnitude
    rounding: Magnitude
    cosine: float
    flushed: Share
    nonfinite: Count
    unknown: Count = 0
    updates: Updates = field(default_factory=dict)
    rounded_to: str = ""


@dataclass(frozen=True)
class FidelityRecord:
    """The gradients of a model in half precision, compared with those in float32.

    Args:
        step: The attempted step before which they were measured, counted from 0. None outside of a run.
        epoch: The epoch of that step. None if it is unknown.
        scale: The loss scale.
        batches: Number of batches measured.
        model: The model's name.
        float32_sums: Whether gradients were summed in float32, as under `set_policy`.
        gradients: One entry for each trainable variable that receives a gradient.
        format: Version of the log format, as in `RunRecord`: a file may consist of this line alone.
    """

    event: ClassVar[str] = "gradient_fidelity"
    step: Count | None
    epoch: Count | None
    scale: Scale
    batches: Count
    model: str
    float32_sums: bool
    gradients: list[GradientError]
    format: Count = FORMAT

    def __str__(self) -> str:
        return f"step {self.step}: fidelity of {len(self.gradients)} gradients of {self.model}"


Change = ScaleChange | EventsLost
Record = RunRecord | ScaleChange | EventsLost | Progress | RangesRecord | FidelityRecord


def short(scale: float) -> str:
    """Returns a scale in short form: `2^15`, or `1000`."""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:g}"
