"""The Keras optimizer that scales the loss and skips steps with non-finite gradients."""

from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer

__all__ = ["LossScaleOptimizer"]
