"""Diagnosis of this machine: hardware, backend settings, warnings, and optionally speeds and layer widths."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tfmixed import hardware
from tfmixed._core import optimizer_precision
from tfmixed._utils import rich_text
from tfmixed.doctor import backend_settings, speed_test, tile_alignment
from tfmixed.doctor.backend_settings import BackendSettings
from tfmixed.doctor.speed_test import Measured
from tfmixed.doctor.tile_alignment import Width
from tfmixed.formats import HALF
from tfmixed.hardware import Hardware

_MAX_ROWS = 10
_BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Diagnosis:
    """Result of `examine`. Prints as tables.

    Args:
        hardware: The devices and the policy that `"auto"` selects for them.
        switches: The settings of the backend.
        warnings: Conditions that make mixed precision slow, each with a remedy.
        measured: The measured speeds. Defaults to None, not measured.
        widths: The layer widths of the model that matrix units pad. Defaults to None, no model.
    """

    hardware: Hardware
    switches: BackendSettings
    warnings: tuple[str, ...]
    measured: Measured | None = None
    widths: tuple[Width, ...] | None = None

    @property
    def policy(self) -> str:
        """The policy that `"auto"` selects."""
        return self.hardware.policy

    @property
    def reason(self) -> str:
        """The reason for the policy."""
        return self.hardware.reason

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as plain values, with `policy`, `reason` and the speedups over float32."""
        values = {"policy": self.policy, "reason": self.reason, **dataclasses.asdict(self)}
        if self.measured:
            for speed in values["measured"]["speeds"]:
                speed["matmul_ratio"], speed["conv_ratio"] = self.measured.ratios(speed["dtype"])
        return values

    def to_json(self) -> str:
        """Returns `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_device_table(self.hardware), _settings_table(self.hardware, self.switches)]
        if self.measured:
            parts.append(_speed_table(self.measured, self.hardware.main.kind))
        if self.widths:
            parts.append(_width_table(self.widths))
        if self.warnings:
            parts.append(_filled(Table.grid(padding=(0, 1)), (("!", warning) for warning in self.warnings)))
        return Group(parts[0], *(Padding(part, (1, 0, 0, 0)) for part in parts[1:]))

    def __str__(self) -> str:
        return rich_text.text(self)


def examine(model: keras.Model | None = None, measure: bool = False) -> Diagnosis:
    """Examines this machine as the active Keras backend sees it.

    Args:
        model: A built model whose layer widths are checked as well, and whose half-precision variables are checked
            against its optimizer. Defaults to None.
        measure: Whether to measure speeds, which takes some seconds. Defaults to `False`.

    Example:
    >>> examine().policy in ("float32", "mixed_bfloat16", "mixed_float16")
    True
    """
    machine, settings = hardware.describe(), backend_settings.read()
    measured = speed_test.measure() if measure else None
    widths = None if model is None else tile_alignment.odd_widths(model, tile_alignment.MULTIPLES[machine.main.kind])
    found = (*_optimizer_warnings(model), *warnings(machine, settings, measured, widths))
    return Diagnosis(machine, settings, found, measured, widths)


def _optimizer_warnings(model: keras.Model | None) -> list[str]:
    """Returns the constants of a model's optimizer, or of Adam's, that its half-precision variables round away."""
    if model is None:
        return []
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        return optimizer_precision.describe(optimizer_precision.find(optimizer, model.trainable_variables))
    dtypes = {keras.backend.standardize_dtype(variable.dtype) for variable in model.trainable_variables}
    return [
        optimizer_precision.describe_default(f"the model {model.name!r}", dtype) for dtype in HALF if dtype in dtypes
    ]


def warnings(
    machine: Hardware,
    settings: BackendSettings,
    measured: Measured | None = None,
    widths: tuple[Width, ...] | None = None,
) -> Iterator[str]:
    """Yields the `warnings` of a `Diagnosis`, the most severe first. Takes its other fields."""
    main = machine.main
    if main.kind == "cpu":
        yield from _cpu_warnings(machine, settings)
    for device in machine.devices:
        if device.kind == "gpu" and not device.fast:
            yield f"{device.name}: {device.reason}; half precision saves memory, but no time"
    compute_dtype = keras.dtype_policies.get(settings.policy).compute_dtype
    if compute_dtype in HALF and compute_dtype not in main.fast:
        yield f"the policy is {settings.policy}, and {compute_dtype} is slow here: use {machine.policy} for speed"
    if main.kind == "cpu":
        yield "float16 is emulated on CPUs: use it to study its numerics, not for speed"
    ratios = {dtype: measured.ratios(dtype)[0] for dtype in main.fast} if measured else {}
    for dtype, ratio in ratios.items():
        if ratio <= 1:
            yield (
                f"{dtype} should be faster than float32 here, but its matrix products have {ratio:.2g} times the "
                "speed: check the settings, and measure on an idle machine"
            )
    if widths:
        layers, multiple = len({width.layer for width in widths}), tile_alignment.MULTIPLES[main.kind]
        yield (
            f"{layers} layers of the model have widths that are not multiples of {multiple}, and matrix units pad them "
            "with zeros: use multiples where the data permits"
        )


def _cpu_warnings(machine: Hardware, settings: BackendSettings) -> Iterator[str]:
    if _NVIDIA_DRIVER.exists():
        name = _BACKENDS.get(settings.backend, settings.backend)
        yield f"this machine has an NVIDIA driver, but {name} sees no GPU: install its CUDA build"
    if not machine.main.fast:
        yield f"{machine.reason}: half precision saves memory, but no time"
    if settings.backend == "tensorflow" and settings.onednn is False:
        value = settings.variables.get("TF_ENABLE_ONEDNN_OPTS", "unset")
        yield (
            f"oneDNN is off (TF_ENABLE_ONEDNN_OPTS is {value}), and bfloat16 on CPUs is slow without it: set "
            "TF_ENABLE_ONEDNN_OPTS=1"
        )


def _device_table(machine: Hardware) -> Table:
    rows = []
    for device in machine.devices:
        has = device.compute_capability and f"compute capability {device.compute_capability}"
        has = has or ", ".join(device.features) or "-"
        rows.append((device.kind, device.name, ", ".join(device.fast) or "-", has))
    return _table(("device", "name", "fast in", "has"), rows)


def _settings_table(machine: Hardware, settings: BackendSettings) -> Table:
    name = _BACKENDS.get(settings.backend, settings.backend)
    gpus_only = "" if any(device.kind == "gpu" for device in machine.devices) else " (GPUs only)"
    switches = {
        "oneDNN": (settings.onednn, "on", "off"),
        "XLA": (settings.xla, "compiles", "cannot compile here"),
        "TF32": (settings.tf32, f"on{gpus_only}", f"off{gpus_only}"),
    }
    sums = "in float32, by replacing" if settings.float32_sums else "as in the backend; set_policy would replace"
    rows = {
        "policy": f"{machine.policy}: {machine.reason}",
        "backend": f"{name} {settings.backend_version}, Keras {settings.keras_version}, {settings.cores} CPU cores",
        **{label: on if value else off for label, (value, on, off) in switches.items() if value is not None},
        "gradient sums": f"{sums} {', '.join(settings.replaced)}",
        **settings.variables,
    }
    return _filled(Table.grid(padding=(0, 2)), rows.items())


def _speed_table(measured: Measured, kind: str) -> Group:
    rows = []
    for speed in measured.speeds:
        matmul, conv = (f"{ratio:.2g} x" for ratio in measured.ratios(speed.dtype))
        rows.append((speed.dtype, f"{speed.matmul_tflops:.3g}", matmul, f"{speed.conv_tflops:.3g}", conv))
    table = _table((f"{kind}, TFLOP/s", "matrix products", "", "convolutions", ""), rows)
    for column in table.columns[1:]:
        column.justify = "right"
    return Group(table, f"memory: {measured.bandwidth_gb_s:.3g} GB/s, read and written")


def _width_table(widths: tuple[Width, ...]) -> Table:
    rows = []
    for (path, kind), group in itertools.groupby(widths, key=lambda width: (width.layer, width.kind)):
        found = [(f"{width.name} {width.width}", str(width.better)) for width in group]
        rows.append((f"{path} ({kind})", *(", ".join(cells) for cells in zip(*found, strict=True))))
    more = [(f"and {len(rows) - _MAX_ROWS} more",)] if len(rows) > _MAX_ROWS else []
    return _table(("layer", "is", "use"), [*rows[:_MAX_ROWS], *more])


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    return _filled(Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="dim"), rows)


def _filled(table: Table, rows: Iterable[Iterable[str]]) -> Table:
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, so that brackets in a path are not read as markup
    return table
