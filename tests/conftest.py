import gc
import os

import keras
import pytest

from tfmixed._islands import promotion

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Several replicas on one machine, for MirroredStrategy. Only before the first tensor.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
else:
    # What speaks of TensorFlow alone, and what its process of its own shows once for all backends.
    only = [
        "accuracy",
        "architecture",
        "audit",
        "cli",
        "config",
        "contract",
        "distribute",
        "docs",
        "docstrings",
        "examples",
        "fused",
        "fuzz",
        "grad_scaler_compiled",
        "hazards_mended",
        "multi_worker",
        "package",
        "nan",
        "porting",
        "report",
        "report_docs",
        "restart",
        "run_loops",
        "run_script",
        "v1_callers",
        "v1_checkpoints",
        "v1_conversion",
        "v1_eager",
        "v1_float16",
        "v1_graphs",
        "v1_hooks",
        "v1_install",
        "v1_optimizer",
        "v1_origins",
        "v1_rewrite",
        "v1_servers",
    ]
    if keras.backend.backend() == "jax":
        import jax

        # On GPUs and TPUs it multiplies float32 matrices in fewer bits, and adds in any order.
        jax.config.update("jax_default_matmul_precision", "highest")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    collect_ignore_glob = [f"*/test_{name}.py" for name in only]


@pytest.fixture(autouse=True)
def _same_start():
    """Each test starts from one seed and leaves the dtype policy as it found it."""
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(before)
    promotion.switch(False)


def pytest_collection_finish():
    """Spares each collection of garbage what was imported: half a second of it."""
    gc.freeze()
