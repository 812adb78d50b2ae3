"""Memory of training by purpose, what options would save, and the largest batch for a budget."""

from tfmixed.memory.estimation import estimate
from tfmixed.memory.memory_estimate import MemoryEstimate, Option
from tfmixed.memory.sizes import Held, Sizes, sizes_of, with_option

__all__ = ["Held", "MemoryEstimate", "Option", "Sizes", "estimate", "sizes_of", "with_option"]
