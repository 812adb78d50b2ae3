"""Queries on TensorFlow graphs: constants, the origin of values, squares and the number of terms of a reduction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

_IN_PLACE = frozenset({"Identity", "Cast", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape"})
_COMPLETE = _IN_PLACE | {"Reshape", "Squeeze", "ExpandDims", "Transpose", "BroadcastTo", "Tile", "ReverseV2"}
# Operations that return values of their data input, without changing them.
DATA_MOVEMENT = _COMPLETE | {"StridedSlice", "Slice", "GatherV2", "GatherNd", "Split", "SplitV", "Unpack"}
_MAX_DEPTH = 60


def data_input(op: Any) -> Any:
    """Returns the tensor whose values a data movement returns."""
    return op.inputs[1 if op.type == "Split" else 0]


def constant_value(tensor: Any) -> Any:
    """Returns the value of a constant as a flat or shaped float32, integer or boolean array; None for other tensors."""
    op = _through(tensor, _COMPLETE).op
    if op.type != "Const":
        return None
    import tensorflow as tf

    array = tf.make_ndarray(op.get_attr("value"))
    return array if array.dtype.kind in "iub" else array.astype("float32") if array.dtype.kind in "fV" else None


def is_same(first: Any, second: Any) -> bool:
    """Returns whether two tensors hold the same values in the same places, except for casts."""
    first, second = _through(first, _IN_PLACE), _through(second, _IN_PLACE)
    return first.op is second.op and first.value_index == second.value_index


def producer(tensor: Any) -> Any:
    """Returns the operation that computed the values of a tensor, skipping data movement."""
    return _through(tensor, DATA_MOVEMENT).op


def producers(tensor: Any, through: frozenset[str], depth: int = _MAX_DEPTH) -> Iterator[Any]:
    """Yields the operations that a tensor is computed from, through data movement and operations of these types."""
    op = producer(tensor)
    yield op
    if op.type in through and depth:
        for tensor in op.inputs:
            yield from producers(tensor, through, depth - 1)


def ancestors(tensors: Any) -> set[Any]:
    """Returns the operations that tensors depend on, including those that compute them."""
    found, pending = set(), [tensor.op for tensor in tensors]
    while pending:
        op = pending.pop()
        if op not in found:
            found.add(op)
            pending += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return found


class Terms(NamedTuple):
    """Number of values that a reduction combines into one."""

    number: int  # the product of the known axis lengths
    exact: bool  # whether all lengths are known
    inner: bool  # whether the last axis, whose values are adjacent in memory, is reduced

    @classmethod
    def of(cls, sizes: list[int | None], inner: bool) -> Terms:
        """Returns the terms of a reduction over axes of these lengths."""
        return cls(math.prod(size for size in sizes if size is not None), None not in sizes, inner)

    def __str__(self) -> str:
        return f"{self.number:,}" if self.exact else f"{self.number:,} x an unknown number of"


def terms(op: Any) -> Terms | None:
    """Returns the terms of a reduction whose second input is its axes; None if the axes are not constant."""
    axes, shape = reduced_axes(op), op.inputs[0].shape
    if axes is None:
        return None
    # Trailing axes of length 1 do not change the memory layout.
    longer = [axis for axis in range(shape.rank) if shape[axis] != 1]
    return Terms.of([shape[axis] for axis in axes], not longer or longer[-1] in axes)


def reduced_axes(op: Any) -> set[int] | None:
    """Returns the non-negative axes of a reduction; None if they are not constant."""
    axes, rank = constant_value(op.inputs[1]), op.inputs[0].shape.rank
    if axes is None or rank is None:
        return None
    return {int(axis) % rank for axis in numpy.atleast_1d(axes)} if rank else set()


def is_square(tensor: Any) -> bool:
    """Returns whether each value of the tensor is a square."""
    op = producer(tensor)
    if op.type == "Mul":
        return is_same(*op.inputs)
    return op.type in ("Square", "SquaredDifference") or (op.type == "Pow" and exponent(op) == 2)


def exponent(op: Any) -> float | None:
    """Returns the exponent of a `Pow` operation; None if it is not one constant."""
    array = constant_value(op.inputs[1])
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _through(tensor: Any, types: frozenset[str]) -> Any:
    while tensor.op.type in types:
        tensor = data_input(tensor.op)
    return tensor
