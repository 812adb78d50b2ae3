"""Order, branches and loops in TensorFlow 1's graphs, where nothing waits for anything that it does not take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

V1 = tf.compat.v1
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

    TensorFlow 1's conditionals put their own scope before them; a float32 checkpoint would not fit any more.

    Args:
        scope: The name scope around the branch.
    """
    with V1.name_scope("apply"):
        inner = tf.get_current_name_scope()

        def make(next_creator: Callable[..., Any], **arguments: Any) -> Any:
            present = tf.get_current_name_scope()
            wanted = (scope + present[len(inner) :]).lstrip("/") if (present + "/").startswith(inner + "/") else present
            with tf.init_scope(), V1.name_scope(wanted + "/" if wanted else None):
                return next_creator(**arguments)

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


def in_control_flow(graph: Any) -> bool:
    """Returns whether a branch or a loop of TensorFlow 1 is being made in a graph."""
    return graph._get_control_flow_context() is not None
