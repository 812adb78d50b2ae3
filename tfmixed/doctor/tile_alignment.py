"""Layer widths that half-precision matrix units pad to a multiple of their tile size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras

from tfmixed.formats import HALF
from tfmixed.hardware import Kind

# NVIDIA's guide: float16 and bfloat16 in multiples of 8. AMX tiles and AVX512 registers hold 16 float32 sums.
# Google's guide: a TPU's matrix unit is 128 wide.
MULTIPLES: dict[Kind, int] = {"cpu": 16, "gpu": 8, "tpu": 128}


@dataclass(frozen=True)
class Width:
    """A layer width that is not a multiple of the tile size.

    Args:
        layer: The path of the layer.
        kind: The class name of the layer.
        name: The name of the width: `"inputs"`, `"units"`, `"filters"`, `"key_dim"`, ...
        width: The width.
        better: The next multiple of the tile size.
    """

    layer: str
    kind: str
    name: str
    width: int
    better: int


def odd_widths(model: keras.Model, multiple: int) -> tuple[Width, ...]:
    """Returns the widths of matrix products and convolutions in a built model that are not multiples of `multiple`.

    Float32 layers in a half-precision model are ignored.

    Example:
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(30, name="hidden")])
    >>> [(width.name, width.width, width.better) for width in odd_widths(model, 8)]
    [('units', 30, 32)]
    """
    layers = list(model._flatten_layers(include_self=True, recursive=True))
    mixed = any(layer.compute_dtype in HALF for layer in layers)
    return tuple(
        Width(layer.path, type(layer).__name__, name, width, math.ceil(width / multiple) * multiple)
        for layer in layers
        if not mixed or layer.compute_dtype in HALF
        for name, width in _widths(layer).items()
        if width % multiple
    )


def _widths(layer: keras.layers.Layer) -> dict[str, int]:
    """Returns the inner and outer dimensions of a layer's own matrix products, by name."""
    match layer:
        case keras.layers.Embedding():
            return {"output_dim": layer.output_dim}
        case keras.layers.MultiHeadAttention():
            return {"key_dim": layer.key_dim, "value_dim": layer.value_dim}
        case keras.layers.GroupQueryAttention():
            return {"head_dim": layer.head_dim}
        case keras.layers.EinsumDense():
            return _einsum_widths(layer.equation, layer.kernel.shape)
        case keras.layers.LSTMCell() | keras.layers.GRUCell() | keras.layers.SimpleRNNCell():
            return {"inputs": layer.kernel.shape[0], "units": layer.units}
        case keras.layers.Conv1DTranspose() | keras.layers.Conv2DTranspose() | keras.layers.Conv3DTranspose():
            return {"inputs": layer.kernel.shape[-1], "filters": layer.kernel.shape[-2]}
        case keras.layers.DepthwiseConv1D() | keras.layers.DepthwiseConv2D():
            return {}  # not a matrix product
        case keras.layers.SeparableConv1D() | keras.layers.SeparableConv2D():
            return _kernel_widths(layer.pointwise_kernel, "filters")
    return _kernel_widths(getattr(layer, "kernel", None), "filters" if hasattr(layer, "filters") else "units")


def _kernel_widths(kernel: Any, outer: str) -> dict[str, int]:
    shape: tuple[int, ...] = getattr(kernel, "shape", ())
    return {"inputs": shape[-2], outer: shape[-1]} if len(shape) >= 2 else {}


def _einsum_widths(equation: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Returns the product of the axes that are summed over, and of those that reach the output."""
    operands, _, output = equation.replace(" ", "").partition("->")
    axes = dict(zip(operands.partition(",")[2].replace("...", ""), shape, strict=True))
    inner, outer = ({axis: size for axis, size in axes.items() if (axis in output) is kept} for kept in (False, True))
    return {"inputs": math.prod(inner.values()), "units": math.prod(outer.values())}
