"""Fidelity of half-precision gradients: their errors against float32, beside the errors that rounding explains."""

from tfmixed.fidelity.gradient_fidelity import GradientFidelity

__all__ = ["GradientFidelity"]
