"""Settings of the active Keras backend: versions, oneDNN, XLA, TF32, and the environment variables behind them."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import keras

from tfmixed._core.fused_update import no_xla
from tfmixed._islands import gradient_sums

# Environment variables that affect the speed of half precision or hide devices.
VARIABLES = (
    "TF_ENABLE_ONEDNN_OPTS",
    "ONEDNN_MAX_CPU_ISA",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


@dataclass(frozen=True)
class BackendSettings:
    """Settings of the backend. `None` stands for a setting that the backend does not have.

    Args:
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        backend_version: The version of the backend.
        keras_version: The version of Keras.
        policy: The current global dtype policy.
        onednn: Whether oneDNN's CPU kernels are enabled. TensorFlow reads `TF_ENABLE_ONEDNN_OPTS`.
        xla: Whether XLA can compile a function.
        tf32: Whether float32 products may use TensorFloat-32, on GPUs of compute capability 8.0 and above.
        float32_sums: Whether half-precision gradients are now summed in float32.
        replaced: What tfmixed replaces in the process for that.
        cores: The number of CPU cores available to this process.
        variables: The environment variables of `VARIABLES` that are set.
    """

    backend: str
    backend_version: str
    keras_version: str
    policy: str
    onednn: bool | None
    xla: bool | None
    tf32: bool | None
    float32_sums: bool
    replaced: tuple[str, ...]
    cores: int
    variables: dict[str, str]


def read() -> BackendSettings:
    """Returns the current settings."""
    backend = keras.backend.backend()
    module = importlib.import_module(backend)
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    reader = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}.get(backend)
    onednn, xla, tf32 = reader(module) if reader else (None, None, None)
    if variables.get("NVIDIA_TF32_OVERRIDE") == "0":
        tf32 = False
    policy = keras.config.dtype_policy().name
    versions = module.__version__, keras.__version__
    sums = gradient_sums.is_on(), gradient_sums.replaced()
    return BackendSettings(backend, *versions, policy, onednn, xla, tf32, *sums, _cores(), variables)


def _tensorflow(tf: Any) -> tuple[bool | None, bool | None, bool | None]:
    try:  # its default depends on the platform
        from tensorflow.python.framework.test_util import IsMklEnabled

        onednn = bool(IsMklEnabled())
    except ImportError:
        onednn = None
    return onednn, no_xla() is None, tf.config.experimental.tensor_float_32_execution_enabled()


def _jax(jax: Any) -> tuple[bool | None, bool | None, bool | None]:
    return None, True, jax.config.jax_default_matmul_precision not in ("highest", "float32")


def _torch(torch: Any) -> tuple[bool | None, bool | None, bool | None]:
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled, None, torch.backends.cuda.matmul.allow_tf32


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1
