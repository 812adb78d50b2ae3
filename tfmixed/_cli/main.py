"""The `tfmixed` command line. Commands import frameworks when they run, so `--help` is fast."""

from __future__ import annotations

import contextlib
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
from tfmixed._cli.run import command as run_command
from tfmixed.errors import ConfigError, UsageError

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

_Policy = Annotated[str | None, typer.Option(help="Dtype policy such as mixed_float16, set as Keras alone sets it.")]

_Training = Annotated[
    str,
    typer.Argument(help="module:function that returns a compiled model with inputs and targets, or with a dataset."),
]
_BatchSize = Annotated[int | None, typer.Option(min=1, help="Batch size of arrays. Default: 32.")]


def main() -> None:
    """Runs the command line. Usage errors are one line on standard error, with exit code 2."""
    try:
        with _flushed():
            app()
    except (UsageError, ConfigError) as error:
        with contextlib.suppress(OSError):  # the user's code has closed it
            print(f"tfmixed: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Flushes the output of a command, and raises a usage error if it cannot be written."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # the caller has closed it
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITTEN:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter flushes again at exit
        raise UsageError(f"Standard output cannot be written. Received: {error.strerror}.") from error


def _print_version(wanted: bool) -> None:
    if wanted:
        print(tfmixed.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixed-precision training for TensorFlow and Keras 3."""


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure TFLOP/s and memory bandwidth, in about 10 seconds.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Also check a model: module:function, or a .keras file.")
    ] = None,
    as_json: log_commands.AsJson = False,
) -> None:
    """Describe this hardware, the policy that fits it, and settings that make mixed precision ineffective."""
    with _on_models():
        from tfmixed._cli.load_model import load_model
        from tfmixed.doctor.diagnosis import examine

        if measure:
            print("tfmixed: measuring for about 10 seconds", file=sys.stderr)
        diagnosis = examine(load_model(model) if model is not None else None, measure)
    print(diagnosis.to_json()) if as_json else _print(diagnosis)


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            help="module:function that returns a model, alone or with inputs and targets (or data); or a .keras file."
        ),
    ],
    policy: _Policy = None,
    fail_on: Annotated[
        Literal["severe", "warning", "note", "never"],
        typer.Option(help="Lowest severity of findings that gives exit code 1."),
    ] = "severe",
    as_json: log_commands.AsJson = False,
) -> None:
    """Find operations of a model that are unsafe in half precision. Runs a step if inputs are given."""
    with _on_models():
        from tfmixed._cli.load_model import load_step
        from tfmixed._utils.model_building import first_batch

        _set_policy(policy)
        loaded, *data = load_step(model)
        result = tfmixed.audit(loaded, *first_batch(*data))
    print(result.to_json()) if as_json else _print(result)
    raise typer.Exit(result.fails(fail_on))


@app.command()
def ranges(
    model: _Training,
    steps: Annotated[int, typer.Option(min=1, help="Number of batches.")] = 10,
    batch: _BatchSize = None,
    policy: _Policy = None,
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="Precision of the gradients. float32 gives their true magnitudes."),
    ] = "float32",
    headroom: Annotated[float, typer.Option(min=1.0, help="Factor by which gradients may grow.")] = 2.0,
    save: Annotated[Path | None, typer.Option(help="Write the counts as a line of JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a plot of the gradients before and after scaling.")] = None,
    as_json: log_commands.AsJson = False,
) -> None:
    """Measure the magnitudes of a model's gradients, and suggest a loss scale."""
    with _on_models():
        from tfmixed._cli.load_model import load_training

        log_commands.check_plot("--png", png)
        for option, path in (("--save", save), ("--png", png)):
            log_commands.prepare(option, path)
        _set_policy(policy)
        result = tfmixed.measure_gradients(*load_training(model), steps, precision=precision, batch_size=batch)
    print(json.dumps(result.as_dict(headroom), indent=2)) if as_json else _print(result.explained(headroom))
    if save is not None:
        result.save(save)
    if png is not None:
        from tfmixed import plotting

        plotting.save(result.plot(result.suggested(headroom) or 1.0), png)


@app.command()
def fidelity(
    model: _Training,
    steps: Annotated[int, typer.Option(min=1, help="Number of batches.")] = 1,
    batch: _BatchSize = None,
    policy: Annotated[str | None, typer.Option(help="Dtype policy such as mixed_float16, set by set_policy.")] = None,
    float32_sums: Annotated[
        bool, typer.Option("--float32-sums/--no-float32-sums", help="Keep the float32 sums of set_policy.")
    ] = True,
    scale: Annotated[float | None, typer.Option(help="Loss scale. Default: that of the optimizer.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Number of rows, the worst first. Default: all.")] = None,
    as_json: log_commands.AsJson = False,
) -> None:
    """Compare the gradients of a model with float32. Exit code 1 if rounding does not explain an error."""
    with _on_models():
        from tfmixed._cli.load_model import load_training
        from tfmixed._islands import gradient_sums

        _set_policy(policy, as_keras=False)
        training = load_training(model)
        if not float32_sums:
            gradient_sums.switch(False, allowed=False)  # after the code of the model, which may set a policy
        result = tfmixed.gradient_fidelity(*training, steps, scale=scale, batch_size=batch)
    print(result.to_json()) if as_json else _print(result.explained(top))
    raise typer.Exit(bool(result.wrong))


@app.command()
def memory(
    model: _Training,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 32,
    budget: Annotated[
        float | None, typer.Option(metavar="GIB", help="Also find the largest batch size for so many GiB.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Dtype policy such as mixed_float16, set by set_policy.")] = None,
    options: Annotated[
        bool, typer.Option("--options/--no-options", help="Estimate what other policies and optimizers would save.")
    ] = True,
    as_json: log_commands.AsJson = False,
) -> None:
    """Predict the memory of training by purpose, and what other options save. Trains smaller batches in processes."""
    with _on_models():
        from tfmixed._cli.load_model import load_function
        from tfmixed.memory import estimate

        _set_policy(policy)  # refuses unknown ones before any work
        load_function(model)
        result = estimate(model, batch, policy=policy, budget=budget, options=options)
    print(result.to_json()) if as_json else _print(result)


@app.command()
def bench(
    networks: Annotated[
        list[str] | None, typer.Argument(help="mlp, cnn, transformer, depthwise, tabular. Default: all.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", help="Your own network: module:function that returns a compiled model, inputs and targets."
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="Half-precision policy. auto: the fastest for this hardware.")] = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size. Default: that of the network, or 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of measurements of each variant.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.001, help="Length of a measurement.")] = 1.0,
    peak: Annotated[bool, typer.Option("--peak/--no-peak", help="Measure peak memory, in further processes.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the times to a .png or .svg file.")] = None,
    as_json: log_commands.AsJson = False,
) -> None:
    """Compare time, memory and loss of training in float32, and in half precision with and without loss scaling."""
    # Memory is measured in further processes, so no process may allocate the whole GPU.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with _on_models():
        from tfmixed._cli import bench as benchmark

        log_commands.check_plot("--plot", plot)
        log_commands.prepare("--plot", plot)
        cases = [*(networks or ()), *(model or ())] or benchmark.NETWORKS
        report = benchmark.run(cases, policy, batch=batch, rounds=rounds, seconds=seconds, memory=peak)
    print(json.dumps(report.as_dict(), indent=2)) if as_json else _print(report)
    if plot is not None:
        from tfmixed import plotting

        plotting.save(plotting.plot_times(report.times(), f"{report.policy} on {report.device}"), plot)


