"""How the active Keras backend is set up: versions, oneDNN, XLA, TF32, and the variables that steer them."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import keras

# What changes the speed of half precision, or hides a device.
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
class Switches:
    """The state of the backend; None stands for a switch that it does not have.

    Args:
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        backend_version: Its version.
        keras_version: That of Keras.
        policy: The global dtype policy as it is, whatever `"auto"` would pick.
        onednn: Do CPU kernels of oneDNN run? On TensorFlow `TF_ENABLE_ONEDNN_OPTS` decides.
        xla: Does XLA compile here? On TensorFlow a function with `jit_compile=True` was tried.
        tf32: May float32 products be rounded to TensorFloat-32, on GPUs of compute capability 8.0 and above?
        cores: CPU cores that this process may use.
        variables: Those of `VARIABLES` that are set.
    """

    backend: str
    backend_version: str
    keras_version: str
    policy: str
    onednn: bool | None
    xla: bool | None
    tf32: bool | None
    cores: int
    variables: dict[str, str]


def read() -> Switches:
    """Returns the switches as they stand."""
    backend = keras.backend.backend()
    module = importlib.import_module(backend)
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    reader = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}.get(backend)
    onednn, xla, tf32 = reader(module) if reader else (None, None, None)
    if variables.get("NVIDIA_TF32_OVERRIDE") == "0":
        tf32 = False
    policy = keras.config.dtype_policy().name
    return Switches(backend, module.__version__, keras.__version__, policy, onednn, xla, tf32, _cores(), variables)


def _tensorflow(tf: Any) -> tuple[bool | None, bool | None, bool | None]:
    return _onednn(), _compiles(tf), tf.config.experimental.tensor_float_32_execution_enabled()


def _onednn() -> bool | None:
    """Asks TensorFlow, whose default depends on the platform; None where a version has no such question."""
    try:
        from tensorflow.python.framework.test_util import IsMklEnabled
    except ImportError:
        return None
    return bool(IsMklEnabled())


def _compiles(tf: Any) -> bool:
    try:
        tf.function(tf.identity, jit_compile=True, autograph=False)(1.0)
    except tf.errors.OpError:
        return False
    return True


def _jax(jax: Any) -> tuple[bool | None, bool | None, bool | None]:
    return None, True, jax.config.jax_default_matmul_precision not in ("highest", "float32")


def _torch(torch: Any) -> tuple[bool | None, bool | None, bool | None]:
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled, None, torch.backends.cuda.matmul.allow_tf32


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1
