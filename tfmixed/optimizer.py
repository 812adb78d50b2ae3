"""Keras optimizers that scale the loss, and that keep weights and states in few bits."""

from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer
from tfmixed._core.low_precision_optimizer import LowPrecisionOptimizer

__all__ = ["LossScaleOptimizer", "LowPrecisionOptimizer"]
