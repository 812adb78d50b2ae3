"""The log of one training run: recognized as its own after a restart, and filled from the state of a scaler."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import keras

import tfmixed
from tfmixed import hardware, records
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import atomic_write
from tfmixed.records import Change, EventsLost, Progress, Record, RunRecord, ScaleChange
from tfmixed.records.log_file import claim, continue_at, is_repeated, read, release


def begin(
    path: Path,
    step: int,
    kinds: tuple[type[Record], ...],
    changes: Sequence[Change] = (),
    scaler: ScalerBase | None = None,
    loop: Any = None,
) -> tuple[Path, list[Change]]:
    """Claims a log and continues it. Returns its path and the result of `continue_at`.

    Args:
        path: The log.
        step: As in `continue_at`.
        kinds: As in `continue_at`.
        changes: As in `continue_at`.
        scaler: The scaler of the run. Its state identifies the run's own log.
        loop: As in `claim`.
    """
    claimed = claim(path, loop, lambda candidate: _is_own(candidate, step, kinds, scaler))
    try:
        return claimed, continue_at(claimed, step, kinds, changes)
    except BaseException:
        release(claimed)
        raise


def _is_own(path: Path, step: int, kinds: tuple[type[Record], ...], scaler: ScalerBase | None) -> bool:
    """Returns True if a run that continues at `step` would delete no lines of another run.

    A run that starts at step 0 replaces any log. A restored run deletes lines only of a log that agrees with its
    state, and only if no numbered file beside it agrees too.
    """
    if step == 0 or atomic_write.stream(path) is not None:
        return True
    log = [record for _, record in read(path) if record is not None]
    agrees = _agrees(log, step, scaler)
    if not any(is_repeated(record, step, kinds) for record in log):
        return agrees is not False
    return agrees is True and not any(_agrees(other_log, step, scaler) for other_log in _numbered_logs(path))


def _agrees(log: Sequence[Record], step: int, scaler: ScalerBase | None) -> bool | None:
    """Compares a log with the state of a scaler before `step`. Reads the device.

    Returns:
        True if an epoch ended in exactly this state, or if the changes are the same and not only growths, which occur
        at the same steps in many trainings. False if the log contradicts the state. None if it holds too little.
    """
    if scaler is None:
        return None
    for record in reversed(log):
        if isinstance(record, Progress) and record.step == step - 1:
            now = progress(step - 1, None, measurements(scaler), {})
            return (record.skipped_steps, record.gradient_norm) == (now.skipped_steps, now.gradient_norm)
    known = scaler._buffered_events()
    first = known[0].step + 1 if known and isinstance(known[0], EventsLost) else 0
    logged = [record.step for record in log if isinstance(record, (RunRecord, ScaleChange, EventsLost, Progress))]
    window = range(max(first, min(logged, default=0)), min(step, max(logged, default=-1) + 1))
    ours, theirs = _changes_within(window, known), _changes_within(window, log)
    if theirs - ours:
        return False
    return True if ours == theirs and any(reason != "growth" for *_, reason in ours) else None


def _changes_within(steps: range, records: Iterable[Record]) -> set[tuple[Any, ...]]:
    changes = [record for record in records if isinstance(record, ScaleChange) and record.step in steps]
    return {(change.step, change.old_scale, change.new_scale, change.reason) for change in changes}


def _numbered_logs(path: Path) -> Iterator[list[Record]]:
    for numbered in takewhile(Path.exists, islice(atomic_write.numbered(path), 1, None)):
        with contextlib.suppress(ValueError):
            yield records.read_log(numbered)


def describe(model: keras.Model | None, scaler: ScalerBase) -> RunRecord:
    """Returns the first record of a run.

    Args:
        model: The model that is trained. None if it is unknown.
        scaler: Its `LossScaleOptimizer` or `GradScaler`.
    """
    devices = hardware.describe()
    backend = keras.backend.backend()
    policy = keras.config.dtype_policy() if model is None else model.dtype_policy
    inner = getattr(scaler, "inner_optimizer", None)
    return RunRecord(
        step=int(scaler.attempted_steps),
        loss_scale=float(scaler.measured()["loss_scale"]),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        model="" if model is None else str(model.name),
        policy=policy.name,
        rule=scaler.rule.get_config(),
        optimizer="" if inner is None else type(inner).__name__,
        devices=[device.name for device in sorted(devices.devices, key=lambda device: device != devices.main)],
        versions={
            "Python": platform.python_version(),
            "tfmixed": tfmixed.__version__,
            "Keras": keras.version(),
            backend: str(importlib.import_module(backend).__version__),
        },
    )


def measurements(scaler: ScalerBase) -> dict[str, float]:
    """Returns the measurements of a scaler as Python numbers. Reads the device."""
    return {name: float(value) for name, value in scaler.measured().items()}


def progress(step: int, epoch: int | None, numbers: Mapping[str, float], logs: Mapping[str, Any]) -> Progress:
    """Returns the record of the state of a run after `step`.

    Args:
        step: The last attempted step, counted from 0.
        epoch: The epoch that ended. None if there are no epochs.
        numbers: The result of the function `measurements`.
        logs: The logs of `fit`, which may hold the loss.
    """
    norm, loss = numbers["gradient_norm"], logs.get("loss")
    return Progress(
        step,
        epoch,
        numbers["loss_scale"],
        int(numbers["skipped_steps"]),
        norm if math.isfinite(norm) else None,
        float(loss) if loss is not None and math.isfinite(loss) else None,
    )
