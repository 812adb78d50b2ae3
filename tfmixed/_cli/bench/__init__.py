"""Training speed and memory: float32, Keras's own mixed precision and tfmixed, side by side in one run."""

from tfmixed._cli.bench.cases import VARIANTS, Case
from tfmixed._cli.bench.reports import Report, Row
from tfmixed._cli.bench.running import NETWORKS, run

__all__ = ["NETWORKS", "VARIANTS", "Case", "Report", "Row", "run"]
