"""Where the values of a tensor in a TensorFlow graph come from: constants, sources, squares and terms of reductions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

# What leaves each value in its place.
_SAME = frozenset({"Identity", "Cast", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape"})
# What hands on the values of its first input, all of them, in another shape or order, ...
_ALL = _SAME | {"Reshape", "Squeeze", "ExpandDims", "Transpose", "BroadcastTo", "Tile", "ReverseV2"}
# ... or some of them.
MOVES = _ALL | {"StridedSlice", "Slice", "GatherV2", "GatherNd", "Split", "SplitV", "Unpack"}
_DEPTH = 60


def value(tensor: Any) -> Any:
    """Returns a constant's value as a float32, integer or boolean array, in whatever shape; None for what is none."""
    while tensor.op.type in _ALL:
        tensor = tensor.op.inputs[0]
    if tensor.op.type != "Const":
        return None
    import tensorflow as tf

    array = tf.make_ndarray(tensor.op.get_attr("value"))
    return array if array.dtype.kind in "iub" else array.astype("float32") if array.dtype.kind in "fV" else None


def is_same(first: Any, second: Any) -> bool:
    """Tells whether two tensors hold the same values in the same places, up to a cast."""
    first, second = (_unmoved(each) for each in (first, second))
    return first.op is second.op and first.value_index == second.value_index


def _unmoved(tensor: Any) -> Any:
    while tensor.op.type in _SAME:
        tensor = tensor.op.inputs[0]
    return tensor


def source(tensor: Any) -> Any:
    """Returns the operation that made the values of a tensor, through all that only moved them."""
    while tensor.op.type in MOVES:
        tensor = tensor.op.inputs[0]
    return tensor.op


def sources(tensor: Any, through: frozenset[str], depth: int = _DEPTH) -> Iterator[Any]:
    """Yields the operations that a tensor comes from through moves and operations of the types `through`."""
    op = source(tensor)
    yield op
    if op.type in through and depth:
        for each in op.inputs:
            yield from sources(each, through, depth - 1)


class Terms(NamedTuple):
    """How many values a reduction adds up.

    Args:
        number: The product of the lengths that are known.
        exact: Are all of them known?
        inner: Is the last axis, whose values lie side by side, among them?
    """

    number: int
    exact: bool
    inner: bool

    def __str__(self) -> str:
        return f"{self.number:,}" if self.exact else f"{self.number:,} x an unknown number of"


def terms(op: Any) -> Terms | None:
    """Returns the terms of a reduction over the axes that its second input names; None if they are not constant."""
    reduced, shape = axes(op), op.inputs[0].shape
    if reduced is None:
        return None
    # Axes of length 1 after the last that is longer change nothing in memory.
    longer = [axis for axis in range(shape.rank) if shape[axis] != 1]
    return terms_of([shape[axis] for axis in reduced], not longer or longer[-1] in reduced)


def axes(op: Any) -> set[int] | None:
    """Returns the axes that a reduction goes over, counted from the first; None if they are not constant."""
    given, rank = value(op.inputs[1]), op.inputs[0].shape.rank
    if given is None or rank is None:
        return None
    return {int(axis) % rank for axis in numpy.atleast_1d(given)} if rank else set()


def terms_of(sizes: list[int | None], inner: bool) -> Terms:
    """Returns the terms of a sum over axes of these lengths."""
    return Terms(math.prod(size for size in sizes if size is not None), None not in sizes, inner)


def is_square(tensor: Any) -> bool:
    """Tells whether every value of the tensor is the square of something."""
    op = source(tensor)
    if op.type == "Mul":
        return is_same(*op.inputs)
    return op.type in ("Square", "SquaredDifference") or (op.type == "Pow" and exponent(op) == 2)


def exponent(op: Any) -> float | None:
    """Returns the exponent of a `Pow`, if it is one constant."""
    array = value(op.inputs[1])
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None
