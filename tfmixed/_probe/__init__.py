"""Gradient statistics of a training step that is run without updating the model."""
