"""What in a model's training step is unsafe in half precision, read from the graphs that TensorFlow traces.

    model -> tracing (each operation, with its layer) -> hazards, inspection (what is unsafe about it) -> findings

Given a batch, `comparison` runs the step in half precision and in float32 besides, and says where the two part.
"""

from tfmixed.auditing.findings import Audit, Finding
from tfmixed.auditing.reading import audit, is_traceable, specs, unsafe

__all__ = ["Audit", "Finding", "audit", "is_traceable", "specs", "unsafe"]
