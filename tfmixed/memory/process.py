"""Memory of this process or its accelerator, and training in a new process to measure its peak."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy
import psutil

from tfmixed._utils import model_building
from tfmixed.memory.sizes import sizes_of
from tfmixed.policy import set_policy

STEPS = 3
# Several processes may use a GPU.
_ENVIRONMENT = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_CODE = "import sys; from tfmixed.memory import process; process.main(*sys.argv[1:])"


def measure(spec: str, policy: str | None, batch: int, samples: int) -> dict[str, Any]:
    """Returns the result of `trained` in a new process.

    Raises:
        ValueError: If the process fails.
    """
    environment = {
        **_ENVIRONMENT,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    command = [sys.executable, "-c", _CODE, spec, policy or "", str(batch), str(samples)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = (result.stdout if not result.returncode else result.stderr).strip().splitlines()
    if result.returncode:
        reason = lines[-1] if lines and result.returncode > 0 else "it was killed, perhaps for its memory"
        raise ValueError(
            f"Training {spec} at batch {batch} failed. Pass a smaller batch, or fix it. Received: {reason}"
        )
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def main(spec: str, policy: str, batch: str, samples: str) -> None:
    """Prints the result of `trained` as JSON."""
    print(json.dumps(trained(spec, policy or None, int(batch), int(samples))))


def trained(spec: str, policy: str | None, batch: int, samples: int) -> dict[str, Any]:
    """Trains for three steps. Returns the bytes before the model was made, the peak above them, and all sizes.

    Raises:
        ValueError: If the function returns something else than a compiled model with data.
    """
    module, _, name = spec.rpartition(":")
    function = getattr(importlib.import_module(module), name)
    if policy is not None:
        set_policy(policy)
    before = used()
    made = function()
    model, *data = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, keras.Model) or not model.compiled or len(data) not in (1, 2):
        raise ValueError(f"{spec} must return `model, x, y` or `model, dataset`, compiled. Received: {made!r:.100}")
    x, y = model_building.first_batch(*data)
    arrays = [numpy.asarray(keras.ops.convert_to_numpy(leaf)) for leaf in keras.tree.flatten((x, y))]
    count = max(len(arrays[0]), samples, batch)
    if count > len(arrays[0]):
        arrays = [array[numpy.arange(count) % len(array)] for array in arrays]
    x, y = keras.tree.pack_sequence_as((x, y), arrays)
    del made, data
    model.fit(x, y, batch_size=batch, steps_per_epoch=min(STEPS, count // batch), verbose=0)
    sizes, size = sizes_of(model), sum(array.nbytes for array in arrays)
    return {"before": before, "peak": used(peak=True) - before, "data": size, "sizes": dataclasses.asdict(sizes)}


def used(peak: bool = False) -> int:
    """Returns the bytes in use, or their peak, on the accelerator or else in this process."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        if tensorflow.config.list_logical_devices("GPU"):
            return int(tensorflow.config.experimental.get_memory_info("GPU:0")["peak" if peak else "current"])
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    elif backend == "jax":
        import jax

        if stats := jax.local_devices()[0].memory_stats():
            return int(stats["peak_bytes_in_use" if peak else "bytes_in_use"])
    return _process_peak() if peak else int(psutil.Process().memory_info().rss)


def _process_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, getrusage returns the peak of the parent process if that is larger.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
