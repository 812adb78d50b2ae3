"""Replays of recorded runs under other rules, for instance to choose a growth interval without training again.

A step that overflowed at one scale is assumed to overflow at every scale at or above it, and to be finite below. A step
that was finite is assumed to be finite at any scale. `Outcome` counts the steps in which a rule leaves the record.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from tfmixed.records import Progress, Record
from tfmixed.records.scale_history import ScaleHistory
from tfmixed.scaling.base import ScalingRule
from tfmixed.scaling.constant import ConstantScale
from tfmixed.scaling.presets import PEERS, RULES, get, like

_MAX_STEPS = 10**8  # a trace holds every step in memory


def simulate(rule: Any, trace: Iterable[Any] | None, amax: Sequence[float] | None = None) -> list[float]:
    """Returns the scale after each step of a trace.

    Args:
        rule: A rule, or a value that `get` accepts.
        trace: `T` (all gradients finite) or `F` (overflow) for each step, as a string or as booleans. `None` marks a
            step finite if its `amax` is.
        amax: The largest absolute unscaled gradient of each step, for rules that need it. Defaults to None.

    Raises:
        ValueError: If `trace` has another letter, `amax` has another length, or both are `None`.

    Example:
    >>> simulate(DynamicScale(initial_scale=4.0), "FFT")
    [2.0, 1.0, 1.0]
    """
    rule = get(rule)
    if trace is None:
        if amax is None:
            raise ValueError("`trace` or `amax` must be given. Received: None for both")
        trace = [bool(numpy.isfinite(value)) for value in amax]
    flags = [_flag(step) for step in trace]
    sizes: Sequence[float | None] = [None] * len(flags) if amax is None else list(amax)
    if len(sizes) != len(flags):
        raise ValueError(f"`amax` must have one value for each of {len(flags)} steps. Received: {len(sizes)} values")
    state, scales = rule.start(), []
    for finite, size in zip(flags, sizes, strict=True):
        with numpy.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, an overflow
            largest = None if size is None else numpy.float32(size)
        state = rule.next(state, finite, largest)
        scales.append(float(state.scale))
    return scales


@dataclass(frozen=True)
class Trace:
    """The recorded steps of a run.

    Args:
        finite: For each step, whether all gradients were finite.
        scales: The scale of each step, or `None` for a step whose scale is not in the log. `None` for the whole
            trace if no scale is known, in which case each step overflows or not as recorded. Defaults to None.
        unlisted: Number of skipped steps whose position is not in the log. They count as finite. Defaults to 0.
    """

    finite: tuple[bool, ...]
    scales: tuple[float | None, ...] | None = None
    unlisted: int = 0

    @classmethod
    def of_letters(cls, letters: str) -> Trace:
        """Returns a trace from letters, `T` (finite) or `F` (overflow). White space is ignored.

        Raises:
            ValueError: If there is another letter, or none.
        """
        return cls(tuple(_flag(letter) for letter in "".join(letters.split()) or [""]))

    @classmethod
    def of_log(cls, log: Sequence[Record]) -> Trace:
        """Returns the trace of a log.

        Raises:
            ValueError: If the log has no steps, or more than 100 million.
        """
        history = ScaleHistory.of(log)
        if (steps := history.steps - history.first) > _MAX_STEPS:
            raise ValueError(f"The log must have at most {_MAX_STEPS:,} steps. Received: {steps:,} steps")
        scales, overflows = history.scale_of_each_step(), {change.step for change in history.overflows()}
        if not scales:
            raise ValueError("The log must have at least one step. Received: a log without steps")
        counts = [(record.step, record.skipped_steps) for record in log if isinstance(record, Progress)]
        last, skipped = max(counts, default=(-1, 0))
        # The counter of a resumed run includes steps that an earlier log skipped.
        missing = skipped - sum(step <= last for step in overflows) if history.first == 0 else 0
        finite = tuple(step not in overflows for step in range(history.first, history.first + len(scales)))
        return cls(finite, tuple(scales), max(missing, 0))


@dataclass(frozen=True)
class Outcome:
    """The result of replaying one rule on a trace.

    Args:
        rule: The rule.
        scales: The scale of each step.
        skipped: Indices of the skipped steps.
        final_scale: The scale after the last step.
        above: Number of finite steps at a scale above the recorded one, at which they could have overflowed.
        below: Number of recorded overflows that do not happen, because the scale is lower here.
    """

    rule: ScalingRule
    scales: tuple[float, ...]
    skipped: tuple[int, ...]
    final_scale: float
    above: int
    below: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the totals, without the single steps."""
        return {
            "rule": self.rule.get_config(),
            "steps": len(self.scales),
            "final_scale": self.final_scale,
            "skipped_steps": len(self.skipped),
            "share_skipped": len(self.skipped) / len(self.scales),
            "lowest_scale": min(self.scales),
            "highest_scale": max(self.scales),
            "mean_log2_scale": sum(map(math.log2, self.scales)) / len(self.scales),
            "steps_above_recorded": self.above,
            "overflows_avoided": self.below,
        }


