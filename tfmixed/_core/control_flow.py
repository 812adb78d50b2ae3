"""Branches on a tensor that cost little where they are hardly ever taken the other way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
from keras import ops

_F = TypeVar("_F", bound=Callable[..., Any])


def when(
    predicate: Any, then: Callable[[], Any], shape: Sequence[int] | None = None, variables: Sequence[Any] = ()
) -> Any:
    """Returns `then()`, a float32 tensor of `shape`, where `predicate` holds, else zeros.

    `tf.cond` is lowered to a switch for each tensor and variable that a branch uses: with 200 variables and Adam that
    costs a tenth of the update. Here the branch stays one operation where that is possible.

    Args:
        predicate: Boolean scalar.
        then: Takes nothing and may write variables.
        shape: None for a `then` that returns nothing.
        variables: Those that `then` writes, where they may be on several devices: one operation stands on one.
    """

    def otherwise() -> Any:
        return None if shape is None else ops.zeros(shape, "float32")

    if _is_known(predicate):
        return then() if predicate else otherwise()
    if not _is_one_cpu_graph() or len(devices(variables)) > 1:
        return ops.cond(predicate, then, otherwise)
    import tensorflow as tf

    taken = tf.function(then, autograph=False).get_concrete_function()
    operands = taken.captured_inputs
    signature = [tf.TensorSpec(operand.shape, operand.dtype) for operand in operands]

    def instead(*operands: Any) -> Any:  # TensorFlow names its inputs after it, and warns of a leading underscore
        del operands
        return otherwise()

    passed = tf.function(instead, input_signature=signature, autograph=False).get_concrete_function()
    types = [] if shape is None else [tf.float32]
    results = tf.raw_ops.If(cond=predicate, input=operands, Tout=types, then_branch=taken, else_branch=passed)
    return None if shape is None else tf.ensure_shape(results[0], shape)


def _is_known(predicate: Any) -> bool:
    # JAX traces both branches even of what it knows, and what they write would not leave the trace.
    if keras.backend.backend() != "jax":
        return False
    import jax

    return not isinstance(predicate, jax.core.Tracer)


def rarely(predicate: Any, act: Callable[[], None]) -> None:
    """Calls `act`, or lets a graph leave it out where `predicate` does not hold: there it must change nothing."""
    if _is_one_cpu_graph() and not in_session_graph():
        when(predicate, act)
    elif keras.backend.backend() != "torch" or predicate:  # which has waited for the verdict anyway
        act()


def as_it_is(function: _F) -> _F:
    """Keeps AutoGraph from rewriting `function` and all that it calls: for nothing, and a second a `tf.function`."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def devices(variables: Sequence[Any]) -> set[str]:
    """Returns the TensorFlow devices of Keras variables or of TensorFlow's own."""
    return {(each.value if isinstance(each, keras.Variable) else each).device for each in variables}


def in_graph() -> bool:
    """Returns whether TensorFlow is tracing a function: what tensors hold is not known then."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def graph() -> Any:
    """Returns the graph that TensorFlow is making, None if it is making none."""
    if not in_graph():
        return None
    import tensorflow as tf

    return tf.compat.v1.get_default_graph()


def in_session_graph() -> bool:
    """Returns whether TensorFlow is making a graph for a `Session`: what nobody fetches is not run there."""
    if not in_graph():
        return False
    import tensorflow as tf

    return not tf.compat.v1.executing_eagerly_outside_functions()


def in_xla() -> bool:
    """Returns whether TensorFlow is tracing a function that XLA will compile as a whole (`jit_compile=True`)."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def has_accelerator() -> bool:
    """Returns whether TensorFlow has devices besides CPUs: a branch that stays whole may not use two kinds."""
    import tensorflow as tf

    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def is_single_tensorflow() -> bool:
    """Returns whether the backend is TensorFlow, without a distribution strategy."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.distribute.has_strategy()


def _is_one_cpu_graph() -> bool:
    # Under a strategy a branch may hold collectives, whose keys are lost on the way into a function.
    if not is_single_tensorflow():
        return False
    import tensorflow as tf

    return not (tf.executing_eagerly() or in_xla() or has_accelerator())
