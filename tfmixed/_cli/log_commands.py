"""Commands that read logs: `report` and `simulate`. They import no framework, and matplotlib only for plots."""

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

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Log of LossScaleLogger, or a folder with one.")],
    run_b: Annotated[Path | None, typer.Argument(metavar="RUN_B", help="Second log, for comparison.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the plots to a .png file.")] = None,
) -> None:
    """Report the loss scale, skipped steps and gradient ranges of a run, with advice."""
    from tfmixed.report import Report, read

    for path, suffix in ((html, ".html"), (png, ".png")):
        check_plot(f"--{suffix[1:]}", path, suffix)
    paths = [path for path in (run, run_b) if path is not None]
    result = Report([read(path) for path in paths])
    for path, loaded in zip(paths, result.runs, strict=True):
        if not loaded.log:
            raise UsageError(f"RUN must be a log of LossScaleLogger. Received: {str(path)!r} ({loaded.problems[0]}).")
    from tfmixed._utils import rich_text

    rich_text.console().print(result)
    for path, suffix in ((html, ".html"), (png, ".png")):
        prepare(f"--{suffix[1:]}", path)
    with _usage_errors():
        if html is not None:
            result.save_page(html)
        if png is not None:
            result.save_picture(png)


def simulate(
    rule: Annotated[
        list[str],
        typer.Option(help="dynamic, dynamic:growth_interval=500,hysteresis=2, 1024, torch, apex:... Can be repeated."),
    ],
    trace: Annotated[
        str, typer.Option(help="Log, text file of T (finite) and F (overflow), or the letters themselves.")
    ],
    png: Annotated[Path | None, typer.Option(help="Write a plot to a .png file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate scaling rules on the recorded overflows of a run."""
    from tfmixed.scaling.replay import parse, replay

    check_plot("--png", png, ".png")
    with _usage_errors():
        recorded = _read_trace(trace)
        outcomes = {text: replay(parse(text), recorded) for text in rule}
        if png is not None:
            from tfmixed import plotting

            scales = {text: outcome.scales for text, outcome in outcomes.items()}
            skipped = {text: outcome.skipped for text, outcome in outcomes.items()}
            plotting.save(plotting.plot_simulations(scales, skipped), png)
    if as_json:
        rules = [{"name": text, **outcome.as_dict()} for text, outcome in outcomes.items()]
        print(
            json.dumps({"steps": len(recorded.finite), "unlisted_skips": recorded.unlisted, "rules": rules}, indent=2)
        )
        return
    from tfmixed._utils import rich_text

    console = rich_text.console()
    console.print(_table(outcomes, recorded))
    for sentence in _caveats(outcomes, recorded):
        console.print(sentence, markup=False, highlight=False)


def check_plot(option: str, path: Path | None, suffix: str | None = None) -> None:
    """Checks a file with plots before any work starts: its suffix, or that matplotlib has a format of that name."""
    if path is None:
        return
    if suffix is not None and path.suffix.lower() != suffix:
        raise UsageError(f"{option} must be a path that ends in {suffix}. Received: {str(path)!r}.")
    try:
        import matplotlib  # noqa: F401  # only to see that it is installed

        if suffix is None:
            from tfmixed import plotting

            plotting.format_of(path)
    except ValueError as error:
        raise UsageError(f"The plot cannot be written: {error}") from error
    except ImportError as error:
        raise UsageError(f"{option} needs matplotlib ({error}): pip install 'tfmixed[plot]'") from error


def prepare(option: str, path: Path | None) -> None:
    """Creates the folder of an output file, and checks that the file can be written, before work starts."""
    try:
        if path is not None:
            atomic_write.prepare(path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{option} must be a file that can be written. Received: {str(path)!r} ({reason}).") from error


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turns errors about arguments and files into one-line messages."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _read_trace(source: str) -> Trace:
    """Returns the trace in a log, in a text file, or given as letters."""
    from tfmixed import records
    from tfmixed.report import read
    from tfmixed.scaling.replay import Trace

    if not set("".join(source.split())) - {"T", "F"}:
        return Trace.of_letters(source)
    path = Path(source)
    if not os.path.exists(path):  # False for impossible names, where Path.exists raises
        short = source if len(source) <= 60 else f"{source[:40]}... ({len(source):,} letters)"
        wrong = next(letter for letter in source if letter not in "TF" and not letter.isspace())
        raise UsageError(
            f"--trace must be a log, a text file of T and F, or the letters themselves. Received: {short!r}, which "
            f"contains {wrong!r}."
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
    """Yields the assumptions behind the numbers."""
    if trace.scales is None:
        yield "A step is finite or overflows as its letter says, at any scale."
        return
    yield (
        "A step that overflowed in the log overflows at its scale and above. All other steps are finite at any scale. "
        'Steps "beyond the log" are at a higher scale than in the log, where some may have overflowed.'
    )
    if avoided := max(outcome.below for outcome in outcomes.values()):
        yield f"Up to {avoided:,} steps that overflowed in the log are finite here, at a lower scale."
    if trace.unlisted:
        yield f"{trace.unlisted:,} skipped steps are not in the log, since they kept the scale. They count as finite."
    if unknown := sum(scale is None for scale in trace.scales):
        yield f"The log does not contain the scale of {unknown:,} steps."
