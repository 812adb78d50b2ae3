"""Callbacks that watch a training run."""

from tfmixed.callbacks.scale import LossScaleLogger

__all__ = ["LossScaleLogger"]
