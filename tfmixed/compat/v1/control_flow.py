"""Order, branches and loops in TensorFlow 1's graphs, where nothing waits for anything that it does not take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

V1 = tf.compat.v1
# What has no value of its own outside of its branch or loop.
_OF_CONTROL_FLOW = ("Merge", "RefMerge", "Enter", "RefEnter", "Exit", "NextIteration", "Placeholder")
# A function that is called runs on one machine alone, and the variables may be on parameter servers: TensorFlow puts
# the operations of one that is marked so into the graph before it gives them devices.
_INLINED = {"_lower_as_multi_device_function": V1.AttrValue(b=True)}


def as_one(function: Callable[..., Any], *tensors: Any) -> Any:
    """Returns what `function` returns of tensors.

    In a graph it begins when all of them are there, its reads and writes run in the order in which they stand there,
    and what it returns waits for them.
    """
    if tf.executing_eagerly():
        return function(*tensors)

    def whole(*tensors: Any) -> Any:
        # Once it is inlined, its reads wait for nothing else.
        with V1.control_dependencies([tf.identity(each) for each in tensors]):
            return function(*tensors)

    with V1.get_default_graph()._attr_scope(_INLINED):
        return tf.function(whole, autograph=False)(*tensors)


@contextlib.contextmanager
def variables_outside(scope: str) -> Iterator[None]:
    """Lets variables that are made within a branch have the names that they would have without it.

    TensorFlow 1's conditionals put their own scope before them; a float32 checkpoint would not fit any more. Tensors
    that such variables start with are computed outside too: TensorFlow takes no others.

    Args:
        scope: The name scope around the branch.
    """
    with V1.name_scope("apply"):
        inner, copies = tf.get_current_name_scope(), dict[Any, Any]()

        def make(next_creator: Callable[..., Any], **arguments: Any) -> Any:
            present = tf.get_current_name_scope()
            wanted = (scope + present[len(inner) :]).lstrip("/") if (present + "/").startswith(inner + "/") else present
            with tf.init_scope(), V1.name_scope(wanted + "/" if wanted else None):
                first = _outside(arguments.get("initial_value"), copies)
                return next_creator(**arguments if first is None else {**arguments, "initial_value": first})

        with contextlib.ExitStack() as scopes:
            here = V1.get_default_graph()
            scopes.enter_context(V1.variable_creator_scope(make))
            with tf.init_scope():  # slots are made there, whatever the branch is
                if V1.get_default_graph() is not here:
                    scopes.enter_context(V1.variable_creator_scope(make))
            yield


@contextlib.contextmanager
def branches_that_hold(variables: Sequence[Any]) -> Iterator[None]:
    """Lets `tf.cond` make branches that may write these variables, and make slots in the graph around them.

    References, as TensorFlow 1's variables of old are, do not go into the functions that TensorFlow 2 makes of them.
    And where eager execution was disabled after TensorFlow had made its context, `tf.init_scope` leaves a branch for
    eager code (TensorFlow 2.21), unless somebody has entered the graph.
    """
    if tf.executing_eagerly():
        yield
        return
    refers = not V1.resource_variables_enabled() or any(each.dtype != each.dtype.base_dtype for each in variables)
    changes = refers and V1.control_flow_v2_enabled()
    if changes:
        V1.disable_control_flow_v2()
    try:
        with V1.get_default_graph().as_default():
            yield
    finally:
        if changes:
            V1.enable_control_flow_v2()


def _outside(tensor: Any, copies: dict[Any, Any]) -> Any:
    """Returns a tensor of a branch, computed again in the present graph; None where that cannot be, or need not.

    Args:
        tensor: What a variable is to start with.
        copies: Operations that were copied, by those of the branch: two variables may start with the same numbers.
    """
    graph = V1.get_default_graph()
    if tf.executing_eagerly() or not isinstance(tensor, tf.Tensor):
        return None
    operation = tensor.op
    if operation.graph is graph and operation._get_control_flow_context() is None:
        return tensor
    for outer, inner in getattr(operation.graph, "captures", ()):
        if inner is tensor:
            return _outside(outer, copies)
    if operation.type in ("Switch", "RefSwitch"):  # how a branch of TensorFlow 1 knows what is outside
        return _outside(operation.inputs[0], copies)
    if operation not in copies:
        copies[operation] = _copied(operation, copies)
    return copies[operation] and copies[operation].outputs[tensor.value_index]


def _copied(operation: Any, copies: dict[Any, Any]) -> Any:
    attributes = {name: value for name, value in operation.node_def.attr.items() if not name.startswith("_")}
    if operation.type in _OF_CONTROL_FLOW or any(each.HasField("func") for each in attributes.values()):
        return None
    inputs = [_outside(each, copies) for each in operation.inputs]
    if any(each is None for each in inputs):
        return None
    dtypes = [each.dtype for each in operation.outputs]
    return V1.get_default_graph().create_op(operation.type, inputs, dtypes, attrs=attributes, name=operation.name)


def in_control_flow(graph: Any) -> bool:
    """Returns whether a branch or a loop of TensorFlow 1 is being made in a graph."""
    return graph._get_control_flow_context() is not None
