"""What the devices of this machine are fast in, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from archspec.cpu import brand_string, detect
from rich.table import Table

from tfmixed._utils import rich_text

Kind = Literal["cpu", "gpu", "tpu"]
_CPU_BFLOAT16 = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"}
# Named, and without a say in the policy: TensorFlow and oneDNN emulate float16 on CPUs that have them too.
_CPU_OTHER = {"amx_fp16": "AMX-FP16", "avx512_fp16": "AVX512-FP16", "avx_ne_convert": "AVX-NE-CONVERT"}


@dataclass(frozen=True)
class Device:
    """One device, and what half precision is worth on it.

    Args:
        kind: `"cpu"`, `"gpu"` or `"tpu"`.
        name: The driver's or the vendor's name of it.
        fast: The half-precision formats it computes matrix products in at speed.
        policy: The Keras dtype policy to train with on it.
        reason: Why, in one sentence.
        compute_capability: A GPU's, as `"9.0"`, where the driver tells it.
        features: The half-precision instruction sets that a CPU has, such as `"AVX512-BF16"`.
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
    """The devices that the Keras backend sees. Prints as a table."""

    devices: tuple[Device, ...]

    @property
    def main(self) -> Device:
        """The device that decides: the weakest accelerator, or the CPU where there is none."""
        accelerators = [device for device in self.devices if device.kind != "cpu"]
        return min(accelerators or self.devices, key=lambda device: len(device.fast))

    @property
    def policy(self) -> str:
        """The policy that `"auto"` picks here."""
        return self.main.policy

    @property
    def reason(self) -> str:
        """Why it picks it."""
        return self.main.reason

    def __rich__(self) -> Table:
        table = Table("device", "name", "fast in", "policy", "reason")
        for device in self.devices:
            table.add_row(device.kind, device.name, ", ".join(device.fast) or "-", device.policy, device.reason)
        return table

    def __str__(self) -> str:
        return rich_text.text(self, 120)


def describe() -> Hardware:
    """Returns what each device supports, as the active Keras backend sees them.

    Example:
    >>> describe().policy in ("float32", "mixed_bfloat16", "mixed_float16")
    True
    """
    accelerators = {"tensorflow": _tensorflow_devices, "torch": _torch_devices, "jax": _jax_devices}
    return Hardware((cpu(), *accelerators.get(_backend(), tuple)()))


def cpu(features: frozenset[str] | None = None, name: str | None = None) -> Device:
    """Judges a CPU by its instruction sets.

    Args:
        features: Flags as the operating system spells them. None asks this machine.
        name: None asks this machine.
    """
    info = detect.detected_info()
    features = frozenset(info.features) if features is None else features
    name = name or brand_string() or info.name or info.vendor or "CPU"
    found = tuple(label for flag, label in _CPU_BFLOAT16.items() if flag in features)
    known = (*found, *(label for flag, label in _CPU_OTHER.items() if flag in features))
    if found:
        reason = f"this CPU multiplies bfloat16 in hardware ({', '.join(found)}); float16 it emulates"
        return Device("cpu", name, ("bfloat16",), "mixed_bfloat16", reason, features=known)
    reason = "this CPU has no bfloat16 arithmetic (AMX-BF16 or AVX512-BF16)"
    return Device("cpu", name, (), "float32", reason, features=known)


def gpu(name: str, compute_capability: tuple[int, int] | None) -> Device:
    """Judges an NVIDIA GPU by its compute capability; None where the driver tells none."""
    if compute_capability is None:
        return Device("gpu", name, (), "float32", "the driver tells no compute capability")
    version = ".".join(str(number) for number in compute_capability)
    if compute_capability >= (8, 0):
        reason = f"compute capability {version} has bfloat16 tensor cores: half precision without loss scaling"
        return Device("gpu", name, ("bfloat16", "float16"), "mixed_bfloat16", reason, version)
    if compute_capability >= (7, 0):
        reason = f"compute capability {version} has float16 tensor cores and no bfloat16"
        return Device("gpu", name, ("float16",), "mixed_float16", reason, version)
    reason = f"compute capability {version} has no tensor cores (they came with 7.0)"
    return Device("gpu", name, (), "float32", reason, version)


def tpu(name: str) -> Device:
    """Judges a TPU: all of them multiply in bfloat16."""
    return Device("tpu", name, ("bfloat16",), "mixed_bfloat16", "TPUs multiply in bfloat16")


def _backend() -> str:
    import keras

    return str(keras.backend.backend())


def _tensorflow_devices() -> tuple[Device, ...]:
    import tensorflow as tf

    # Not the physical ones: `tf.config.set_visible_devices` hides some, and may be called again.
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
