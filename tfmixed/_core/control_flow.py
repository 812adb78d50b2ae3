"""Conditionals on tensors, and the execution context that decides how they are built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy
from keras import ops


def cond(
    predicate: Any, function: Callable[[], Any], shape: Sequence[int] | None = None, variables: Sequence[Any] = ()
) -> Any:
    """Returns `function()` where `predicate` holds, and zeros elsewhere.

    `tf.cond` is lowered to a switch for each tensor and variable that a branch uses. With 200 variables and Adam that
    costs a tenth of the update. Here the branch stays one operation where that is possible.

    Args:
        predicate: Boolean scalar. The Python value True calls `function` without a branch.
        function: Function without arguments, which may write variables.
        shape: Shape of the float32 tensor that `function` returns. Defaults to None, for a function that returns
            nothing.
        variables: Variables that `function` writes. Needed where they may be on several devices, since one operation
            runs on one device.
    """

    def otherwise() -> Any:
        return None if shape is None else ops.zeros(shape, "float32")

    if _is_known(predicate):
        return function() if predicate else otherwise()
    if not _is_one_cpu_graph() or len(devices(variables)) > 1:
        return ops.cond(predicate, function, otherwise)
    import tensorflow as tf

    taken = tf.function(function, autograph=False).get_concrete_function()
    operands = taken.captured_inputs
    signature = [tf.TensorSpec(operand.shape, operand.dtype) for operand in operands]

    def skipped(*operands: Any) -> Any:  # TensorFlow names its inputs after it, and warns of a leading underscore
        del operands
        return otherwise()

    untaken = tf.function(skipped, input_signature=signature, autograph=False).get_concrete_function()
    types = [] if shape is None else [tf.float32]
    results = tf.raw_ops.If(cond=predicate, input=operands, Tout=types, then_branch=taken, else_branch=untaken)
    return None if shape is None else tf.ensure_shape(results[0], shape)


def _is_known(predicate: Any) -> bool:
    if isinstance(predicate, bool | numpy.bool_):
        return True
    # JAX traces both branches even of a known predicate, and what they write would not leave the trace.
    if keras.backend.backend() != "jax":
        return False
    import jax

    return not isinstance(predicate, jax.core.Tracer)


def skip_unless(predicate: Any, function: Callable[[], None]) -> None:
    """Calls `function`. A graph may skip the call if `predicate` is false.

    Args:
        predicate: Boolean scalar.
        function: Function that changes nothing if `predicate` is false.
    """
    if _is_one_cpu_graph() and not in_session_graph():
        cond(predicate, function)
    elif keras.backend.backend() != "torch" or predicate:  # PyTorch has already waited for the finite check
        function()


def devices(variables: Sequence[Any]) -> set[str]:
    """Returns the TensorFlow devices of variables, Keras's or TensorFlow's own."""
    return {(variable.value if isinstance(variable, keras.Variable) else variable).device for variable in variables}


def in_graph() -> bool:
    """Returns whether TensorFlow is tracing a function, so that the values of tensors are not known."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def current_graph() -> Any:
    """Returns the graph that TensorFlow is building, or None."""
    if not in_graph():
        return None
    import tensorflow as tf

    return tf.compat.v1.get_default_graph()


def in_session_graph() -> bool:
    """Returns whether TensorFlow is building a graph for a `Session`, which runs only what is fetched."""
    if not in_graph():
        return False
    import tensorflow as tf

    return not tf.compat.v1.executing_eagerly_outside_functions()


def in_xla() -> bool:
    """Returns whether TensorFlow is tracing a function that XLA compiles as a whole (`jit_compile=True`)."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def is_single_tensorflow() -> bool:
    """Returns whether the backend is TensorFlow, without a distribution strategy."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.distribute.has_strategy()


def _is_one_cpu_graph() -> bool:
    # Under a strategy a branch may hold collectives, whose keys are lost on the way into a function. Beside an
    # accelerator the operands may be on two kinds of devices, which one operation cannot use.
    if not is_single_tensorflow():
        return False
    import tensorflow as tf

    if tf.executing_eagerly() or in_xla():
        return False
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())
