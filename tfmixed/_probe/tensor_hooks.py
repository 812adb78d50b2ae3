"""Hooks on tensors in the forward and the backward pass, for every Keras backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

_Function = Callable[[Any], Any]
_FLOAT32_BITS = 24  # of the significand


def hooked(
    call: Callable[..., Any], backward: _Function, forward: _Function | None = None, inputs: bool = False
) -> Callable[..., Any]:
    """Returns a layer's `call` with a hook on each output.

    Masks and the float32 values that `tfmixed` attaches to half-precision tensors are kept.

    Args:
        call: The `call` of the layer.
        backward: Takes the gradient that arrives, and returns the one that flows on.
        forward: Takes the output, and returns the values to return instead. Defaults to None, the output.
        inputs: Whether the inputs get the hook, too. Defaults to False.
    """

    def hook(x: Any) -> Any:
        if not _is_dense_float(x):
            return x
        y = _with_hook(x, backward, forward)
        if (mask := get_tensor_attr(x, "_keras_mask")) is not None:
            set_tensor_attr(y, "_keras_mask", mask)
        if (wide := get_tensor_attr(x, "_tfmixed_wide")) is not None:
            set_tensor_attr(y, "_tfmixed_wide", _with_hook(wide, backward, forward))
        return y

    @functools.wraps(call)
    def hooked_call(*args: Any, **kwargs: Any) -> Any:
        if inputs:
            args, kwargs = tree.map_structure(hook, (args, kwargs))
        return tree.map_structure(hook, call(*args, **kwargs))

    return hooked_call


def _is_dense_float(x: Any) -> bool:
    if not ops.is_tensor(x) or type(x).__name__ in ("RaggedTensor", "SparseTensor", "IndexedSlices", "BCOO"):
        return False
    return "float" in keras.backend.standardize_dtype(x.dtype)


def _with_hook(tensor: Any, backward: _Function, forward: _Function | None) -> Any:
    """Returns a tensor of the values of `forward`, whose gradient is that of `backward`."""
    backend = keras.backend.backend()
    if backend == "torch":
        if forward is not None:
            tensor = tensor + (forward(tensor) - tensor).detach()
        if tensor.requires_grad:
            tensor = tensor.view_as(tensor)  # a later in-place operation does not affect the hook
            tensor.register_hook(backward)
        return tensor
    values = forward or (lambda tensor: tensor)
    if backend == "jax":
        import jax

        function = jax.custom_vjp(values)
        function.defvjp(lambda tensor: (values(tensor), None), lambda _, gradient: (backward(gradient),))
        return function(tensor)
    import tensorflow

    return tensorflow.custom_gradient(lambda tensor: (tensorflow.identity(values(tensor)), backward))(tensor)


def dense(gradient: Any) -> Any:
    """Returns a gradient that may be `tf.IndexedSlices` as a tensor."""
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow

    return tensorflow.convert_to_tensor(gradient)


def deliver(function: Callable[..., Any], *tensors: Any) -> None:
    """Calls a function with the values of tensors, immediately or whenever the traced function runs."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        tensorflow.numpy_function(function, tensors, [])
    elif backend == "jax":
        import jax

        jax.debug.callback(function, *tensors)
    else:
        function(*map(ops.convert_to_numpy, tensors))


def bits(values: Any) -> Any:
    """Returns the bits of float32 values as a vector of int32."""
    return _bitcast(ops.reshape(values, (-1,)), "int32")


def _bitcast(values: Any, dtype: str) -> Any:
    if keras.backend.backend() != "tensorflow":
        return ops.view(values, dtype)
    import tensorflow  # Keras 3.15's `view` needs a known shape

    return tensorflow.bitcast(values, dtype)


def round_significand(values: Any, bits: int) -> Any:
    """Returns float32 values rounded to the nearest ones with a significand of `bits` bits, ties to even.

    Exponents are not limited. Not by casts, which compilers omit. The derivative is 1.
    """
    dropped = _FLOAT32_BITS - bits
    before = _bitcast(values, "int32")
    is_odd = ops.bitwise_and(ops.right_shift(before, dropped), 1)
    rounded = ops.bitwise_and(before + (2 ** (dropped - 1) - 1) + is_odd, -(2**dropped))
    change = _bitcast(rounded, "float32") - values  # exact
    return values + ops.stop_gradient(ops.where(ops.isfinite(change), change, 0.0))
