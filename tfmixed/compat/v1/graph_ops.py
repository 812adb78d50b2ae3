"""Execution order, branches and provenance of gradients in TensorFlow 1 graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops

from tfmixed._core import gradients

V1 = tf.compat.v1
# Operations without a value outside their branch or loop.
_CONTROL_FLOW = ("Merge", "RefMerge", "Enter", "RefEnter", "Exit", "NextIteration", "Placeholder")
# A function call runs on one machine, and its variables may be on parameter servers. TensorFlow inlines a function with
# this attribute before it places operations on devices.
_INLINED = {"_lower_as_multi_device_function": V1.AttrValue(b=True)}
_FINDING = "_tfmixed_found"


def in_order(function: Callable[..., Any], *tensors: Any) -> Any:
    """Returns `function(*tensors)`, whose reads and writes run in program order.

    In a graph, `function` starts when all tensors are computed, and its results wait for its writes.
    """
    if tf.executing_eagerly():
        return function(*tensors)

    def body(*tensors: Any) -> Any:
        # Once the body is inlined, its reads wait for nothing else.
        with V1.control_dependencies([tf.identity(tensor) for tensor in tensors]):
            return function(*tensors)

    with V1.get_default_graph()._attr_scope(_INLINED):
        return tf.function(body, autograph=False)(*tensors)


def in_control_flow(graph: Any) -> bool:
    """Returns whether a TensorFlow 1 branch or loop is being built in `graph`."""
    return graph._get_control_flow_context() is not None


@contextlib.contextmanager
def branch_with_writes(variables: Sequence[Any]) -> Iterator[None]:
    """Context in which `tf.cond` builds branches that can write `variables` and create slots outside the branch.

    The conditionals of TensorFlow 2 cannot capture reference variables. If eager execution was disabled after
    TensorFlow had created its context, `tf.init_scope` leaves a branch for eager code (TensorFlow 2.21), unless a graph
    was entered explicitly.
    """
    if tf.executing_eagerly():
        yield
        return
    references = any(variable.dtype != variable.dtype.base_dtype for variable in variables)
    switch = V1.control_flow_v2_enabled() and (references or not V1.resource_variables_enabled())
    if switch:
        V1.disable_control_flow_v2()
    try:
        with V1.get_default_graph().as_default():
            yield
    finally:
        if switch:
            V1.enable_control_flow_v2()


@contextlib.contextmanager
def create_variables_outside(scope: str) -> Iterator[None]:
    """Context in a branch that creates variables outside of it, under the names that they have without the branch.

    A TensorFlow 1 conditional adds its own scope to the names, which a float32 checkpoint does not have. TensorFlow
    only accepts initial values from outside, so they are copied there.

    Args:
        scope: The name scope around the branch.
    """
    copies: dict[Any, Any] = {}
    with V1.name_scope("apply"):
        inner = tf.get_current_name_scope()

        def create(next_creator: Callable[..., Any], **kwargs: Any) -> Any:
            name = tf.get_current_name_scope()
            wanted = (scope + name[len(inner) :]).lstrip("/") if (name + "/").startswith(inner + "/") else name
            with tf.init_scope(), V1.name_scope(wanted + "/" if wanted else None):
                initial_value = _copy_outside(kwargs.get("initial_value"), copies)
                return next_creator(**kwargs if initial_value is None else {**kwargs, "initial_value": initial_value})

        with contextlib.ExitStack() as scopes:
            branch = V1.get_default_graph()
            scopes.enter_context(V1.variable_creator_scope(create))
            with tf.init_scope():  # where slots are created
                if V1.get_default_graph() is not branch:
                    scopes.enter_context(V1.variable_creator_scope(create))
            yield


def _copy_outside(tensor: Any, copies: dict[Any, Any]) -> Any:
    """Returns a copy of a branch's tensor in the current graph, or None if that is impossible or unnecessary.

    Args:
        tensor: The initial value of a variable.
        copies: The copied operations, by those of the branch. Two variables may start with the same random numbers.
    """
    graph = V1.get_default_graph()
    if tf.executing_eagerly() or not isinstance(tensor, tf.Tensor):
        return None
    operation = tensor.op
    if operation.graph is graph and operation._get_control_flow_context() is None:
        return tensor
    for outer, inner in getattr(operation.graph, "captures", ()):
        if inner is tensor:
            return _copy_outside(outer, copies)
    if operation.type in ("Switch", "RefSwitch"):  # the inputs of a TensorFlow 1 branch
        return _copy_outside(operation.inputs[0], copies)
    if operation not in copies:
        copies[operation] = _copy_operation(operation, copies)
    return copies[operation] and copies[operation].outputs[tensor.value_index]


def _copy_operation(operation: Any, copies: dict[Any, Any]) -> Any:
    attributes = {name: value for name, value in operation.node_def.attr.items() if not name.startswith("_")}
    if operation.type in _CONTROL_FLOW or any(value.HasField("func") for value in attributes.values()):
        return None
    inputs = [_copy_outside(tensor, copies) for tensor in operation.inputs]
    if any(tensor is None for tensor in inputs):
        return None
    dtypes = [output.dtype for output in operation.outputs]
    return V1.get_default_graph().create_op(operation.type, inputs, dtypes, attrs=attributes, name=operation.name)


class Origins(NamedTuple):
    """The `compute_gradients` calls that gradients come from.

    Args:
        findings: The tensors of `GraphState.record` for these calls.
        complete: Whether the gradients depend on nothing else that could hide an overflow: no variable, placeholder or
            loop.
    """

    findings: Sequence[Any]
    complete: bool


def mark(gradient: Any, finding: Any) -> Any:
    """Returns a copy of a gradient that `origins` traces back to `finding`. Eagerly, returns the gradient itself."""
    if gradient is None or tf.executing_eagerly():
        return gradient
    with V1.get_default_graph()._attr_scope({_FINDING: V1.AttrValue(s=finding.name.encode())}):
        return gradients.with_values(gradient, tf.identity)


def origins(grads: Sequence[Any]) -> Origins:
    """Traces gradients back through the graph. Eagerly, their origin is unknown."""
    if tf.executing_eagerly():
        return Origins([], complete=False)
    findings: dict[int, Any] = {}
    complete, visited = True, set()
    waiting = [gradients.values_of(gradient).op for gradient in grads]
    while waiting:
        operation = waiting.pop()
        if operation in visited:
            continue
        visited.add(operation)
        finding = _finding_of(operation)
        if finding is not None and _is_accessible(finding.op):
            findings[id(finding)] = finding
            continue
        captured = _captured(operation)
        complete = complete and finding is None and (bool(captured) or not _is_external(operation))
        inputs = [tensor for tensor in (*operation.inputs, *captured) if tensor.dtype.is_floating]
        waiting += [tensor.op for tensor in inputs]
    return Origins(list(findings.values()), complete and bool(findings))


def _finding_of(operation: Any) -> Any:
    try:
        return operation.graph.get_tensor_by_name(operation.get_attr(_FINDING).decode())
    except (ValueError, KeyError):  # not marked, or imported into another graph under another name
        return None


def _is_accessible(operation: Any) -> bool:
    """Returns whether the current TensorFlow 1 branch or loop can use the result of an operation."""
    context = operation.graph._get_control_flow_context()
    while context is not None and context is not operation._get_control_flow_context():
        context = context.outer_context
    return context is operation._get_control_flow_context()


def _captured(operation: Any) -> list[Any]:
    """Returns the outer tensor that an input of a function or branch stands for, if any."""
    captures = getattr(operation.graph, "captures", ())
    return [outer for outer, inner in captures if inner is operation.outputs[0] and hasattr(outer, "op")]


def _is_external(operation: Any) -> bool:
    """Returns whether a value may come from another run of the session, or another iteration of a loop."""
    if operation.type == "Enter":
        return not operation.get_attr("is_constant")
    return operation.type in ("Placeholder", "PlaceholderWithDefault") or operation._is_stateful


def scale_loss(loss: Any, scale: Any) -> Any:
    """Returns losses times the scale in at least float32, because most scales are too large for float16."""
    if callable(loss):
        return lambda: scale_loss(loss(), scale)
    return tf.nest.map_structure(lambda value: ops.multiply(value, scale), loss)


def tensor(gradient: Any) -> Any:
    """Returns a gradient as a tensor.

    Accumulated gradients may be variables, or references with the behavior of TensorFlow 1.
    """
    if gradients.is_sparse(gradient):
        return gradient
    tensor = tf.convert_to_tensor(gradient)
    return tensor if tensor.dtype == tensor.dtype.base_dtype else tf.identity(tensor)


def cast_like(gradient: Any, variable: Any) -> Any:
    """Returns a gradient in the dtype of the variable, which the kernels of TensorFlow 1 need."""
    return gradients.with_values(gradient, lambda values: tf.cast(values, variable.dtype.base_dtype))


def no_op(operations: Sequence[Any]) -> Any:
    """Returns an operation that waits for others. Eagerly, returns None."""
    if tf.executing_eagerly():
        return None
    with V1.control_dependencies(operations):
        return tf.no_op()
