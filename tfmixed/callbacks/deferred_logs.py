"""Batch logs that cost a read of the device only if they are used."""

from __future__ import annotations

from typing import Any

import numpy
from keras import ops
from numpy.lib.mixins import NDArrayOperatorsMixin

from tfmixed._core.scaler_base import ScalerBase


class DeferredLogs:
    """Measurements of a scaler after a batch, read on first use.

    Most trainings use the logs of few batches, or of none. Reading them all took 8 % of a step of 1.5 ms.

    Args:
        scaler: The scaler, which must not take another step before `read`.
    """

    __slots__ = ("__weakref__", "_scaler", "_values")

    def __init__(self, scaler: ScalerBase) -> None:
        self._scaler = scaler
        self._values: dict[str, Any] | None = None

    def scalars(self) -> dict[str, DeferredScalar]:
        """Returns the measurements by name. Only these keep this object alive."""
        return {name: DeferredScalar(self, name) for name in ("loss_scale", "skipped_steps", "gradient_norm")}

    def read(self) -> dict[str, Any]:
        """Returns the measurements as tensors that later steps leave alone."""
        if self._values is None:
            self._values = self._scaler.measured()
        return self._values


class DeferredScalar(NDArrayOperatorsMixin):
    """One of the `DeferredLogs`. Behaves like a NumPy scalar."""

    __slots__ = ("_logs", "_name")

    def __init__(self, logs: DeferredLogs, name: str) -> None:
        self._logs, self._name = logs, name

    def numpy(self) -> Any:
        """Returns the value as a NumPy array, like a tensor of TensorFlow."""
        return ops.convert_to_numpy(self._logs.read()[self._name])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return numpy.array(self.numpy(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        numbers = [value.numpy() if isinstance(value, DeferredScalar) else value for value in inputs]
        return getattr(ufunc, method)(*numbers, **options)

    def __float__(self) -> float:
        return float(self.numpy())

    def __int__(self) -> int:
        return int(self.numpy())

    def __bool__(self) -> bool:
        return bool(self.numpy())

    def __format__(self, spec: str) -> str:
        return format(self.numpy().item(), spec)

    def __repr__(self) -> str:
        return repr(self.numpy().item())

    def __reduce__(self) -> Any:  # of a copy, too
        return float, (float(self),)
