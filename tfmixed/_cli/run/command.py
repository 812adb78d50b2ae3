"""The command `run`. It checks what it is given; what it returns runs when the command line is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tfmixed._utils import atomic_write
from tfmixed.errors import UsageError


class Ready(BaseException):
    """Leaves the command line with what is to run: click would catch some of what a script raises.

    Args:
        start: Runs the script.
    """

    def __init__(self, start: Callable[[], None]) -> None:
        self.start = start
        super().__init__()


# Everything after the script is the script's.
SETTINGS = {"allow_interspersed_args": False}


def run(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="A Python file, or a folder with a __main__.py; with -m, a module.")
    ],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="The script's own.")] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module, as after python -m.")] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file that says policy, scale and logging.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Dtype policy. Default: auto, what this machine is fast in.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="dynamic, 1024, dynamic:growth_interval=500, torch, none. Default: dynamic under float16."),
    ] = None,
    islands: Annotated[
        bool, typer.Option("--islands/--no-islands", help="Make the sensitive layers compute in float32.")
    ] = True,
    promote: Annotated[
        bool, typer.Option("--promote/--no-promote", help="Give the script and its custom layers float32.")
    ] = True,
    log_dir: Annotated[Path | None, typer.Option(help="Folder of log and report. Default: runs/SCRIPT.")] = None,
    tf1: Annotated[bool, typer.Option("--tf1", help="The script is one of TensorFlow 1.")] = False,
) -> None:
    """Runs an unchanged Keras script with policy, loss scaling, float32 islands and a log applied to it."""
    from tfmixed._cli.run import wishes
    from tfmixed._cli.run.launch import Launch
    from tfmixed._cli.run.script import Script
    from tfmixed._cli.run.tf1 import Launch1

    if tf1:
        _refuse_beside_tf1(config, policy, scale, islands, promote, log_dir)
    job = Script(script, tuple(arguments or ()), module)
    job.check()
    if log_dir is not None:
        _check_folder(log_dir)
    folder = log_dir or Path("runs", job.name)
    wish = wishes.of_options(folder, config, policy, None if tf1 else scale, islands, resumes=log_dir is not None)
    launch = Launch1(wish) if tf1 else Launch(dataclasses.replace(wish, promote=promote))
    raise Ready(lambda: job.run(launch.prepare, launch.finish))


def _check_folder(log_dir: Path) -> None:
    from tfmixed._cli.run import ledger

    try:
        atomic_write.prepare(log_dir / "loss_scale.jsonl")
    except OSError as error:
        raise UsageError(ledger.unwritable(log_dir, error)) from None


def _refuse_beside_tf1(
    config: Path | None, policy: str | None, scale: str | None, islands: bool, promote: bool, log_dir: Path | None
) -> None:
    """Refuses what is for Keras's models."""
    off = {"--no-islands": None if islands else True, "--no-promote": None if promote else True}
    given = {"--config": config, **off, "--log-dir": log_dir}
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} is for Keras's models, and --tf1 for scripts of TensorFlow 1: leave one out")
    if policy == "float64":
        raise UsageError("--policy must not be float64 with --tf1, whose rewrite converts to half precision or nothing")
    if scale not in (None, "dynamic"):
        raise UsageError(
            f"--scale must be dynamic with --tf1, received {scale!r}: another one stands in the script's own "
            "enable_mixed_precision_graph_rewrite(opt, loss_scale)"
        )
