"""What a log says, in words: what happened, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from tfmixed._probe.rounding_model import percent
from tfmixed.ranges import GradientRanges
from tfmixed.records import Progress, short
from tfmixed.report.loading import Run

_SETTLED = 0.02  # a growth each 50 steps: what a growth interval of 2000 never makes of a scale that found its place
_DESCENT = 5  # skipped steps at the start that are worth a word


def happened(run: Run) -> list[str]:
    """Returns what happened in a run, as sentences."""
    return [*_steps(run), *_losses(run), *_lost(run)]


def advice(run: Run) -> list[str]:
    """Returns what to change, as sentences; none where all is well."""
    return [*_exhausted(run), *_start(run), *_restless(run), *_constant(run), *_scale(run), *_capacity(run)]


def precision(ranges: GradientRanges) -> str:
    """Returns the half-precision format that a model's gradients are held in; float16 where there is none."""
    held = {each.dtype for each in ranges.half}
    return "bfloat16" if "bfloat16" in held and "float16" not in held else "float16"


def _steps(run: Run) -> Iterator[str]:
    if not run.steps:
        yield "No step is in the log."
        return
    counted, _ = run.counted_until
    least = "" if counted == run.steps else "at least "
    share = percent(run.skipped / run.steps)
    yield f"{run.steps:,} {_s('step', run.steps)}, {least}{run.skipped:,} skipped ({share})."
    start = f" The log begins at step {run.history.first:,}." if run.history.first else ""
    first, last = run.history.initial_scale, run.final_scale
    moved = f"went from {short(first)} to {short(last)}" if run.history.changes else f"stayed at {short(last)}"
    yield f"The loss scale {moved}.{start}"
    if run.guilty:
        of = sum(run.guilty.values())
        named = ", ".join(f"`{name}` in {count} of {of}" for name, count in run.guilty.most_common(3))
        rest = f", and {len(run.guilty) - 3} other variables" if len(run.guilty) > 3 else ""
        yield f"The first gradient that overflowed: {named}{rest}."
    unseen = run.counted_until[1] - sum(change.step < counted for change in run.history.overflows()) - run.lost
    if unseen > 0:
        yield f"{unseen:,} skipped {_s('step', unseen)} left the scale as it was: constant, at its floor, or patient."


def _losses(run: Run) -> Iterator[str]:
    known = [each.loss for each in run.all(Progress) if each.loss is not None]
    if len(known) > 1:
        yield f"The loss went from {known[0]:.4g} to {known[-1]:.4g}."
    last = next(reversed(run.all(Progress)), None)
    if last is not None and last.loss is None and known:
        yield "The loss of the last epoch is not finite, or unknown."


def _lost(run: Run) -> Iterator[str]:
    if run.ranges is None:
        return
    of, scale, held = run.ranges, run.measured_at, precision(run.ranges)
    lost = of.losses(scale, held)
    when = "" if of.record.step is None else f" (step {of.record.step:,})"
    yield (
        f"In the last snapshot{when} {held} flushes {percent(lost.share(lost.zero))} of all gradient values other than "
        f"0 to 0 at the scale used, {short(scale)}."
    )
    if lost.overflow:
        yield f"At that scale {percent(lost.share(lost.overflow))} of them overflow."
    verdict = of.verdict(held)
    if verdict not in "".join(_scale(run)):  # what is to be changed stands there
        yield verdict[0].upper() + verdict[1:]


def _exhausted(run: Run) -> Iterator[str]:
    recent = _recent(run)
    floor = run.begin.rule.get("min_scale") if run.begin else None
    if recent is not None and recent > 0.5:
        worst = ", ".join(f"`{name}`" for name, _ in run.guilty.most_common(3))
        yield (
            f"{percent(recent)} of the last steps were skipped: the run hardly learns. Lower the learning rate, clip "
            f"gradients, or put {worst or 'what overflows'} in float32. No scale helps where the loss is not finite."
        )
    if isinstance(floor, (int, float)) and run.final_scale <= floor and run.skipped:
        yield f"The scale fell to its floor, {short(floor)}: set a lower `min_scale`, or clip gradients."


