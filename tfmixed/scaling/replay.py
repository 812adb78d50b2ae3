"""What rules would have done in a run that was recorded: to choose a growth interval without training again.

A step that overflowed at a scale overflows at each scale that is not below it, and passes below; all other steps pass.
A log vouches for no more than that: how far a rule left what was recorded is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tfmixed.records import Progress, Record
from tfmixed.scaling import PEERS, RULES, ConstantScale, ScaleHistory, ScalingRule, like

_MOST_STEPS = 10**8  # that are held in memory, one by one


@dataclass(frozen=True)
class Trace:
    """What is known of the steps of a run.

    Args:
        finite: For each step, whether all gradients were finite.
        scales: The scale of each step, None where the log does not know it. None as a whole: nothing is known of
            scales, and each step goes as it went.
        unlisted: Skipped steps that stand in no line of the log, and count as passed.
    """

    finite: tuple[bool, ...]
    scales: tuple[float | None, ...] | None = None
    unlisted: int = 0

    @classmethod
    def of_letters(cls, letters: str) -> Trace:
        """Returns the trace that `T` (finite) and `F` (overflow) spell; white space is left out.

        Raises:
            ValueError: There is another letter, or none.
        """
        steps = "".join(letters.split())
        if not steps or set(steps) - {"T", "F"}:
            wrong = next((letter for letter in steps if letter not in "TF"), "")
            raise ValueError(f"trace must hold one T (finite) or F (overflow) a step, received {wrong!r}")
        return cls(tuple(letter == "T" for letter in steps))

    @classmethod
    def of_log(cls, log: Sequence[Record]) -> Trace:
        """Returns what a log knows of its steps.

        Raises:
            ValueError: It knows of no step, or of more than 100 million.
        """
        history = ScaleHistory.of(log)
        if (steps := history.steps - history.first) > _MOST_STEPS:
            raise ValueError(f"trace must be a log of at most {_MOST_STEPS:,} steps, received one of {steps:,}")
        scales, overflows = history.scale_of_each_step(), {change.step for change in history.overflows()}
        if not scales:
            raise ValueError("trace must be a log with at least one step, and this one holds none")
        counts = [(each.step, each.skipped_steps) for each in log if isinstance(each, Progress)]
        until, skipped = max(counts, default=(-1, 0))
        listed = sum(step <= until for step in overflows)
        before = 0 if history.first == 0 else skipped  # of an earlier log, nobody knows how many
        finite = tuple(step not in overflows for step in range(history.first, history.first + len(scales)))
        return cls(finite, tuple(scales), max(skipped - listed - before, 0))


@dataclass(frozen=True)
class Outcome:
    """What one rule does on a trace.

    Args:
        rule: The rule.
        scales: The scale of each step.
        skipped: The steps that it skips, counted from 0.
        final_scale: The scale after the last step.
        above: How many steps pass at a scale above the one that the log saw them pass at.
        below: How many steps that overflowed in the log pass, because their scale is lower here.
    """

    rule: ScalingRule
    scales: tuple[float, ...]
    skipped: tuple[int, ...]
    final_scale: float
    above: int
    below: int

    def as_dict(self) -> dict[str, Any]:
        """Returns its numbers, without the single steps."""
        logs = [math.log2(scale) for scale in self.scales]
        return {
            "rule": self.rule.get_config(),
            "steps": len(self.scales),
            "final_scale": self.final_scale,
            "skipped_steps": len(self.skipped),
            "share_skipped": len(self.skipped) / len(self.scales),
            "lowest_scale": min(self.scales),
            "highest_scale": max(self.scales),
            "mean_log2_scale": sum(logs) / len(logs),
            "steps_above_recorded": self.above,
            "overflows_avoided": self.below,
        }


def replay(rule: ScalingRule, trace: Trace) -> Outcome:
    """Returns what a rule does on a trace.

    Raises:
        ValueError: The rule needs the largest gradient of each step, which no trace holds.

    Example:
    >>> trace = Trace((True, False, True), (8.0, 8.0, 4.0))
    >>> replay(ConstantScale(4.0), trace).skipped
    ()
    >>> replay(ConstantScale(16.0), trace).above
    2
    """
    if rule.needs_amax:
        name = type(rule).__name__
        raise ValueError(
            f"rule must do without the largest gradient of each step, which no trace holds; {name} needs it"
        )
    known = trace.scales or (math.nan,) * len(trace.finite)
    state, scales, skipped, above, below = rule.start(), [], [], 0, 0
    for step, (finite, recorded) in enumerate(zip(trace.finite, known, strict=True)):
        scale = float(state.scale)
        # Compared so that NaN, of which nothing is known, lets the step go as it went.
        passes = finite or (recorded is not None and scale < recorded)
        above += finite and (recorded is None or scale > recorded)
        below += passes and not finite
        scales.append(scale)
        if not passes:
            skipped.append(step)
        state = rule.next(state, passes)
    return Outcome(rule, tuple(scales), tuple(skipped), float(state.scale), above, below)


def parse(text: str) -> ScalingRule:
    """Returns the rule that a text names: `dynamic:growth_interval=500`, `1024`, or a peer, `torch`.

    Args:
        text: A number (constant), or a name and its parameters: `name:a=1,b=2`.

    Raises:
        ValueError: There is no such rule, or no such parameter, or its value is out of range.

    Example:
    >>> parse("dynamic:growth_interval=500,hysteresis=2").hysteresis
    2
    >>> parse("1024")
    ConstantScale(value=1024.0, skip_nonfinite=True)
    """
    name, _, listed = text.partition(":")
    if not listed and (number := _value(name)) is not None and not isinstance(number, (bool, str)):
        return ConstantScale(number)
    params = dict(_pair(each) for each in listed.split(",") if each.strip())
    if name in PEERS:
        return like(name, **params)
    if name not in RULES:
        raise ValueError(f"rule must be a number or one of {', '.join([*RULES, *PEERS])}, received {name!r}")
    names = [each.name for each in fields(RULES[name])]
    if unknown := params.keys() - set(names):
        raise ValueError(
            f"parameters of {name} must be among {', '.join(names)}, received {', '.join(sorted(unknown))}"
        )
    if name == "constant" and "value" not in params:
        raise ValueError(f"constant must have a value, as in constant:value=1024, received {text!r}")
    rule: ScalingRule = RULES[name](**params)
    return rule


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"a parameter must be written name=value, received {text!r}")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """Returns a number, True, False, None or the text itself; `2**15` and `2^15` are numbers."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    base, power, exponent = text.replace("^", "**").partition("**")
    try:
        return math.pow(float(base), float(exponent)) if power else int(text)
    except (ValueError, OverflowError):  # no numbers, or no real one: -8^0.5
        pass
    try:
        return float(text)
    except ValueError:
        return text
