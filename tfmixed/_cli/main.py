"""The command `tfmixed`. Each command imports what it needs when it runs: `--help` loads no framework."""

from __future__ import annotations

import contextlib
import dis
import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import tfmixed
from tfmixed._cli import log_commands
from tfmixed._cli.run import command as running
from tfmixed.errors import ConfigError, UsageError

_OURS = f"{Path(__file__).parent}{os.sep}"
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

_Policy = Annotated[str | None, typer.Option(help="Dtype policy to make the model under, such as mixed_float16.")]


def main() -> None:
    """Runs the command line; what the user can mend is one line on standard error, and exit code 2."""
    try:
        with _flushed():
            app()
    except (UsageError, ConfigError) as error:
        with contextlib.suppress(OSError):  # closed by code of the user
            print(f"tfmixed: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Ends a command only when its output is written, and with one line where it cannot be."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed by whoever called
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITTEN:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter tries again as it ends
        raise UsageError(f"Standard output must be open and have space. Received: {error.strerror}.") from error


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
    as_json: log_commands.AsJson = False,
) -> None:
    """What this machine is, which policy fits it, and what makes mixed precision useless on it."""
    with _on_models():
        from tfmixed._cli.load_model import load_model
        from tfmixed.doctor.diagnosis import examine

        if measure:
            print("tfmixed: measuring, for some 10 seconds", file=sys.stderr)
        diagnosis = examine(load_model(model) if model is not None else None, measure)
    print(diagnosis.to_json()) if as_json else _print(diagnosis)


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(help="module:function that returns model (, inputs, targets) or model, data; or a .keras file."),
    ],
    policy: _Policy = None,
    fail_on: Annotated[
        Literal["severe", "warning", "note", "never"],
        typer.Option(help="Exit with 1 for such findings and graver ones."),
    ] = "severe",
    as_json: log_commands.AsJson = False,
) -> None:
    """What in a model's forward and backward pass is unsafe in half precision; inputs, if given, run through it."""
    with _on_models():
        from tfmixed._cli.load_model import load_step
        from tfmixed._utils.model_building import first_batch

        _set_policy(policy)
        made, *data = load_step(model)
        found = tfmixed.audit(made, *first_batch(*data))
    print(found.to_json()) if as_json else _print(found)
    raise typer.Exit(found.fails(fail_on))


@app.command()
def ranges(
    model: Annotated[
        str, typer.Argument(help="module:function that returns a compiled model, inputs and targets (or model, data).")
    ],
    steps: Annotated[int, typer.Option(min=1, help="How many batches.")] = 10,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a batch, of arrays. Default: 32.")] = None,
    policy: _Policy = None,
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="float32: the true gradients. Half precision: those that come out in it."),
    ] = "float32",
    headroom: Annotated[float, typer.Option(min=1.0, help="How many times larger gradients may become.")] = 2.0,
    save: Annotated[Path | None, typer.Option(help="Write the counts, as a line of JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture, before and after scaling.")] = None,
    as_json: log_commands.AsJson = False,
) -> None:
    """The magnitudes of a model's gradients, what float16 loses of them, and which loss scale to choose."""
    with _on_models():
        from tfmixed._cli.load_model import load_training

        _check_picture(png)
        for option, path in (("--save", save), ("--png", png)):
            log_commands.prepare(option, path)
        _set_policy(policy)
        found = tfmixed.measure_gradients(*load_training(model), steps, precision=precision, batch_size=batch)
    print(json.dumps(found.as_dict(headroom), indent=2)) if as_json else _print(found.explained(headroom))
    if save is not None:
        found.save(save)
    if png is not None:
        from tfmixed import plotting

        plotting.save(found.plot(found.suggested(headroom) or 1.0), png)


@app.command()
def bench(
    networks: Annotated[
        list[str] | None, typer.Argument(help="mlp, cnn, transformer, depthwise. Default: all of them.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Your own: module:function that returns compiled model, inputs, targets."),
    ] = None,
    policy: Annotated[str, typer.Option(help="Half-precision policy. auto: what this machine is fast in.")] = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step. Default: the network's own, or 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.001, help="Length of a turn.")] = 1.0,
    memory: Annotated[
        float, typer.Option(min=0, help="GiB, for the batch that fits. 0 measures no memory: two processes a row.")
    ] = 8.0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the times, .png or .svg.")] = None,
    as_json: log_commands.AsJson = False,
) -> None:
    """Trains in float32, in Keras's mixed precision and in ours, by turns: time, memory and loss, side by side."""
    # Memory is measured in processes beside this one: none of them may take the whole GPU for itself.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with _on_models():
        from tfmixed._cli import bench as benchmark

        _check_picture(plot)
        log_commands.prepare("--plot", plot)
        cases = [*(networks or ()), *(model or ())] or benchmark.NETWORKS
        report = benchmark.run(cases, policy, batch=batch, rounds=rounds, seconds=seconds, memory=memory or None)
    print(json.dumps(report.as_dict(), indent=2)) if as_json else _print(report)
    if plot is not None:
        from tfmixed import plotting

        plotting.save(plotting.plot_times(report.times(), f"{report.policy} on {report.device}"), plot)


app.command()(log_commands.report)
app.command()(log_commands.simulate)
app.command(context_settings=running.SETTINGS)(running.run)


@contextlib.contextmanager
def _on_models() -> Iterator[None]:
    """Loads Keras, and ends the command with exit code 2 if code that it runs fails: 1 is for findings, 0 for none.

    What that code prints goes to standard error, where it does not mix with JSON.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _load_keras()
            yield
        except (UsageError, ConfigError, KeyboardInterrupt):
            raise
        except SystemExit as stop:
            raise UsageError(f"The code of the model must not exit. Received: sys.exit({stop.code!r})") from None
        except BaseException as error:
            if _is_refusal(error):
                raise UsageError(str(error)) from error
            traceback.print_exc()
            message = str(error).strip().partition("\n")[0]
            raise UsageError(f"The command failed. Received: {type(error).__name__}: {message}") from None


def _is_refusal(error: BaseException) -> bool:
    """Returns whether a check of this package raised the error, and no code that it called.

    Keras removes its own frames: an error of it can seem to come from ours, but from a call there and no `raise`.
    """
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None or error.__cause__ is not None or not isinstance(error, (ValueError, NotImplementedError)):
        return False
    code = innermost.tb_frame.f_code
    return code.co_filename.startswith(_OURS) and code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _set_policy(policy: str | None) -> None:
    try:
        if policy is not None:
            tfmixed.set_policy(policy, promote=False)  # models are looked at as Keras alone makes them
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_picture(path: Path | None) -> None:
    """Refuses what could not be written, before anything is measured."""
    if path is None:
        return
    try:
        from tfmixed import plotting

        plotting.format_of(path)
    except ImportError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:
        raise UsageError(f"plot: {error}") from error


def _load_keras() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import keras  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Keras cannot load its backend ({error}): install it, for instance by pip install 'tfmixed[tensorflow]', "
            "or name another in KERAS_BACKEND"
        ) from error