def _recent(run: Run) -> float | None:
    """Returns the share of skipped steps in the last epoch that took more than a few steps, or in the whole log."""
    counts = [(run.history.first, 0), *((each.step + 1, each.skipped_steps) for each in run.all(Progress))]
    counts.append((run.steps, run.skipped))
    for (step, skipped), (later, more) in reversed([*pairwise(counts)]):
        if later - step >= 10:
            return (more - skipped) / (later - step)
    return run.skipped / run.steps if run.steps else None


def _start(run: Run) -> Iterator[str]:
    overflows = run.history.overflows()
    row = [change for index, change in enumerate(overflows) if change.step == run.history.first + index]
    if len(row) >= _DESCENT:
        low, start = row[-1].new_scale, _agreed(run, row[-1].new_scale)
        if start is not None:
            where = "there" if start == low else "lower"
            told = f"The first {len(row)} steps were skipped on the way down to {short(low)}"
            yield f"{told}: start {where}, `initial_scale={short(start)}`."


def _agreed(run: Run, scale: float) -> float | None:
    """Returns a scale to start from, lower where the last ranges ask for that; None where they need a higher one."""
    works = _working(run)
    if run.ranges is None:
        return scale
    return None if works is None or scale < works[0] else min(scale, works[1])


def _working(run: Run) -> tuple[float, float] | None:
    """Returns the smallest and largest power of two that work for the last ranges; None where there are none."""
    if run.ranges is None or any(each.nonfinite for each in run.ranges.half):
        return None
    return run.ranges.working_scales(precision(run.ranges))


def _restless(run: Run) -> Iterator[str]:
    half = (run.history.first + run.steps) // 2
    late = [change for change in run.history.overflows() if change.step >= half]
    if len(late) >= _DESCENT and len(late) > _SETTLED * (run.steps - half):
        worst = run.guilty.most_common(1)[0][0]
        yield (
            f"The scale never settled: {len(late)} of the last {run.steps - half:,} steps overflowed. Raise "
            f"`growth_interval` (`tfmixed simulate` shows what that does), or put the layer of `{worst}` in float32."
        )


def _constant(run: Run) -> Iterator[str]:
    if run.begin and run.begin.rule.get("rule") == "ConstantScale" and run.skipped:
        yield f"The constant scale {short(run.final_scale)} overflowed in {run.skipped:,} steps: choose a lower one."


def _scale(run: Run) -> Iterator[str]:
    if run.ranges is None or not any(each.nonzeros for each in run.ranges.half):
        return
    of, scale, held = run.ranges, run.measured_at, precision(run.ranges)
    works = _working(run)
    if works is None:
        yield f"{held}: {of.verdict(held)}"
    elif scale > works[1]:
        yield f"The scale used, {short(scale)}, is too high for the last snapshot: at most {short(works[1])} works."
    elif scale < works[0]:
        yield f"The scale used, {short(scale)}, is too low for the smallest gradients: {_higher(run, works[0], held)}."


def _higher(run: Run, needed: float, held: str) -> str:
    """Returns how to come to a scale that the smallest gradients need."""
    assert run.ranges is not None
    first = min(run.history.overflows(), key=lambda change: change.old_scale, default=None)
    if first is not None and first.old_scale <= needed:
        name, scale = first.variable or "some gradient", short(first.old_scale)
        return f"they need {short(needed)}, and `{name}` overflowed at {scale}. Put its layer in float32, or clip it"
    start = run.ranges.suggest_constant_scale(precision=held)
    return f"start from {short(start)}, or let the scale grow sooner (`growth_interval`)"


def _capacity(run: Run) -> Iterator[str]:
    if run.lost:
        changes = f"{run.lost:,} scale {_s('change', run.lost)}"
        yield f"{changes} were lost before the log was written: raise `event_capacity`, or collect with `every=`."


def _s(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
