"""Audit of a model's training step in half precision, based on the graphs that TensorFlow traces.

    model -> trace -> graph queries, value bounds -> rules -> findings

`float32_run` also runs a batch in half precision and in float32, and reports where the two first differ.
"""

from tfmixed.auditing.findings import Audit, Finding
from tfmixed.auditing.input_specs import specs
from tfmixed.auditing.model_audit import audit, is_traceable, unsafe

__all__ = ["Audit", "Finding", "audit", "is_traceable", "specs", "unsafe"]
