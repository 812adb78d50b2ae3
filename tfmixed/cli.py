"""The command `tfmixed`. Each command imports what it needs when it runs: `--help` loads no framework."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated

import typer

import tfmixed
from tfmixed.errors import ConfigError, UsageError

_GREETING = re.compile(rb"I0000 .* oneDNN custom operations are on|WARNING: All log messages before absl")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """Runs the command line; what the user can mend is one line on standard error, and exit code 2."""
    try:
        app()
    except (UsageError, ConfigError) as error:
        print(f"tfmixed: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(tfmixed.__version__)
        raise typer.Exit


@app.callback()
def tfmixed_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixed-precision training for TensorFlow and Keras 3."""


@app.command()
def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure TFLOP/s and memory bandwidth: seconds.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Look at a model: module:function, or a .keras file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")] = False,
) -> None:
    """What this machine is, which policy fits it, and what makes mixed precision useless on it."""
    # What Keras or the model's own module prints must not mix with JSON.
    with contextlib.redirect_stdout(sys.stderr):
        _load_keras()
        from tfmixed.doctor import examine
        from tfmixed.models import load_model

        if measure:
            print("tfmixed: measuring, for some 10 seconds", file=sys.stderr)
        diagnosis = examine(load_model(model) if model is not None else None, measure)
    if as_json:
        print(diagnosis.to_json())
    else:
        from rich.console import Console

        Console().print(diagnosis)


def _load_keras() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _without_greeting():
            import keras  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Keras cannot load its backend ({error}): install it, for instance by pip install 'tfmixed[tensorflow]', "
            "or name another in KERAS_BACKEND"
        ) from error


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """Drops what TensorFlow 2.21 logs at import before it reads TF_CPP_MIN_LOG_LEVEL, and passes on the rest."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not _GREETING.match(line)))
