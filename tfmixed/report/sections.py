"""Content of a report, independent of its output: sections of sentences, tables and keys of figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tfmixed._probe.rounding_model import losses, percent, update_lost, weight_format
from tfmixed.ranges import GradientRanges, share_of_zeros, span
from tfmixed.records import RangesRecord, RunRecord, short
from tfmixed.report import advice
from tfmixed.report.loading import Run


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells. The columns after the first `left` ones hold numbers."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1


@dataclass(frozen=True)
class Part:
    """The content of one run in a section.

    Args:
        sentences: Sentences, a point each.
        table: A table. None if there is nothing to list.
        figures: Keys of `figures.FIGURES`.
    """

    sentences: list[str] = field(default_factory=list)
    table: Table | None = None
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A title, and one part per run, or one part for all runs."""

    title: str
    parts: list[Part]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Returns the whole report, sentences first."""
    found = {
        "What happened": [Part(advice.happened(run)) for run in runs],
        "What to change": [Part(advice.advice(run) or ["Nothing that this log shows."]) for run in runs],
        "What is missing": [Part(list(run.problems) or ["Nothing: the log is complete."]) for run in runs],
        "Loss scale": [_scale(run) for run in runs],
        "Skipped steps": [_skipped(run) for run in runs],
        "Gradient ranges": [_ranges(run) for run in runs],
        "Gradient fidelity": [_fidelity(run) for run in runs],
        "Hardware": [_side_by_side(runs, lambda begin: {f"device {n}": name for n, name in enumerate(begin.devices)})],
        "Configuration": [_side_by_side(runs, _configuration)],
        "Versions": [_side_by_side(runs, lambda begin: begin.versions)],
    }
    if not any(run.problems for run in runs):
        del found["What is missing"]
    if not any(run.fidelity for run in runs):
        del found["Gradient fidelity"]
    return [Section(title, parts) for title, parts in found.items()]


def figure_keys(run: Run) -> tuple[str, ...]:
    """Returns the keys of all figures of a run."""
    return _scale(run).figures + _ranges(run).figures


def _scale(run: Run) -> Part:
    history = run.history
    if not run.log:
        return Part(["No records."], None, ("scale",))
    scales = history.points()[1]
    rows = [
        ("first", short(history.initial_scale)),
        ("last", short(run.final_scale)),
        ("lowest", short(min(scales))),
        ("highest", short(max(scales))),
        ("backoffs after an overflow", f"{len(history.overflows()):,}"),
        ("growths", f"{len(history.because('growth')):,}"),
        ("set by hand or by statistics", f"{len(history.because('set')):,}"),
        ("changes lost", f"{run.lost:,}"),
    ]
    return Part([], Table(("loss scale", ""), rows), ("scale",))


def _skipped(run: Run) -> Part:
    overflows = run.history.overflows()
    if not overflows:
        return Part(["No overflow changed the scale."])
    rows = []
    for name, count in run.overflow_counts.most_common():
        changes = [change for change in overflows if (change.variable or "unknown") == name]
        low, high = (short(extreme(change.old_scale for change in changes)) for extreme in (min, max))
        reach = low if low == high else f"{low} .. {high}"
        steps = f"{changes[0].step:,}", f"{changes[-1].step:,}"
        rows.append((name, f"{count:,}", percent(count / len(overflows)), *steps, reach))
    return Part([], Table(("first to overflow", "times", "share", "first step", "last step", "at scale"), rows))


def _ranges(run: Run) -> Part:
    if run.ranges is None:
        return Part(["No gradient ranges in this log."])
    held, scale, record = advice.precision(run.ranges), run.measured_at, run.ranges.record
    batches = f"{record.batches:,} {'batch' if record.batches == 1 else 'batches'}"
    dtypes = {gradient.dtype for gradient in run.ranges}
    common = f" all held in {dtypes.pop()}," if len(dtypes) == 1 else ""
    sentence = (
        f"{len(run.ranges)} gradients,{common} measured in {record.precision} over {batches}. To 0, subnormal "
        f"and overflow: the shares that {held} flushes to 0, makes subnormal and makes infinite at loss scale "
        f"{short(scale)}."
    )
    over_time = ("timeline",) if len(run.all(RangesRecord)) > 1 else ()
    updates = []
    if any(gradient.updates for gradient in run.ranges):
        weights = weight_format(run.ranges)
        would = "discards" if any(gradient.rounded_to for gradient in run.ranges) else "would discard"
        updates = [f"Update lost: the share of a variable's update that rounding weights to {weights} {would}."]
    return Part([sentence, *updates], _lost(run.ranges, scale, held, bool(common)), ("ranges", "layers", *over_time))


def _fidelity(run: Run) -> Part:
    if run.fidelity is None:
        return Part(["No comparison with float32 in this log. The callback GradientFidelity writes one."])
    step = run.fidelity.record.step
    when = "" if step is None else f"Measured before step {step:,}. "
    return Part([f"{when}{run.fidelity.summary()}"], Table(run.fidelity.headings, run.fidelity.rows(), left=2))


def _lost(ranges: GradientRanges, scale: float, held: str, common: bool) -> Table:
    """Returns a table of all gradients, those with the largest losses first. Gradients in float32 lose nothing."""
    weights = weight_format(ranges)
    update = [f"update lost, {weights}"] if any(gradient.updates for gradient in ranges) else []
    half, rows = {id(gradient) for gradient in ranges.half}, []
    for gradient in ranges:
        shares, badness = ["", "", ""], (-1.0, 0.0)
        if id(gradient) in half:
            lost = losses(gradient.octaves, scale, held)
            shares = lost.percentages()
            badness = lost.share(lost.zero + lost.overflow), lost.share(lost.subnormal)
        name = gradient.name if gradient.kind == "weight" else f"{gradient.name} ({gradient.kind})"
        name += " (rounding noise)" if gradient.noise else ""
        names = (name,) if common else (name, gradient.dtype)
        rows.append(
            (
                badness,
                (
                    *names,
                    span(gradient),
                    percent(share_of_zeros(gradient)),
                    *shares,
                    *[update_lost(gradient, weights)][: len(update)],
                ),
            )
        )
    rows.sort(key=lambda row: row[0], reverse=True)
    dtype = () if common else ("held in",)
    headings = ("gradient of", *dtype, "magnitudes", "zeros", "to 0", "subnormal", "overflow", *update)
    return Table(headings, [row for _, row in rows], left=1 + len(dtype))


def _configuration(begin: RunRecord) -> dict[str, str]:
    names = {"model": begin.model or "unknown", "policy": begin.policy, "optimizer": begin.optimizer or "unknown"}
    return {**names, **{name: _formatted(name, value) for name, value in begin.rule.items()}, "started": begin.started}


def _formatted(name: str, value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return short(value) if name.endswith(("scale", "value")) else f"{value:g}"
    return str(value)


def _side_by_side(runs: Sequence[Run], facts: Callable[[RunRecord], dict[str, str]]) -> Part:
    """Returns a table of facts about the runs, one column per run."""
    known = [facts(run.begin) if run.begin else {} for run in runs]
    names = list(dict.fromkeys(name for values in known for name in values))
    if not names:
        return Part(["Unknown: the log does not say."])
    rows = [(name, *(values.get(name, "-") for values in known)) for name in names]
    headings: tuple[str, ...] = ("", *(run.name for run in runs))
    if len(runs) > 1:
        headings = (*headings, "")
        rows = [(*row, "differs" if len({*row[1:]}) > 1 else "") for row in rows]
    return Part([], Table(headings, rows, left=2 + len(runs)))
