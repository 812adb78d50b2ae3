"""The log of a run as a file: continued after a restart, and whole up to the last line at any time."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import keras

import tfmixed
from tfmixed import hardware, records, whole
from tfmixed.records import Change, EventsLost, Progress, Record, RunRecord, ScaleChange
from tfmixed.state import Observable


def append(path: Path | None, new: Iterable[Record]) -> None:
    """Adds one line a record: one write each, straight to the system. A killed process loses at most the last.

    Without a path nothing is written.
    """
    if path is None:
        return
    with path.open("a", encoding="utf-8", buffering=1) as file:
        for record in new:
            file.write(records.to_line(record) + "\n")


def continue_at(path: Path, step: int, kinds: tuple[type[Record], ...], changes: Sequence[Change] = ()) -> list[Change]:
    """Makes a log ready for a run that goes on at `step`, and returns those of `changes` that it does not hold.

    Lines of earlier steps stay, later ones of these kinds go. Where log and `changes` overlap, because the run was
    saved before its log was written and killed after it, the lines of the log stay for as long as they agree.

    Raises:
        ValueError: The file is no log.
    """
    try:
        old = [each for each in (records.read_log(path) if path.exists() else ()) if not _goes(each, step, kinds)]
    except ValueError as error:
        raise ValueError(f"path must be a log of LossScaleLogger or a new file, received {str(path)!r}") from error
    first = min([step, *(change.step for change in changes)])
    overlap = [each for each in old if isinstance(each, (ScaleChange, EventsLost)) and each.step >= first]
    pairs = zip(overlap, changes, strict=False)
    agreed = len(list(takewhile(lambda pair: dataclasses.replace(pair[0], epoch=None) == pair[1], pairs)))
    gone = {id(each) for each in overlap[agreed:]} if changes else set()
    kept = [each for each in old if id(each) not in gone]
    whole.write_text(path, "".join(records.to_line(each) + "\n" for each in kept))
    return list(changes[agreed:])


def _goes(record: Record, step: int, kinds: tuple[type[Record], ...]) -> bool:
    return isinstance(record, kinds) and record.step is not None and record.step >= step


def describe(model: keras.Model | None, scaler: Observable) -> RunRecord:
    """Returns the record of a run that begins now.

    Args:
        model: What is trained; None in a loop that nobody told.
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


def numbers(scaler: Observable) -> dict[str, float]:
    """Returns what a scaler has measured, as numbers. Reads the device."""
    return {name: float(value) for name, value in scaler.measured().items()}


def progress(step: int, epoch: int | None, numbers: Mapping[str, float], logs: Mapping[str, Any]) -> Progress:
    """Returns the record of where a run stands after `step`.

    Args:
        step: The last attempted step, counted from 0.
        epoch: The epoch that ended, if there are any.
        numbers: What the function of this name returns.
        logs: Those of `fit`, which may hold the loss.
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
