"""Support for Keras training on several workers."""

from tfmixed._core.multi_worker_fit import enable_multi_worker_fit

__all__ = ["enable_multi_worker_fit"]
