"""Callbacks that watch a training run."""

from tfmixed.callbacks.ranges import GradientRanges
from tfmixed.callbacks.scale import LossScaleLogger

__all__ = ["GradientRanges", "LossScaleLogger"]
