"""Types that all audit rules share: a rule takes an operation and its context, and returns a hazard or None."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import keras

from tfmixed.auditing.graph import DATA_MOVEMENT
from tfmixed.auditing.trace import Node, Trace
from tfmixed.auditing.value_bounds import ValueBounds
from tfmixed.formats import FORMATS

Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")


@dataclass(frozen=True)
class Hazard:
    """Risk of one operation, variable or layer in half precision. The fields are those of `Finding`."""

    op: str
    dtype: str
    severity: Severity
    risk: str
    advice: str = "compute it in float32"
    length: int | None = None


class Context:
    """Graph queries that rules need: bounds of values, consumers of operations and the outputs of the model."""

    def __init__(self, trace: Trace, on_cpu: bool) -> None:
        self.bounds = ValueBounds()
        self.on_cpu = on_cpu
        self.outputs = {id(tensor.op) for tensor in trace.outputs}
        self._consumers: dict[int, list[Any]] = defaultdict(list)
        for node in trace.nodes:
            for tensor in node.op.inputs:
                if not node.backward:
                    self._consumers[id(tensor.op)].append(node.op)

    def consumers(self, op: Any, through: frozenset[str] = frozenset()) -> Iterator[Any]:
        """Yields the forward operations that use the values of `op`, after data movement or operations `through`."""
        visited, pending = set(), list(self._consumers[id(op)])
        while pending:
            consumer = pending.pop()
            if id(consumer) not in visited:
                visited.add(id(consumer))
                yield consumer
                if consumer.type in DATA_MOVEMENT or consumer.type in through:
                    pending += self._consumers[id(consumer)]

    def is_output(self, op: Any) -> bool:
        """Returns whether the model returns the values of `op`, after data movement at most."""
        outputs = (user.type in DATA_MOVEMENT and id(user) in self.outputs for user in self.consumers(op))
        return id(op) in self.outputs or any(outputs)


def significant_bits(dtype: str) -> int:
    """Returns the number of significant binary digits of a format."""
    return 1 - round(math.log2(FORMATS[dtype].epsilon))


def short_number(value: float) -> str:
    """Returns a number rounded for a sentence."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


Rule = Callable[[Any, str, Context], Hazard | None]  # (operation, its half-precision dtype, context)
Found = tuple[Node | None, keras.Operation | None, Hazard]  # (operation, layer that contains it, hazard)
