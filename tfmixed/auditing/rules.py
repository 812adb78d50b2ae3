"""Which rule judges which type of operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfmixed.auditing import functions, origins, sums
from tfmixed.auditing.hazards import Context, Hazard, Rule
from tfmixed.auditing.tracing import Node
from tfmixed.formats import HALF

_UNBOUNDED = ("Exp", "Expm1", "Sinh", "Cosh", "Square", "SquaredDifference", "Pow", "Sum", "Prod", "Cumprod")


def find(node: Node, context: Context) -> Hazard | None:
    """Returns what is unsafe about an operation in float16 or bfloat16; None if nothing is."""
    rule = (sums.BACKWARD if node.backward else _FORWARD).get(node.op.type)
    if rule is None:
        return None
    tensors = node.op.outputs if node.op.type == "Cast" else node.op.inputs
    dtype = next((each.dtype.name for each in tensors if each.dtype.is_floating), "")
    return rule(node.op, dtype, context) if dtype in HALF or rule is functions.log else None


def _narrowed(op: Any, dtype: str, context: Context) -> Hazard | None:
    """Tells of what was computed in float32, and does not fit where it is cast to."""
    made = origins.source(op.inputs[0])
    if made.type in functions.LOSSES:  # `tf.nn` computes them in float32 and casts them back
        return functions.cross_entropy(op, dtype, context)
    if made.type not in _UNBOUNDED or made.outputs[0].dtype.name != "float32":
        return None
    found = _FORWARD[made.type](made, dtype, context)
    if found is None or found.severity != "severe":
        return None
    return replace(found, op="cast", risk=f"{found.risk}, and is cast to {dtype}", advice="take it in float32")


_FORWARD: dict[str, Rule] = {**sums.RULES, **functions.RULES, "Cast": _narrowed}
