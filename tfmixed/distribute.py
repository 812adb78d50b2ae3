"""Support for `tf.distribute` that Keras 3 lacks."""

from tfmixed._core.replica_sync import enable_multi_worker_fit

__all__ = ["enable_multi_worker_fit"]
