"""The memory that training takes, on an accelerator or in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import psutil


def used(at_peak: bool) -> int:
    """Returns the bytes in use on the device that trains: an accelerator's own, or this process's."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        if tensorflow.config.list_logical_devices("GPU"):
            info = tensorflow.config.experimental.get_memory_info("GPU:0")
            return int(info["peak" if at_peak else "current"])
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated() if at_peak else torch.cuda.memory_allocated())
    elif backend == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats:
            return int(stats["peak_bytes_in_use" if at_peak else "bytes_in_use"])
    return _peak_of_process() if at_peak else int(psutil.Process().memory_info().rss)


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak is that of the parent too, if that was larger.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
