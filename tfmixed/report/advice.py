"""Sentences about a run: what happened, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from tfmixed._probe.rounding_model import percent, update_loss
from tfmixed.ranges import GradientRanges
from tfmixed.records import Progress, short
from tfmixed.report.loading import Run

_UNSETTLED = 0.02  # share of overflows; with a growth interval of 2000 a settled scale has far fewer
_DISCARDED = 0.1  # share of a variable's update
_DESCENT = 5  # skipped steps from which on a start or an unsettled scale is worth advice


def happened(run: Run) -> list[str]:
    """Returns sentences about the events of a run."""
    return [*_steps(run), *_losses(run), *_lost_values(run)]


def advice(run: Run) -> list[str]:
    """Returns sentences about what to change. There are none if the log shows no problem."""
    scale = [*_exhausted(run), *_start(run), *_unsettled(run), *_constant(run), *_scale(run), *_capacity(run)]
    return [*scale, *_sums(run), *_updates(run)]


def _sums(run: Run) -> Iterator[str]:
    if run.fidelity is not None and run.fidelity.wrong:
        names = ", ".join(f"`{gradient.name}`" for gradient in run.fidelity.wrong[:3])
        rest = f" and {len(run.fidelity.wrong) - 3} more" if len(run.fidelity.wrong) > 3 else ""
        yield f"Rounding does not explain the errors of {names}{rest}. {run.fidelity.advice()}".strip()


def _updates(run: Run) -> Iterator[str]:
    measured = max((run.ranges, run.fidelity), key=lambda found: -1 if found is None else found.record.step or 0)
    lost = [
        (update_loss(gradient, gradient.rounded_to).share, gradient)
        for gradient in measured or ()
        if gradient.rounded_to
        and not getattr(gradient, "noise", False)
        and update_loss(gradient, gradient.rounded_to).share > _DISCARDED
    ]
    if not lost:
        return
    share, worst = max(lost, key=lambda pair: pair[0])
    rest = f" It discards more than a tenth of that of {_count(len(lost) - 1, 'other variable')}."
    remedy = "Hold the weights in float32, as the policy `mixed_float16` does"
    if worst.rounded_to == "bfloat16":
        remedy = (
            "Round them stochastically, which keeps the update on average: `LowPrecisionOptimizer(..., "
            'weights="stochastic")`. Or hold them in float32, as the policy `mixed_bfloat16` does'
        )
    yield (
        f"Rounding the weights to {worst.rounded_to} discards {percent(share)} of the update of `{worst.name}`."
        f"{rest if len(lost) > 1 else ''} {remedy}."
    )


def precision(ranges: GradientRanges) -> str:
    """Returns the half-precision format of a model's gradients; float16 if there is none."""
    held = {gradient.dtype for gradient in ranges.half}
    return "bfloat16" if "bfloat16" in held and "float16" not in held else "float16"


def _steps(run: Run) -> Iterator[str]:
    if not run.steps:
        yield "The log holds no step."
        return
    step, counted = run.counted_until
    bound = "" if step == run.steps else "at least "
    yield f"{_count(run.steps, 'step')}, {bound}{run.skipped:,} skipped ({percent(run.skipped / run.steps)})."
    first, last = run.history.initial_scale, run.final_scale
    change = f"went from {short(first)} to {short(last)}" if run.history.changes else f"stayed at {short(last)}"
    start = f" The log begins at step {run.history.first:,}." if run.history.first else ""
    yield f"The loss scale {change}.{start}"
    if counts := run.overflow_counts:
        named = ", ".join(f"`{name}` in {count} of {counts.total()}" for name, count in counts.most_common(3))
        rest = f", and {len(counts) - 3} other variables" if len(counts) > 3 else ""
        yield f"The first gradient that overflowed: {named}{rest}."
    unlisted = counted - sum(change.step < step for change in run.history.overflows()) - run.lost
    if unlisted > 0:
        yield f"{_count(unlisted, 'skipped step')} did not change the scale."


def _losses(run: Run) -> Iterator[str]:
    progress = run.all(Progress)
    known = [record.loss for record in progress if record.loss is not None]
    if len(known) > 1:
        yield f"The loss went from {known[0]:.4g} to {known[-1]:.4g}."
    if known and progress[-1].loss is None:
        yield "The loss of the last epoch is unknown or not finite."


def _lost_values(run: Run) -> Iterator[str]:
    if run.ranges is None:
        return
    ranges, scale, held = run.ranges, run.measured_at, precision(run.ranges)
    lost = ranges.losses(scale, held)
    when = "" if ranges.record.step is None else f" (step {ranges.record.step:,})"
    yield (
        f"In the last snapshot{when}, {held} flushes {percent(lost.share(lost.zero))} of all nonzero gradient values "
        f"to 0 at loss scale {short(scale)}."
    )
    if lost.overflow:
        yield f"At that scale, {percent(lost.share(lost.overflow))} of them overflow."
    sentence = ranges.verdict(held)
    if sentence not in "".join(_scale(run)):  # otherwise it is part of the advice
        yield sentence[0].upper() + sentence[1:]


