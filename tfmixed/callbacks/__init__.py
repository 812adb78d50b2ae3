"""Callbacks that log a training run."""

from tfmixed.callbacks.gradient_fidelity import GradientFidelity
from tfmixed.callbacks.gradient_ranges import GradientRanges
from tfmixed.callbacks.loss_scale_logger import LossScaleLogger

__all__ = ["GradientFidelity", "GradientRanges", "LossScaleLogger"]
