"""Settings of all tests: logical CPUs as replicas, one seed, and the files that run on JAX and PyTorch."""

from __future__ import annotations

import ast
import gc
import os

import keras
import pytest

from tfmixed._islands import gradient_sums, promotion

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    import tensorflow as tf

    # Replicas for MirroredStrategy. Only possible before the first tensor.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
elif BACKEND == "jax":
    import jax

    # For `keras.distribution`. Only possible before the first array.
    jax.config.update("jax_num_cpu_devices", 4)
    # By default, GPUs and TPUs multiply float32 matrices with fewer bits and add in any order.
    jax.config.update("jax_default_matmul_precision", "highest")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"


def pytest_ignore_collect(collection_path):
    """Selects the files for JAX and PyTorch: those that import `tests/helpers/backend.py`, but not TensorFlow."""
    if BACKEND == "tensorflow" or collection_path.suffix != ".py":
        return None
    statements = ast.parse(collection_path.read_text(encoding="utf-8")).body
    modules = {node.module for node in statements if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in statements if isinstance(node, ast.Import) for name in node.names}
    needs_tensorflow = any(name.startswith(("tensorflow", "tf1", "tfmixed.compat.v1")) for name in modules)
    return None if "backend" in modules and not needs_tensorflow else True


@pytest.fixture(autouse=True)
def _same_start():
    """Sets the same seed before each test, and restores the dtype policy after it."""
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
    promotion.switch(False)
    gradient_sums.switch(False)


def pytest_collection_finish():
    """Excludes imported modules from garbage collection, where they take half a second each time."""
    gc.freeze()
