"""What can go wrong in one operation that runs in half precision, in a sentence with the number that matters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import keras

from tfmixed.auditing.bounds import Bounds
from tfmixed.auditing.origins import MOVES
from tfmixed.auditing.tracing import Node, Trace
from tfmixed.formats import FORMATS

Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")
IN_FLOAT32 = "compute it in float32"


@dataclass(frozen=True)
class Hazard:
    """What is unsafe about one operation.

    Args:
        op: What it does, in the field's words: `"sum"`, `"softmax"`, ...
        dtype: The half-precision format.
        severity: `"severe"`: wrong for values that are usual. `"warning"`: wrong for values that occur. `"note"`: less
            precise, or slower.
        risk: What goes wrong, and from which number on.
        advice: What to do.
        length: Terms of a reduction, as far as they are known.
    """

    op: str
    dtype: str
    severity: Severity
    risk: str
    advice: str = IN_FLOAT32
    length: int | None = None


class Context:
    """What the rules ask about a trace: bounds of values, and who uses them."""

    def __init__(self, trace: Trace, on_cpu: bool = True) -> None:
        self.bounds = Bounds()
        self.on_cpu = on_cpu
        self.outputs = {id(tensor.op) for tensor in trace.outputs}
        self._users: dict[int, list[Any]] = defaultdict(list)
        for node in trace.nodes:
            for tensor in node.op.inputs:
                if not node.backward:
                    self._users[id(tensor.op)].append(node.op)

    def users(self, op: Any, through: frozenset[str] = frozenset()) -> Iterator[Any]:
        """Yields the forward operations that use the values of `op`, moved or passed through those of these types."""
        seen, rest = set(), list(self._users[id(op)])
        while rest:
            user = rest.pop()
            if id(user) not in seen:
                seen.add(id(user))
                yield user
                if user.type in MOVES or user.type in through:
                    rest += self._users[id(user)]

    def is_output(self, op: Any) -> bool:
        """Tells whether what `op` makes is an output of the model, moved or cast at most."""
        return id(op) in self.outputs or any(id(user) in self.outputs for user in self.users(op) if user.type in MOVES)


def bits(dtype: str) -> int:
    """Returns the binary digits that a format keeps."""
    return 1 - round(math.log2(FORMATS[dtype].epsilon))


def number(value: float) -> str:
    """Returns a number with the digits that matter in a sentence."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


# Where it stands, in whose call, and what it is.
Found = tuple[Node | None, keras.Operation | None, Hazard]
# What a rule takes: the operation, the half-precision format that it runs in, and what surrounds it.
Rule = Callable[[Any, str, Context], Hazard | None]
