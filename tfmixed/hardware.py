"""Devices of this machine, and the half-precision formats that they compute fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from archspec.cpu import brand_string, detect
from rich.table import Table

from tfmixed._utils import rich_text

Kind = Literal["cpu", "gpu", "tpu"]
_CPU_BFLOAT16 = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"}
# Reported, but they do not affect the policy: TensorFlow and oneDNN emulate float16 on CPUs with these as well.
_CPU_OTHER = {"amx_fp16": "AMX-FP16", "avx512_fp16": "AVX512-FP16", "avx_ne_convert": "AVX-NE-CONVERT"}


@dataclass(frozen=True)
class Device:
    """A device and its recommended dtype policy.

    Args:
        kind: `"cpu"`, `"gpu"` or `"tpu"`.
        name: The name given by the driver or vendor.
        fast: The half-precision formats with hardware support for matrix products.
        policy: The recommended Keras dtype policy.
        reason: The reason for the recommendation, in one sentence.
        compute_capability: The compute capability of a GPU, such as `"9.0"`, if the driver reports it. Defaults to
            `None`.
        features: The half-precision instruction sets of a CPU, such as `"AVX512-BF16"`. Defaults to an empty tuple.
    """

    kind: Kind
    name: str
    fast: tuple[str, ...]
    policy: str
    reason: str
    compute_capability: str | None = None
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """Devices visible to the Keras backend. Prints as a table."""

    devices: tuple[Device, ...]

    @property
    def main(self) -> Device:
        """The device that determines the policy: the weakest accelerator, or the CPU without one."""
        accelerators = [device for device in self.devices if device.kind != "cpu"]
        return min(accelerators or self.devices, key=lambda device: len(device.fast))

    @property
    def policy(self) -> str:
        """The policy that `"auto"` selects."""
        return self.main.policy

    @property
    def reason(self) -> str:
        """The reason for the policy."""
        return self.main.reason

    def __rich__(self) -> Table:
        table = Table("device", "name", "fast in", "policy", "reason")
        for device in self.devices:
            table.add_row(device.kind, device.name, ", ".join(device.fast) or "-", device.policy, device.reason)
        return table

    def __str__(self) -> str:
        return rich_text.text(self, 120)


def describe() -> Hardware:
    """Returns the devices visible to the active Keras backend.

    Example:
    >>> describe().policy in ("float32", "mixed_bfloat16", "mixed_float16")
    True
    """
    accelerators = {"tensorflow": _tensorflow_devices, "torch": _torch_devices, "jax": _jax_devices}
    return Hardware((cpu(), *accelerators.get(_backend(), tuple)()))


def cpu(features: frozenset[str] | None = None, name: str | None = None) -> Device:
    """Returns a CPU with a policy that depends on its instruction sets.

    Args:
        features: CPU flags in the operating system's spelling. `None` uses those of this machine. Defaults to None.
        name: The name of the CPU. `None` uses that of this machine. Defaults to None.
    """
    info = detect.detected_info()
    features = frozenset(info.features) if features is None else features
    name = name or brand_string() or info.name or info.vendor or "CPU"
    found = tuple(label for flag, label in _CPU_BFLOAT16.items() if flag in features)
    known = (*found, *(label for flag, label in _CPU_OTHER.items() if flag in features))
    if found:
        reason = f"this CPU multiplies bfloat16 in hardware ({', '.join(found)}) and emulates float16"
        return Device("cpu", name, ("bfloat16",), "mixed_bfloat16", reason, features=known)
    reason = "this CPU has no bfloat16 arithmetic (AMX-BF16 or AVX512-BF16)"
    return Device("cpu", name, (), "float32", reason, features=known)


def gpu(name: str, compute_capability: tuple[int, int] | None) -> Device:
    """Returns an NVIDIA GPU with a policy that depends on its compute capability, which may be unknown (`None`)."""
    if compute_capability is None:
        return Device("gpu", name, (), "float32", "the driver reports no compute capability")
    version = ".".join(str(number) for number in compute_capability)
    if compute_capability >= (8, 0):
        reason = f"compute capability {version} has bfloat16 tensor cores, which need no loss scaling"
        return Device("gpu", name, ("bfloat16", "float16"), "mixed_bfloat16", reason, version)
    if compute_capability >= (7, 0):
        reason = f"compute capability {version} has float16 tensor cores, but no bfloat16"
        return Device("gpu", name, ("float16",), "mixed_float16", reason, version)
    reason = f"compute capability {version} has no tensor cores (introduced with 7.0)"
    return Device("gpu", name, (), "float32", reason, version)


def tpu(name: str) -> Device:
    """Returns a TPU. All TPUs multiply in bfloat16."""
    return Device("tpu", name, ("bfloat16",), "mixed_bfloat16", "TPUs multiply in bfloat16")


def _backend() -> str:
    import keras

    return str(keras.backend.backend())


def _tensorflow_devices() -> tuple[Device, ...]:
    import tensorflow as tf

    # Visible devices, since `tf.config.set_visible_devices` hides physical ones and may be called again.
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    gpus = [gpu(detail.get("device_name", "GPU"), detail.get("compute_capability")) for detail in details]
    return (*gpus, *(tpu(device.name) for device in tf.config.get_visible_devices("TPU")))


def _torch_devices() -> tuple[Device, ...]:
    import torch

    indices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return tuple(gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in indices)


def _jax_devices() -> tuple[Device, ...]:
    import jax

    return tuple(_jax_device(device) for device in jax.local_devices() if device.platform != "cpu")


def _jax_device(device: Any) -> Device:
    if device.platform == "tpu":
        return tpu(device.device_kind)
    major, _, minor = getattr(device, "compute_capability", "").partition(".")
    return gpu(device.device_kind, (int(major), int(minor)) if minor else None)
