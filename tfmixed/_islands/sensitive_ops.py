"""Layers and operations that go wrong in half precision, recognized by class, and the dtypes of their outputs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
from keras import tree

from tfmixed._islands import layer_rewrite
from tfmixed._islands.casts import Float32Activation
from tfmixed._utils import layer_tree
from tfmixed.formats import HALF

# From this length on, float16 `AveragePooling2D` errs five times as much as rounding its result would, and a sum
# overflows if its terms average 512 (TensorFlow 2.21 on a CPU). Running sums err as much from 64 on, also in bfloat16.
LONG = 128
_ACTIVATIONS = {"softmax", "log_softmax", "exponential", "sparsemax", "squareplus"}
_ACTIVATIONS |= {"softmax_v2", "log_softmax_v2", "exp"}  # the names in TensorFlow
# The square of 256 and the exponential of 12 are inf in float16, whatever the length of an axis.
_OPERATIONS = {"Softmax", "LogSoftmax", "Norm", "Normalize", "Exp", "Exp2", "Expm1", "Sinh", "Cosh", "Sparsemax"}
_OPERATIONS |= {"Squareplus", "Prod", "Nanprod", "Cumprod"}
_REDUCTIONS = {"Sum", "Nansum", "Logsumexp", "Cumsum", "AveragePool"}
_PRODUCTS = {"Matmul", "Einsum", "Dot", "Tensordot", "Inner", "Vdot", "Conv", "ConvTranspose", "DepthwiseConv"}
_PRODUCTS |= {"SeparableConv", "DotProductAttention"}

# The other normalizations of Keras, and layers such as GlobalAveragePooling2D, compute in float32 (Keras 3.15).
_CLASSES = (keras.layers.Softmax, keras.layers.UnitNormalization, keras.layers.Normalization, keras.layers.Attention)
_POOLING = (keras.layers.AveragePooling1D, keras.layers.AveragePooling2D, keras.layers.AveragePooling3D)


def is_sensitive(layer: Any) -> bool:
    """Returns whether the computation of a layer or operation goes wrong in half precision, its activation apart."""
    if is_operation(layer):
        return _is_sensitive_operation(layer)
    if isinstance(layer, keras.layers.Activation):
        return bool(sensitive_activations(layer))
    if isinstance(layer, keras.layers.GlobalAveragePooling1D):  # sums in half precision with a mask only
        inputs = [tensor for node in layer._inbound_nodes for tensor in node.input_tensors]
        return any(getattr(tensor, "_keras_mask", None) is not None for tensor in inputs)
    if isinstance(layer, _POOLING):
        return bool(math.prod(layer.pool_size) >= LONG)
    return isinstance(layer, _CLASSES) or (isinstance(layer, keras.layers.Dot) and bool(layer.normalize))


def sensitive_activations(layer: Any) -> list[str]:
    """Returns the attributes of a layer whose activations go wrong in half precision, recognized by function name."""
    return [name for name in layer_tree.activations_of(layer) if _is_sensitive_activation(getattr(layer, name))]


def _is_sensitive_activation(activation: Any) -> bool:
    if isinstance(activation, Float32Activation):
        return False
    activation = getattr(activation, "func", activation)  # of functools.partial
    return getattr(activation, "__name__", None) in _ACTIVATIONS


def _is_sensitive_operation(operation: Any) -> bool:
    name = layer_tree.original_class(operation).__name__
    if not layer_tree.is_keras(operation) or name not in _OPERATIONS | _REDUCTIONS:
        # A square overflows before the sum that follows does.
        after = [layer_tree.original_class(node.operation).__name__ for node in operation._outbound_nodes]
        return _is_power(operation) and not _REDUCTIONS.isdisjoint(after)
    inputs = operation._inbound_nodes[0].input_tensors
    return name in _OPERATIONS or _is_long(operation, inputs[0].shape) or _is_power(inputs[0]._keras_history[0])


def _is_power(operation: Any) -> bool:
    name = layer_tree.original_class(operation).__name__
    if name == "Multiply":
        return len({id(tensor) for tensor in operation._inbound_nodes[0].input_tensors}) == 1
    return name in {"Square", "Power"}


def _is_long(operation: Any, shape: tuple[int | None, ...]) -> bool:
    """Returns whether an operation reduces over 128 elements or more, or over an unknown number."""
    sizes = getattr(operation, "pool_size", None)
    if sizes is None:
        axes = range(len(shape)) if operation.axis is None else tree.flatten(operation.axis)
        sizes = [shape[axis] for axis in axes]
    return None in tree.flatten(sizes) or math.prod(tree.flatten(sizes)) >= LONG


def is_operation(layer: Any) -> bool:
    """Returns whether it is one of the `keras.ops` in a graph."""
    return not isinstance(layer, keras.layers.Layer)


def is_cheap(layer: Any) -> bool:
    """Returns whether float32 costs little: no matrix products, and no custom code."""
    if is_operation(layer):
        return layer_tree.original_class(layer).__name__ not in _PRODUCTS
    return layer_tree.is_keras(layer) and not (
        layer.weights or layer_tree.children(layer) or isinstance(layer, keras.layers.Dot)
    )


def is_half(layer: Any) -> bool:
    """Returns whether a layer or operation computes in half precision."""
    if not is_operation(layer):
        return layer.compute_dtype in HALF
    return any(tensor.dtype in HALF for node in layer._inbound_nodes for tensor in [*node.input_tensors, *node.outputs])


def final_activations(layer: Any) -> list[str]:
    """Returns the attributes that hold the nonlinear activations at the end of a Keras layer."""
    if not layer_tree.is_keras(layer) or isinstance(layer, keras.layers.RNN):
        return []
    return [name for name in layer_tree.activations_of(layer) if getattr(layer, name) is not keras.activations.linear]


def half_output(layer: Any) -> str | None:
    """Returns the half-precision dtype of a layer's outputs, or None."""
    if (rewritten := layer_rewrite.changes_of(layer).get("gives")) is not None:
        return rewritten if rewritten in HALF else None
    dtypes = [tensor.dtype for node in layer._inbound_nodes for tensor in node.outputs]
    if not dtypes and not is_operation(layer):
        dtypes = [layer.compute_dtype] if layer_tree.is_keras(layer) else _traced_dtypes(layer)
    return next((dtype for dtype in dtypes if dtype in HALF), None)


def _traced_dtypes(layer: Any) -> list[str]:
    """Returns the output dtypes of a custom layer, or its compute dtype if it cannot be traced."""
    shapes, dtype = layer._build_shapes_dict or {}, layer.compute_dtype

    def tensor(shape: Any) -> Any:
        if keras.backend.backend() == "torch":  # there Keras traces symbolic tensors without casting variables (3.15)
            return keras.ops.zeros([size or 1 for size in shape], dtype)
        return keras.KerasTensor(shape, dtype)

    inputs = {name.removesuffix("_shape"): tree.map_shape_structure(tensor, shape) for name, shape in shapes.items()}
    nodes = len(layer._inbound_nodes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = layer(*inputs.values()) if len(inputs) == 1 else layer(**inputs)
    except Exception:  # whatever the custom code raises
        return [dtype]
    del layer._inbound_nodes[nodes:]
    return [keras.backend.standardize_dtype(output.dtype) for output in tree.flatten(outputs)]
