"""What this machine is, which policy fits it, how fast it is, and what would make mixed precision useless on it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tfmixed import hardware
from tfmixed._utils import rich_text
from tfmixed.doctor import backend_settings, speed_test, tile_alignment
from tfmixed.doctor.backend_settings import Switches
from tfmixed.doctor.speed_test import Measured
from tfmixed.doctor.tile_alignment import Width
from tfmixed.formats import HALF
from tfmixed.hardware import Hardware

_MOST_ROWS = 10
_BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found. Prints as tables.

    Args:
        hardware: The devices, and the policy that `"auto"` picks for them.
        switches: How the backend is set up.
        warnings: What makes mixed precision slow or useless here, and what to do about it.
        measured: Speeds; None where nobody asked.
        widths: Layer widths of the model that its matrix products pad; None without a model.
    """

    hardware: Hardware
    switches: Switches
    warnings: tuple[str, ...]
    measured: Measured | None = None
    widths: tuple[Width, ...] | None = None

    @property
    def policy(self) -> str:
        """The policy that `"auto"` picks here."""
        return self.hardware.policy

    @property
    def reason(self) -> str:
        """Why it picks it."""
        return self.hardware.reason

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values; `policy`, `reason` and the ratios to float32 included."""
        values = {"policy": self.policy, "reason": self.reason, **dataclasses.asdict(self)}
        if self.measured:
            for speed in values["measured"]["speeds"]:
                speed["matmul_ratio"], speed["conv_ratio"] = self.measured.ratios(speed["dtype"])
        return values

    def to_json(self) -> str:
        """Returns `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __rich__(self) -> RenderableType:
        first, *rest = self._parts()
        return Group(first, *(Padding(part, (1, 0, 0, 0)) for part in rest))

    def __str__(self) -> str:
        return rich_text.text(self)

    def _parts(self) -> Iterator[RenderableType]:
        yield _devices(self.hardware)
        yield _facts(self.hardware, self.switches)
        if self.measured:
            yield _speeds(self.measured, self.hardware.main.kind)
        if self.widths:
            yield _widths(self.widths)
        if self.warnings:
            yield _warnings(self.warnings)


def examine(model: keras.Model | None = None, measure: bool = False) -> Diagnosis:
    """Looks at this machine as the active Keras backend sees it.

    Args:
        model: A built model whose layer widths are looked at too.
        measure: Measure speeds as well, which takes some seconds.

    Example:
    >>> examine().policy in ("float32", "mixed_bfloat16", "mixed_float16")
    True
    """
    machine, state = hardware.describe(), backend_settings.read()
    speeds = speed_test.measure() if measure else None
    odd = None if model is None else tile_alignment.odd_widths(model, tile_alignment.MULTIPLES[machine.main.kind])
    return Diagnosis(machine, state, tuple(warnings(machine, state, speeds, odd)), speeds, odd)


def warnings(
    machine: Hardware, state: Switches, measured: Measured | None = None, odd: tuple[Width, ...] | None = None
) -> Iterator[str]:
    """Yields what makes mixed precision slow or useless, the gravest first, with what to do.

    Args:
        machine: As in `Diagnosis`, like the rest.
        state: The backend's switches.
        measured: The speeds, if measured.
        odd: The widths, if a model was given.
    """
    yield from _of_devices(machine, state)
    yield from _of_policy(machine, state)
    if measured:
        yield from _of_speeds(machine, measured)
    if odd:
        layers, multiple = len({width.layer for width in odd}), tile_alignment.MULTIPLES[machine.main.kind]
        yield (
            f"{layers} of the model's layers have widths that are no multiple of {multiple}, which matrix units pad "
            "with zeros: choose multiples where the data leaves you the choice"
        )


def _of_devices(machine: Hardware, state: Switches) -> Iterator[str]:
    name = _BACKENDS.get(state.backend, state.backend)
    if machine.main.kind == "cpu" and _NVIDIA_DRIVER.exists():
        yield f"this machine has an NVIDIA driver and {name} sees no GPU: install its CUDA build"
    for device in machine.devices:
        if device.kind == "gpu" and not device.fast:
            yield f"{device.name}: {device.reason}; half precision saves memory on it and no time"
    if machine.main.kind == "cpu" and not machine.main.fast:
        yield f"{machine.reason}: half precision saves memory on it and no time"
    if machine.main.kind == "cpu" and state.backend == "tensorflow" and state.onednn is False:
        value = state.variables.get("TF_ENABLE_ONEDNN_OPTS", "unset")
        yield (
            f"oneDNN is off (TF_ENABLE_ONEDNN_OPTS is {value}), and without it TensorFlow has no fast bfloat16 on "
            "CPUs: set TF_ENABLE_ONEDNN_OPTS=1"
        )


def _of_policy(machine: Hardware, state: Switches) -> Iterator[str]:
    half = keras.dtype_policies.get(state.policy).compute_dtype
    if half in HALF and half not in machine.main.fast:
        yield f"the global policy is {state.policy}, and {half} is slow here: use {machine.policy} for speed"
    if machine.main.kind == "cpu":
        yield "float16 is emulated on CPUs: use it here to study its numerics, not for speed"


def _of_speeds(machine: Hardware, measured: Measured) -> Iterator[str]:
    for dtype in machine.main.fast:
        ratio, _ = measured.ratios(dtype)
        if ratio <= 1:
            yield (
                f"{dtype} should be faster than float32 here, and its matrix products are {ratio:.2g} times as fast: "
                "look at the switches, and measure on an idle machine"
            )


def _devices(machine: Hardware) -> Table:
    table = _table("device", "name", "fast in", "has")
    for device in machine.devices:
        has = device.compute_capability and f"compute capability {device.compute_capability}"
        has = has or ", ".join(device.features) or "-"
        _add(table, device.kind, device.name, ", ".join(device.fast) or "-", has)
    return table


def _facts(machine: Hardware, state: Switches) -> Table:
    name = _BACKENDS.get(state.backend, state.backend)
    without_gpu = "" if any(device.kind == "gpu" for device in machine.devices) else ", which only a GPU heeds"
    facts = {
        "policy": f"{machine.policy}: {machine.reason}",
        "backend": f"{name} {state.backend_version}, Keras {state.keras_version}, {state.cores} CPU cores",
        "oneDNN": _word(state.onednn, "on", "off"),
        "XLA": _word(state.xla, "compiles", "cannot compile here"),
        "TF32": _word(state.tf32, f"on{without_gpu}", f"off{without_gpu}"),
        **state.variables,
    }
    table = Table.grid(padding=(0, 2))
    for label, fact in facts.items():
        if fact is not None:
            _add(table, label, fact)
    return table


def _word(switch: bool | None, on: str, off: str) -> str | None:
    return None if switch is None else on if switch else off


def _speeds(measured: Measured, kind: str) -> Group:
    table = _table(f"{kind}, TFLOP/s", "matrix products", "", "convolutions", "")
    for column in table.columns[1:]:
        column.justify = "right"
    for speed in measured.speeds:
        matmul, conv = (f"{ratio:.2g} x" for ratio in measured.ratios(speed.dtype))
        _add(table, speed.dtype, f"{speed.matmul_tflops:.3g}", matmul, f"{speed.conv_tflops:.3g}", conv)
    return Group(table, f"memory: {measured.bandwidth_gb_s:.3g} GB/s, read and written")


def _widths(odd: tuple[Width, ...]) -> Table:
    layers = [list(group) for _, group in itertools.groupby(odd, key=lambda width: width.layer)]
    table = _table("layer", "is", "use")
    for group in layers[:_MOST_ROWS]:
        found, better = ", ".join(f"{each.name} {each.width}" for each in group), (str(each.better) for each in group)
        _add(table, f"{group[0].layer} ({group[0].kind})", found, ", ".join(better))
    if len(layers) > _MOST_ROWS:
        _add(table, f"and {len(layers) - _MOST_ROWS} more")
    return table


def _warnings(warnings: tuple[str, ...]) -> Table:
    table = Table.grid(padding=(0, 1))
    for warning in warnings:
        _add(table, "!", warning)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # as Text: a bracket in a path is no markup
