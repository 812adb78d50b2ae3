"""Training speed and memory: float32, Keras's own mixed precision and tfmixed, side by side in one run."""

from tfmixed._cli.bench.cases import NETWORKS, VARIANTS, Case, run
from tfmixed._cli.bench.tables import Report, Row

__all__ = ["NETWORKS", "VARIANTS", "Case", "Report", "Row", "run"]
