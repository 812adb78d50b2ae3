"""Training speed and memory: float32, Keras's own mixed precision and tfmixed, side by side in one run."""

from tfmixed.bench.cases import VARIANTS, Case
from tfmixed.bench.reports import Report, Row
from tfmixed.bench.running import NETWORKS, run

__all__ = ["NETWORKS", "VARIANTS", "Case", "Report", "Row", "run"]