def replay(rule: ScalingRule, trace: Trace) -> Outcome:
    """Returns the outcome of a rule on a trace.

    Raises:
        ValueError: If the rule needs the largest gradient of each step, which a trace does not hold.

    Example:
    >>> trace = Trace((True, False, True), (8.0, 8.0, 4.0))
    >>> replay(ConstantScale(4.0), trace).skipped
    ()
    >>> replay(ConstantScale(16.0), trace).above
    2
    """
    if rule.needs_amax:
        name = type(rule).__name__
        raise ValueError(f"A trace does not hold the largest gradients, which {name} needs. Received: rule={rule!r}")
    recorded_scales = trace.scales or (math.nan,) * len(trace.finite)
    state, scales, skipped, above, below = rule.start(), [], [], 0, 0
    for step, (finite, recorded) in enumerate(zip(trace.finite, recorded_scales, strict=True)):
        scale = float(state.scale)
        # Comparisons with NaN are false, so a step without a recorded scale goes as recorded.
        passes = finite or (recorded is not None and scale < recorded)
        above += finite and (recorded is None or scale > recorded)
        below += passes and not finite
        scales.append(scale)
        if not passes:
            skipped.append(step)
        state = rule.next(state, passes)
    return Outcome(rule, tuple(scales), tuple(skipped), float(state.scale), above, below)


def parse(text: str) -> ScalingRule:
    """Returns the rule that a command-line text names, such as `dynamic:growth_interval=500`, `1024` or `torch`.

    Args:
        text: A number (a constant scale), or a name with optional parameters, `name:a=1,b=2`.

    Raises:
        ValueError: If the rule or a parameter is unknown, or a value is out of range.

    Example:
    >>> parse("dynamic:growth_interval=500,hysteresis=2").hysteresis
    2
    >>> parse("1024")
    ConstantScale(value=1024.0, skip_nonfinite=True)
    """
    name, _, listed = text.partition(":")
    if not listed and isinstance(number := _value(name), (int, float)) and not isinstance(number, bool):
        return ConstantScale(number)
    params = dict(_parameter(part) for part in listed.split(",") if part.strip())
    if name in PEERS:
        return like(name, **params)
    if name in RULES:
        return ScalingRule.from_config({"rule": RULES[name].__name__, **params})
    raise ValueError(f"`rule` must be a number or one of {', '.join([*RULES, *PEERS])}. Received: rule={name!r}")


def _flag(step: Any) -> bool:
    if isinstance(step, (bool, numpy.bool_)):
        return bool(step)
    if step not in ("T", "F"):
        raise ValueError(f"`trace` must hold one T (finite) or F (overflow) for each step. Received: {step!r}")
    return bool(step == "T")


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"A parameter must be written name=value. Received: {text!r}")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """Returns a Python literal, a power such as `2**15` or `2^15` as a number, or else the text itself."""
    base, power, exponent = text.replace("^", "**").partition("**")
    try:
        return math.pow(float(base), float(exponent)) if power else ast.literal_eval(text)
    except (ValueError, SyntaxError, OverflowError, MemoryError, RecursionError):
        return text
