"""The commands that read logs, `report` and `simulate`: they load no framework, and matplotlib only to draw."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfmixed._utils import atomic_write
from tfmixed.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from tfmixed.scaling.replay import Outcome, Trace

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A log of LossScaleLogger, or a folder that holds one.")],
    run_b: Annotated[Path | None, typer.Argument(metavar="[RUN_B]", help="Another one, to lay beside it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page that needs no network.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the pictures.")] = None,
) -> None:
    """What a run lost to half precision, and what to change: its scale, skipped steps and gradient ranges."""
    from tfmixed.report import Report, read

    for path, suffix in ((html, ".html"), (png, ".png")):
        _check(path, suffix)
    made = Report([read(path) for path in (run, run_b) if path is not None])
    for path, each in zip((run, run_b), made.runs, strict=False):
        if not each.log:
            raise UsageError(f"RUN must be a log of LossScaleLogger, received {str(path)!r}: {each.problems[0]}")
    from rich.console import Console

    Console().print(made)
    for path, suffix in ((html, ".html"), (png, ".png")):
        prepare(f"--{suffix[1:]}", path)
    with _mendable():
        if html is not None:
            made.save_page(html)
        if png is not None:
            made.save_picture(png)


def simulate(
    rule: Annotated[
        list[str],
        typer.Option(help="dynamic, dynamic:growth_interval=500,hysteresis=2, 1024, torch, apex:... Several: repeat."),
    ],
    trace: Annotated[str, typer.Option(help="A log, a file of T and F, or these letters: T finite, F overflow.")],
    png: Annotated[Path | None, typer.Option(help="Write a picture, .png.")] = None,
    as_json: AsJson = False,
) -> None:
    """What rules would have done on a recorded trace of overflows, side by side."""
    from tfmixed.scaling.replay import parse, replay

    _check(png, ".png")
    with _mendable():
        recorded = _trace(trace)
        outcomes = {text: replay(parse(text), recorded) for text in rule}
        if png is not None:
            _draw(outcomes, png)
    if as_json:
        rules = [{"name": text, **outcome.as_dict()} for text, outcome in outcomes.items()]
        told = {"steps": len(recorded.finite), "unlisted_skips": recorded.unlisted, "rules": rules}
        print(json.dumps(told, indent=2))
    else:
        _print(outcomes, recorded)


def _draw(outcomes: dict[str, Outcome], png: Path) -> None:
    from tfmixed import plotting

    scales = {text: outcome.scales for text, outcome in outcomes.items()}
    skipped = {text: outcome.skipped for text, outcome in outcomes.items()}
    plotting.save(plotting.plot_simulations(scales, skipped), png)


def _print(outcomes: dict[str, Outcome], recorded: Trace) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(outcomes, recorded))
    for sentence in _caveats(outcomes, recorded):
        console.print(sentence, markup=False, highlight=False)


def _check(path: Path | None, suffix: str) -> None:
    """Refuses a file that could not be written, before anything is read."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise UsageError(f"--{suffix[1:]} must be a path that ends in {suffix}, received {str(path)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--{suffix[1:]} needs matplotlib ({error}): pip install 'tfmixed[plot]'") from error


def prepare(option: str, path: Path | None) -> None:
    """Refuses a file that could not be written, before any is, and makes its folder."""
    try:
        if path is not None:
            atomic_write.prepare(path)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{option} must be a file that can be written, received {str(path)!r}: {why}") from error


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _trace(source: str) -> Trace:
    """Returns the trace that a path or letters mean."""
    from tfmixed import records
    from tfmixed.report import read
    from tfmixed.scaling.replay import Trace

    if not set("".join(source.split())) - {"T", "F"}:
        return Trace.of_letters(source)
    path = Path(source)
    if not os.path.exists(path):  # False for what no path can be, where Path.exists raises
        short = source if len(source) <= 60 else f"{source[:40]}... ({len(source):,} letters)"
        wrong = next(letter for letter in source if letter not in "TF" and not letter.isspace())
        raise UsageError(
            f"trace must be a log, a file of T and F, or such letters, received {short!r}, which holds {wrong!r}"
        )
    if path.is_file():
        text = records.json_lines.text_of(path)
        if "{" not in text[:1000]:
            return Trace.of_letters(text)
    return Trace.of_log(read(path).log)


def _table(outcomes: dict[str, Outcome], trace: Trace) -> Table:
    from rich import box
    from rich.table import Table

    from tfmixed._probe.rounding_model import percent
    from tfmixed.records import short

    beyond = ("beyond\nthe log",) if trace.scales else ()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{len(trace.finite):,} steps", title_justify="left")
    table.add_column("rule", overflow="fold")
    for heading in ("final\nscale", "skipped\nsteps", "share", "lowest", "highest", "mean\nlog2", *beyond):
        table.add_column(heading, justify="right", no_wrap=True)
    for text, outcome in outcomes.items():
        row = outcome.as_dict()
        scales = [short(row[name]) for name in ("final_scale", "lowest_scale", "highest_scale")]
        share, mean = percent(row["share_skipped"]), f"{row['mean_log2_scale']:.2f}"
        counts = [f"{outcome.above:,}" for _ in beyond]
        table.add_row(text, scales[0], f"{len(outcome.skipped):,}", share, *scales[1:], mean, *counts)
    return table


def _caveats(outcomes: dict[str, Outcome], trace: Trace) -> Iterator[str]:
    """Yields what the numbers rest on."""
    if trace.scales is None:
        yield "Each step goes as its letter says, whatever the scale."
        return
    yield (
        "A step that overflowed is taken to overflow at its scale and above, and to pass below; all others pass. Steps "
        "beyond the log passed at a scale at which the log did not see them pass: some may have overflowed."
    )
    if avoided := max(outcome.below for outcome in outcomes.values()):
        yield f"Up to {avoided:,} steps pass here that overflowed at a higher scale in the log."
    if trace.unlisted:
        yield f"{trace.unlisted:,} skipped steps left the scale as it was, stand in no line, and count as passed."
    if unknown := sum(scale is None for scale in trace.scales):
        yield f"Of {unknown:,} steps the log does not know the scale."
