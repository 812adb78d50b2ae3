"""The `run` command: checks its options, and replaces this process by Python with the script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tfmixed._cli.run.options import VARIABLE, RunOptions
from tfmixed.errors import UsageError

SETTINGS = {"allow_interspersed_args": False}  # arguments after the script belong to the script
_HOOK = str(Path(__file__).parent / "start_hook")


def run(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="Python file, or folder with a __main__.py. With -m: a module.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="Arguments passed to the script.")
    ] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="Run SCRIPT as a module, as python -m does.")] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file that sets policy, scale and logging.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Dtype policy. Default: auto, the fastest policy for this hardware.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="dynamic, 1024, dynamic:growth_interval=500, torch, none. Default: dynamic under float16."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Keep bfloat16 weights: stochastic, split or nearest. Default policy then: bfloat16."),
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(help="Optimizer states with --weights: float32, bfloat16 or int8. Default: bfloat16."),
    ] = None,
    islands: Annotated[
        bool, typer.Option("--islands/--no-islands", help="Compute sensitive layers in float32.")
    ] = True,
    promote: Annotated[
        bool, typer.Option("--promote/--no-promote", help="Pass float32 to the script and to custom layers.")
    ] = True,
    float32_sums: Annotated[
        bool, typer.Option("--float32-sums/--no-float32-sums", help="Sum bias and embedding gradients in float32.")
    ] = True,
    log_dir: Annotated[Path | None, typer.Option(help="Folder of log and report. Default: runs/SCRIPT.")] = None,
    tf1: Annotated[bool, typer.Option("--tf1", help="Run a script of TensorFlow 1.")] = False,
) -> None:
    """Run an unchanged Keras script with a dtype policy, loss scaling, float32 islands and a log."""
    if not module and not os.path.exists(script):
        raise UsageError(f"SCRIPT must be a Python file. Received: {script!r}, which does not exist.")
    folder = log_dir or Path("runs", _name(script, module))
    config_file = None if config is None else str(config)
    options = RunOptions(
        str(folder),
        log_dir is not None,
        config_file,
        policy,
        scale,
        weights,
        states,
        islands=islands,
        promote=promote,
        float32_sums=float32_sums,
        tf1=tf1,
    )
    options.check()
    _execute([*(["-m"] if module else []), script, *(arguments or ())], options)


def _name(script: str, is_module: bool) -> str:
    path = Path(script).resolve()
    return script if is_module else path.stem if path.is_file() else path.name


def _execute(arguments: list[str], options: RunOptions) -> None:
    """Replaces this process by Python, so that signals, terminal and exit code are the script's own."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise UsageError("tfmixed run cannot start under python -E, -I or -S, which disable its start-up hook.")
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    command = [sys.executable, *flags, *arguments]
    path = os.pathsep.join([_HOOK, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, VARIABLE: options.to_json()}
    if os.name == "nt":  # where exec returns to the shell at once
        raise typer.Exit(subprocess.call(command, env=environment))
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
