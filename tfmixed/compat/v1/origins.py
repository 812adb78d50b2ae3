"""Where the gradients of a step come from: which `compute_gradients` made them, as the graph tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfmixed._core import gradients

V1 = tf.compat.v1
_ATTRIBUTE = "_tfmixed_found"


class Origins(NamedTuple):
    """What reaches gradients by way of tensors.

    Args:
        found: The tensors that say what these gradients were like when they were computed, one a computation.
        complete: Does nothing else reach them: no variable, no placeholder, no loop?
    """

    found: Sequence[Any]
    complete: bool


def marked(gradient: Any, found: Any) -> Any:
    """Returns a gradient as an operation of its own, with the mark of what was found; where there is no graph, itself.

    Args:
        gradient: A tensor, a `tf.IndexedSlices` or None.
        found: The tensor that says so; the gradient waits for all that the graph is told to wait for.
    """
    if gradient is None or tf.executing_eagerly():
        return gradient
    with V1.get_default_graph()._attr_scope({_ATTRIBUTE: V1.AttrValue(s=found.name.encode())}):
        return gradients.with_values(gradient, tf.identity)


def of(grads: Sequence[Any]) -> Origins:
    """Returns where gradients come from: where there is no graph, from elsewhere."""
    if tf.executing_eagerly():
        return Origins([], complete=False)
    found: dict[int, Any] = {}
    complete, seen = True, set()
    waiting = [gradients.values_of(each).op for each in grads]
    while waiting:
        operation = waiting.pop()
        if operation in seen:
            continue
        seen.add(operation)
        mark = _mark(operation)
        if mark is not None and _is_visible(mark.op):
            found[id(mark)] = mark
            continue
        outside = list(_captured(operation))
        complete = complete and mark is None and (bool(outside) or not _is_from_elsewhere(operation))
        waiting += [
            each.op for each in (*operation.inputs, *outside) if not (each.dtype.is_integer or each.dtype.is_bool)
        ]
    return Origins(list(found.values()), complete and bool(found))


def _mark(operation: Any) -> Any:
    try:
        return operation.graph.get_tensor_by_name(operation.get_attr(_ATTRIBUTE).decode())
    except (ValueError, KeyError):  # there is no mark; or what it names, after an import under another name
        return None


def _is_visible(operation: Any) -> bool:
    """Returns whether TensorFlow 1's control flow lets the present code use what an operation returns."""
    context = operation.graph._get_control_flow_context()
    while context is not None and context is not operation._get_control_flow_context():
        context = context.outer_context
    return context is operation._get_control_flow_context()


def _captured(operation: Any) -> Iterator[Any]:
    """Yields the tensor outside that a function or a branch knows as this operation."""
    for outer, inner in getattr(operation.graph, "captures", ()):
        if inner is operation.outputs[0] and hasattr(outer, "op"):  # of eager code there is none
            yield outer


def _is_from_elsewhere(operation: Any) -> bool:
    """Returns whether a value may be of another run of the session, or of another turn of a loop."""
    if operation.type == "Enter":
        return not operation.get_attr("is_constant")
    return operation.type in ("Placeholder", "PlaceholderWithDefault") or operation._is_stateful
