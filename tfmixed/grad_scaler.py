"""PyTorch's `GradScaler` for custom training loops."""

from tfmixed._core.grad_scaler import GradScaler

__all__ = ["GradScaler"]