def _exhausted(run: Run) -> Iterator[str]:
    recent = _recent_share(run)
    floor = run.begin.rule.get("min_scale") if run.begin else None
    if recent > 0.5:
        names = ", ".join(f"`{name}`" for name, _ in run.overflow_counts.most_common(3))
        yield (
            f"{percent(recent)} of the last steps were skipped, so the run hardly learns. Lower the learning rate, "
            f"clip gradients, or put {names or 'the layers that overflow'} in float32. If the loss is not finite, no "
            "scale helps."
        )
    if isinstance(floor, (int, float)) and run.final_scale <= floor and run.skipped:
        yield f"The scale fell to its minimum, {short(floor)}. Set a lower `min_scale`, or clip gradients."


def _recent_share(run: Run) -> float:
    """Returns the share of skipped steps in the last epoch of at least 10 steps, or in the whole log."""
    counts = [(run.history.first, 0), *((record.step + 1, record.skipped_steps) for record in run.all(Progress))]
    counts.append((run.steps, run.skipped))
    for (start, before), (end, after) in reversed([*pairwise(counts)]):
        if end - start >= 10:
            return (after - before) / (end - start)
    return run.skipped / max(run.steps, 1)


def _start(run: Run) -> Iterator[str]:
    overflows = run.history.overflows()
    row = [change for index, change in enumerate(overflows) if change.step == run.history.first + index]
    if len(row) < _DESCENT:
        return
    low, start, works = row[-1].new_scale, row[-1].new_scale, _working_scales(run)
    if run.ranges is not None:
        if works is None or low < works[0]:  # the ranges need a higher scale
            return
        start = min(low, works[1])
    where = "there" if start == low else "lower"
    yield (
        f"The first {len(row)} steps were skipped while the scale fell to {short(low)}. Start {where}: "
        f"`initial_scale={short(start)}`."
    )


def _working_scales(run: Run) -> tuple[float, float] | None:
    """Returns the smallest and the largest power of two that work for the last ranges. None if there are none."""
    if run.ranges is None or any(gradient.nonfinite for gradient in run.ranges.half):
        return None
    return run.ranges.working_scales(precision(run.ranges))


def _unsettled(run: Run) -> Iterator[str]:
    middle = (run.history.first + run.steps) // 2
    late = sum(change.step >= middle for change in run.history.overflows())
    if late >= _DESCENT and late > _UNSETTLED * (run.steps - middle):
        variable = run.overflow_counts.most_common(1)[0][0]
        yield (
            f"The scale never settled: {late} of the last {run.steps - middle:,} steps overflowed. Raise "
            f"`growth_interval` (`tfmixed simulate` shows the effect), or put the layer of `{variable}` in float32."
        )


def _constant(run: Run) -> Iterator[str]:
    if run.begin and run.begin.rule.get("rule") == "ConstantScale" and run.skipped:
        yield f"The constant scale {short(run.final_scale)} overflowed in {run.skipped:,} steps. Choose a lower one."


def _scale(run: Run) -> Iterator[str]:
    if run.ranges is None or not any(gradient.nonzeros for gradient in run.ranges.half):
        return
    scale, held, works = run.measured_at, precision(run.ranges), _working_scales(run)
    if works is None:
        yield f"{held}: {run.ranges.verdict(held)}"
    elif scale > works[1]:
        yield f"The scale {short(scale)} is too high for the last snapshot. At most {short(works[1])} works."
    elif scale < works[0]:
        yield f"The scale {short(scale)} is too low for the smallest gradients. {_higher(run, works[0], held)}."


def _higher(run: Run, needed: float, held: str) -> str:
    """Returns advice on a higher scale."""
    assert run.ranges is not None
    first = min(run.history.overflows(), key=lambda change: change.old_scale, default=None)
    if first is not None and first.old_scale <= needed:
        name, scale = first.variable or "another gradient", short(first.old_scale)
        return f"They need {short(needed)}, but `{name}` overflowed at {scale}. Put its layer in float32, or clip it"
    start = run.ranges.suggest_constant_scale(precision=held)
    return f"Start from {short(start)}, or let the scale grow sooner (`growth_interval`)"


def _capacity(run: Run) -> Iterator[str]:
    if run.lost:
        yield f"{_count(run.lost, 'scale change')} were lost. Raise `event_capacity`, or collect more often (`every=`)."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