app.command()(log_commands.report)
app.command()(log_commands.simulate)
app.command(context_settings=run_command.SETTINGS)(run_command.run)


@contextlib.contextmanager
def _on_models() -> Iterator[None]:
    """Imports Keras, and turns errors of the model's code into exit code 2, since 0 and 1 are results of an audit.

    Output of that code goes to standard error, so that it does not mix with JSON.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _load_keras()
            yield
        except (UsageError, ConfigError, KeyboardInterrupt):
            raise
        except SystemExit as stop:
            raise UsageError(f"The code of the model must not exit. Received: sys.exit({stop.code!r}).") from None
        except BaseException as error:
            if _is_own_error(error):
                raise UsageError(str(error)) from error
            traceback.print_exc()
            message = str(error).strip().partition("\n")[0]
            raise UsageError(f"The command failed. Received: {type(error).__name__}: {message}") from None


def _is_own_error(error: BaseException) -> bool:
    """Returns whether a `raise` statement of this package refuses an argument. Keras removes its own frames."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_raised = last.filename.startswith(_PACKAGE) and (last.line or "").startswith("raise")
    return is_raised and error.__cause__ is None and isinstance(error, (ValueError, NotImplementedError))


def _print(renderable: Any) -> None:
    from tfmixed._utils import rich_text

    rich_text.console().print(renderable)


def _set_policy(policy: str | None, as_keras: bool = True) -> None:
    """Sets a policy: as Keras alone creates a model, or as `set_policy` does. The code of the model may set another."""
    from tfmixed._islands import gradient_sums

    try:
        if policy is not None:
            tfmixed.set_policy(policy, promote=not as_keras)
            if as_keras:
                gradient_sums.switch(False)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _load_keras() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import keras  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Keras cannot import its backend ({error}). Install it, as in pip install 'tfmixed[tensorflow]', or set "
            "KERAS_BACKEND to an installed backend."
        ) from error
