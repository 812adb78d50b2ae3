"""Updates of single variables, compiled by XLA once for all variables whose updates are equal. TensorFlow only.

XLA takes seconds and megabytes for each function that it compiles. Two updates are equal if their graphs are, except
for the variables that they read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any


class CompiledSteps:
    """Compiled functions by key."""

    def __init__(self) -> None:
        self._functions: dict[Hashable, tuple[Any, Sequence[Any]]] = {}
        self._shared: dict[Hashable, Any] = {}
        self._state: tuple[Hashable, Any] = ((), None)

    def begin(self, state: Hashable, held: Any) -> None:
        """Begins a step. Forgets all functions if the Python values that they may read have changed.

        Args:
            state: These values, as a key.
            held: Objects that the key holds by identity.
        """
        if self._state[0] != state:
            self._state = state, held
            self._functions.clear()
            self._shared.clear()

    def run(self, key: Hashable, step: Callable[..., None], *tensors: Any) -> None:
        """Calls `step(*tensors)`, compiled. The key stands for `step`."""
        key = key, tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        if key not in self._functions:
            self._functions[key] = self._compiled(step, tensors)
        function, captured = self._functions[key]
        function._call_flat(list(tensors), captured)

    def _compiled(self, step: Callable[..., None], tensors: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Returns a function, and the variables that it reads and writes in place of those that it was traced with."""
        import tensorflow as tf

        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        with tf.init_scope():
            traced = tf.function(step, jit_compile=True, autograph=False).get_concrete_function(*specs)
        return self._shared.setdefault(_structure(traced.graph), traced), traced.captured_inputs


def _structure(graph: Any) -> Hashable:
    """Returns what is equal for graphs that differ in names only."""
    places = {operation.name: place for place, operation in enumerate(graph.get_operations())}
    rows = [
        (
            operation.type,
            tuple((places[tensor.op.name], tensor.value_index) for tensor in operation.inputs),
            tuple(sorted(places[control.name] for control in operation.control_inputs)),
            tuple(
                (name, value.SerializeToString(deterministic=True))
                for name, value in sorted(operation.node_def.attr.items())
                if name[0] != "_" and name not in ("shared_name", "container")
            ),
        )
        for operation in graph.get_operations()
    ]
    ends = [tuple(places[tensor.op.name] for tensor in tensors) for tensors in (graph.inputs, graph.outputs)]
    return tuple(rows), *ends
