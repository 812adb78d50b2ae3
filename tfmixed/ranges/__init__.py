"""Gradient ranges: losses of gradients to half precision by loss scale, and the scale to choose.

The method is that of Micikevicius et al., "Mixed Precision Training" (2017), section 3.2: measure the magnitudes, and
choose a scale with which the largest stays below 65,504.
"""

from tfmixed.ranges.gradient_ranges import GradientRanges, Suggestion
from tfmixed.ranges.tables import share_of_zeros, span

__all__ = ["GradientRanges", "Suggestion", "share_of_zeros", "span"]
