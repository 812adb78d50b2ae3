"""What stands in a report, whatever it is printed on: sections of sentences, tables and names of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tfmixed._probe.rounding_model import losses, percent
from tfmixed.ranges import GradientRanges, share_of_zeros, span
from tfmixed.records import RangesRecord, RunRecord, short
from tfmixed.report import advice
from tfmixed.report.loading import Run


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells; those after the first `left` ones hold numbers."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1


@dataclass(frozen=True)
class Part:
    """What one run has to say in a section.

    Args:
        sentences: Each a point of its own.
        table: None where there is nothing to list.
        pictures: Their keys in `pictures.PICTURES`.
    """

    sentences: list[str] = field(default_factory=list)
    table: Table | None = None
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, and a part for each run, or one for all of them."""

    title: str
    parts: list[Part]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Returns the whole report: words first."""
    each: dict[str, Callable[[Run], Part]] = {
        "What happened": lambda run: Part(advice.happened(run)),
        "What to change": lambda run: Part(advice.advice(run) or ["Nothing that this log shows."]),
        "What is missing": lambda run: Part(list(run.problems) or ["Nothing: the log is whole."]),
        "Loss scale": _scale,
        "Skipped steps": _skipped,
        "Gradient ranges": _ranges,
    }
    told = [Section(title, [part(run) for run in runs]) for title, part in each.items()]
    if not any(run.problems for run in runs):
        told = [section for section in told if section.title != "What is missing"]
    return [*told, *_facts(runs)]


def picture_keys(run: Run) -> tuple[str, ...]:
    """Returns the keys of all pictures of a run."""
    return _scale(run).pictures + _ranges(run).pictures


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
    for name, count in run.guilty.most_common():
        of = [change for change in overflows if (change.variable or "unknown") == name]
        scales = sorted({change.old_scale for change in of})
        reach = short(scales[0]) if len(scales) == 1 else f"{short(scales[0])} .. {short(scales[-1])}"
        rows.append((name, f"{count:,}", percent(count / len(overflows)), f"{of[0].step:,}", f"{of[-1].step:,}", reach))
    return Part([], Table(("first to overflow", "times", "share", "first step", "last step", "at scale"), rows))


def _ranges(run: Run) -> Part:
    if run.ranges is None:
        return Part(["No gradient ranges in this log."])
    held, scale, record = advice.precision(run.ranges), run.measured_at, run.ranges.record
    batches = f"{record.batches:,} {'batch' if record.batches == 1 else 'batches'}"
    dtypes = {each.dtype for each in run.ranges}
    alike = f" all of them held in {dtypes.pop()}," if len(dtypes) == 1 else ""
    sentence = (
        f"{len(run.ranges)} gradients,{alike} measured in {record.precision} over {batches}; what {held} flushes to 0, "
        f"makes subnormal and makes infinite at loss scale {short(scale)}, the worst first."
    )
    over_time = ("timeline",) if len(run.all(RangesRecord)) > 1 else ()
    return Part([sentence], _lost(run.ranges, scale, held, bool(alike)), ("ranges", "layers", *over_time))


def _lost(ranges: GradientRanges, scale: float, held: str, alike: bool) -> Table:
    counted, rows = ranges.half, []
    for each in ranges:
        counts, worst = ["", "", ""], (-1.0, 0.0)  # what is held in float32 loses nothing
        if any(each is one for one in counted):
            lost = losses(each.octaves, scale, held)
            counts = [percent(lost.share(count)) for count in (lost.zero, lost.subnormal, lost.overflow)]
            worst = lost.share(lost.zero + lost.overflow), lost.share(lost.subnormal)
        name = each.name if each.kind == "weight" else f"{each.name} ({each.kind})"
        name += " (rounding noise)" if each.noise else ""
        of = (name,) if alike else (name, each.dtype)
        rows.append((worst, (*of, span(each), percent(share_of_zeros(each)), *counts)))
    rows.sort(key=lambda row: row[0], reverse=True)
    held_in = () if alike else ("held in",)
    headings = ("gradient of", *held_in, "magnitudes", "zeros", "to 0", "subnormal", "overflow")
    return Table(headings, [row for _, row in rows], left=1 + len(held_in))


def _facts(runs: Sequence[Run]) -> list[Section]:
    """Returns what each run says of itself, in tables that have a column a run."""
    of: dict[str, Callable[[RunRecord], dict[str, str]]] = {
        "Hardware": lambda begin: {f"device {index}": name for index, name in enumerate(begin.devices)},
        "Configuration": _configuration,
        "Versions": lambda begin: begin.versions,
    }
    return [Section(title, [_side_by_side(runs, facts)]) for title, facts in of.items()]


def _configuration(begin: RunRecord) -> dict[str, str]:
    rule = {name: _told(name, value) for name, value in begin.rule.items()}
    own = {"model": begin.model or "unknown", "policy": begin.policy, "optimizer": begin.optimizer or "unknown"}
    return {**own, **rule, "started": begin.started}


def _told(name: str, value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return short(value) if name.endswith(("scale", "value")) else f"{value:g}"
    return str(value)


def _side_by_side(runs: Sequence[Run], facts: Callable[[RunRecord], dict[str, str]]) -> Part:
    known = [facts(run.begin) if run.begin else {} for run in runs]
    names = list(dict.fromkeys(name for each in known for name in each))
    if not names:
        return Part(["Unknown: the log does not say."])
    rows = [(name, *(each.get(name, "-") for each in known)) for name in names]
    differs = ("",) if len(runs) > 1 else ()
    marked = [(*row, *("differs" * (len({*row[1:]}) > 1) for _ in differs)) for row in rows]
    return Part([], Table(("", *(run.name for run in runs), *differs), marked, left=2 + len(runs)))
