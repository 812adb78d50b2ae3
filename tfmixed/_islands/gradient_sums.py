"""Float32 sums in the backward pass, where the gradient functions of a backend add up half-precision terms.

The gradient of a broadcast is a sum: a bias is added to each row of a batch. In bfloat16 such a sum stops growing at
256 times a term. Matrix products accumulate in float32; these sums are replaced:

- TensorFlow on CPUs: `BiasAddGrad` in bfloat16; in float16 other broadcasts, and the gradients of convolution kernels;
  in both those of gathers, segment means, sparse products, running sums and resized images.
- JAX: the transposes of broadcasts and gathers.
- PyTorch on CPUs: convolutions in float16, whose kernels it adds up over the batch. They compute in float32.
- All backends: `keras.ops.take`, as in `Embedding`, gathers float32 rows and casts those, not the whole table.

Gradient functions belong to the process. They are replaced while a layer exists that was created under `set_policy`, or
given to `force_float32`.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Collection
from typing import Any

import keras
from keras import ops
from keras.src.backend import AutocastScope, nn, numpy

from tfmixed._utils.patching import around
from tfmixed.formats import HALF

_Gradient = Callable[..., Any]
# TensorFlow's operations whose gradient is computed in float32, and the dtypes for which it is wrong otherwise.
_CONVOLUTIONS = ("Conv2D", "Conv3D", "Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNative")
_BROADCASTS = ("BroadcastTo", "Tile", "BatchMatMulV2", "Xdivy", "Xlogy", "Xlog1py")
_SCATTERED = ("GatherV2", "GatherNd", "SegmentMean", "SparseTensorDenseMatMul", "ResizeNearestNeighbor", "Dilation2D")
_CAST = {
    **dict.fromkeys((*_BROADCASTS, *_CONVOLUTIONS), ("float16",)),
    **dict.fromkeys((*_SCATTERED, "Cumsum", "Cumprod"), HALF),
}
_covered: weakref.WeakSet[Any] = weakref.WeakSet()
_is_allowed = True
_covers_new_layers = False


def switch(on: bool, allowed: bool = True) -> None:
    """Sets whether new layers get float32 sums, and whether any layer does."""
    global _covers_new_layers, _is_allowed
    before = is_on()
    if on:
        _install()
    _covers_new_layers, _is_allowed = on, allowed
    _drop_traces(before)


def state() -> tuple[bool, bool]:
    """Returns the arguments of the last `switch`."""
    return _covers_new_layers, _is_allowed


def is_on() -> bool:
    """Returns whether gradients that are computed now have float32 sums."""
    return _is_allowed and (_covers_new_layers or len(_covered) > 0)


def replaced() -> tuple[str, ...]:
    """Returns the functions that are replaced in the process of this backend."""
    of = {
        "tensorflow": (f"the gradients of {', '.join(('BiasAdd', *_CAST))}", "math_grad._ReduceGradientArg"),
        "torch": ("keras.ops.conv and its relatives in float16",),
        "jax": ("the transposes of broadcast_in_dim, gather and tile", "lax._unbroadcast"),
    }
    return "keras.ops.take", *of.get(keras.backend.backend(), ())


def cover(layer: Any) -> None:
    """Gives a layer float32 sums for as long as it exists."""
    before = is_on()
    _install()
    _covered.add(layer)
    _drop_traces(before)


def _drop_traces(before: bool) -> None:
    """Drops transposed functions that JAX has cached, if the sums are on now or not allowed, unlike `before`."""
    if keras.backend.backend() == "jax" and before != is_on() and (is_on() or not _is_allowed):
        import jax

        jax.clear_caches()


@functools.cache
def _install() -> None:
    around(keras.layers.Layer, "__init__", _init)
    numpy.take = _take(numpy.take)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        _install_in_tensorflow()
    elif backend == "jax":
        _install_in_jax()
    else:
        for name in ("conv", "conv_transpose", "depthwise_conv", "separable_conv"):
            setattr(nn, name, _convolution(getattr(nn, name)))


def _init(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    original(layer, *args, **kwargs)
    if _covers_new_layers:
        _covered.add(layer)


def _take(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `keras.ops.take` for tensors and variables that are read in half precision, gathered in float32."""

    @functools.wraps(original)
    def take(x: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = keras.backend.standardize_dtype(getattr(x, "dtype", "float32"))
        if dtype not in HALF or not is_on():
            return original(x, *args, **kwargs)
        is_stored_wide = isinstance(x, keras.Variable) and x._dtype == "float32"
        with AutocastScope("float32"):
            wide = x if is_stored_wide else _with_dense_gradient(ops.cast(x, "float32"))
            return ops.cast(original(wide, *args, **kwargs), dtype)

    return take


def _with_dense_gradient(x: Any) -> Any:
    """Returns a tensor whose gradient is dense: TensorFlow adds up sparse ones after a cast to half precision."""
    if keras.backend.backend() != "tensorflow":
        return x
    import tensorflow as tf

    return tf.reshape(x, tf.shape(x)) if isinstance(x, tf.Tensor) else x


def _convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a convolution that PyTorch computes in float32 instead of float16 on CPUs."""

    @functools.wraps(original)
    def convolution(*args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else kwargs["inputs"]
        is_half = ops.is_tensor(inputs) and keras.backend.standardize_dtype(inputs.dtype) == "float16"
        if not is_half or inputs.device.type != "cpu" or not is_on():
            return original(*args, **kwargs)
        with AutocastScope("float32"):
            args, kwargs = keras.tree.map_structure(_widen, (args, kwargs))
            return ops.cast(original(*args, **kwargs), "float16")

    return convolution


def _widen(x: Any) -> Any:
    return ops.cast(x, "float32") if ops.is_tensor(x) else x


def _install_in_jax() -> None:
    from jax import lax
    from jax._src.lax import lax as lax_internal
    from jax.interpreters import ad

    tile = {lax.tile_p} if hasattr(lax, "tile_p") else set()  # JAX 0.8 or newer
    for primitive in {lax.broadcast_in_dim_p, lax.gather_p} | tile:
        ad.primitive_transposes[primitive] = _transpose(ad.primitive_transposes[primitive])
    lax_internal._unbroadcast = _unbroadcast(lax_internal._unbroadcast)


def _transpose(original: _Gradient) -> _Gradient:
    @functools.wraps(original)
    def transpose(gradient: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = getattr(gradient, "dtype", None)  # a symbolic zero has none
        if dtype not in HALF or not is_on():
            return original(gradient, *args, **kwargs)
        grads = original(gradient.astype("float32"), *args, **kwargs)
        return [None if grad is None else grad.astype(dtype) for grad in grads]

    return transpose


def _unbroadcast(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the sum over broadcast axes in the gradients of binary operations, in float32."""

    def unbroadcast(aval: Any, gradient: Any) -> Any:
        if gradient.dtype not in HALF or gradient.shape == aval.shape or not is_on():
            return original(aval, gradient)
        return original(aval, gradient.astype("float32")).astype(gradient.dtype)

    return unbroadcast


def _install_in_tensorflow() -> None:
    from tensorflow.python.framework import ops, test_util
    from tensorflow.python.ops import math_grad

    # Without oneDNN, TensorFlow adds up the gradients of kernels in bfloat16, too.
    kernels = HALF if not test_util.IsMklEnabled() else ("float16",)
    registry = ops.gradient_registry._registry
    registry["BiasAdd"]["type"] = _bias_gradient(registry["BiasAdd"]["type"])
    for op, dtypes in _CAST.items():
        registry[op]["type"] = _float32_gradient(registry[op]["type"], kernels if op in _CONVOLUTIONS else dtypes)
    math_grad._ReduceGradientArg = _reduction(math_grad._ReduceGradientArg)


def _bias_gradient(original: _Gradient) -> _Gradient:
    import tensorflow as tf

    def gradient(op: Any, received: Any) -> Any:
        if received.dtype != tf.bfloat16 or not _applies():
            return original(op, received)
        # TensorFlow's sum over bfloat16 accumulates in float32.
        shape = tf.shape(received)
        if op.get_attr("data_format") == b"NCHW":
            return received, tf.reduce_sum(tf.reshape(received, [shape[0], shape[1], -1]), [0, 2])
        return received, tf.reduce_sum(tf.reshape(received, [-1, shape[-1]]), 0)

    return gradient


def _float32_gradient(original: _Gradient, dtypes: Collection[str]) -> _Gradient:
    """Returns the gradient function of an operation, computed in float32 for gradients of these dtypes."""
    import tensorflow as tf

    def gradient(op: Any, received: Any) -> Any:
        half = received.dtype
        if half.name not in dtypes or not _applies():
            return original(op, received)
        # An input that the gradient does not need is None.
        inputs = [x if x is None or x.dtype != half else tf.cast(x, tf.float32) for x in op.inputs]
        grads = original(types.SimpleNamespace(inputs=inputs, get_attr=op.get_attr), tf.cast(received, tf.float32))
        if getattr(getattr(op.inputs[0], "op", None), "type", "") != "Cast":
            # TensorFlow adds up sparse gradients later, in half precision unless they are those of a cast variable.
            grads = [None if grad is None else tf.convert_to_tensor(grad) for grad in grads]
        return [None if grad is None else tf.cast(grad, half) for grad in grads]

    return gradient


def _reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the sum over broadcast axes in the gradients of binary operations, in float32."""
    import tensorflow as tf

    def reduction(grad: Any, shape_axes_must_reduce: Any) -> Any:
        *_, must_reduce = shape_axes_must_reduce
        if grad is None or must_reduce is False or grad.dtype != tf.float16 or not _applies():
            return original(grad, shape_axes_must_reduce)
        return tf.cast(original(tf.cast(grad, tf.float32), shape_axes_must_reduce), tf.float16)

    return reduction


def _applies() -> bool:
    return is_on() and not _has_gpu()


@functools.cache
def _has_gpu() -> bool:
    """Returns whether TensorFlow uses a GPU, whose kernels accumulate in float32."""
    import tensorflow as tf

    return bool(tf.config.get_visible_devices("GPU"))
