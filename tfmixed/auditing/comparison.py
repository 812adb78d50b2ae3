"""What a step's values became in half precision, tensor by tensor, against the same step in float32."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

from tfmixed._utils import temporary_state
from tfmixed.auditing.differences import Difference, Values
from tfmixed.auditing.origins import MOVES
from tfmixed.auditing.tracing import Step, ancestors, functions_run_eagerly, layer_of, scoped
from tfmixed.formats import HALF


@dataclass(frozen=True)
class _Tensor:
    op: str
    dtype: str
    layer: keras.Operation | None
    inputs: tuple[str, ...]
    values: Values | None  # None: not floating, or only moved

    @classmethod
    def of(cls, op: Any, layers: Sequence[keras.Operation], values: Values | None) -> _Tensor:
        dtype = op.outputs[0].dtype.name if op.outputs else ""
        return cls(op.type, dtype, layer_of(op.name, layers), tuple(tensor.op.name for tensor in op.inputs), values)


def differences(step: Step) -> Iterator[Difference]:
    """Runs a step in the model's own precision and in float32, and yields where the two part.

    It is a training step, with the optimizer's loss scale; layers with a `seed_generator` run as in inference. The
    model is left as it was. Tensors are matched by the names of their operations; what the float32 step does not have
    is left out, and what depends on another that parted, or on random numbers, since half precision draws others.
    """
    with scoped(step.model) as layers, _quiet(layers):
        half, half_gradients = _run(step, layers)
        with temporary_state.in_float32(layers):
            full, full_gradients = _run(step, layers)
    found = dict(_differences(half, full))
    tainted: set[str] = set()
    for name, tensor in half.items():
        each = found.get(name)
        after, random = not tainted.isdisjoint(tensor.inputs), "Random" in tensor.op
        if after or random or (each is not None and each.parted):
            tainted.add(name)
        # Constants that half precision does not hold are a finding of their own, and some are other ones on purpose.
        constant = any(half[each].op == "Const" and each in tainted for each in tensor.inputs if each in half)
        first = not after or (constant and each is not None and each.overflowed)
        if each is not None and each.parted and each.dtype in HALF and first and not random and tensor.op != "Const":
            yield each
    for path, values in half_gradients.items():
        each = Difference(None, path, _half_of(half), values, full_gradients[path], backward=True)
        if each.overflowed or each.vanished > 0.5:
            yield each


def _differences(half: dict[str, _Tensor], full: dict[str, _Tensor]) -> Iterator[tuple[str, Difference]]:
    for name, tensor in half.items():
        # A cast to half precision has no counterpart but what it casts.
        cast = tensor.op == "Cast" and tensor.dtype in HALF
        other = half.get(tensor.inputs[0]) if cast else full.get(name)
        if tensor.values and other is not None and other.values and other.values.size == tensor.values.size:
            yield name, Difference(tensor.layer, tensor.op, tensor.dtype, tensor.values, other.values)


def _half_of(tensors: dict[str, _Tensor]) -> str:
    return next((tensor.dtype for tensor in tensors.values() if tensor.dtype in HALF), "float32")


def _run(step: Step, layers: Sequence[keras.Operation]) -> tuple[dict[str, _Tensor], dict[str, Values]]:
    import tensorflow as tf

    ops: list[Any] = []
    counted: list[Any] = []
    paths: list[str] = []

    def run(inputs: Any, targets: Any) -> tuple[list[Any], list[Any]]:
        outputs, loss, gradients = step.run(inputs, targets)
        needed = ancestors([*tree.flatten(outputs), loss])
        ops[:] = [op for op in tf.compat.v1.get_default_graph().get_operations() if op in needed]
        counted[:] = [op for op in ops if _counts(op)]
        paths[:] = gradients
        return [_summary(op.outputs[0]) for op in counted], [_summary(gradient) for gradient in gradients.values()]

    with functions_run_eagerly(False):  # the graph is looked at, whatever the script set
        # Not called as it is: TensorFlow warns of functions that are made from one code again and again.
        traced = tf.function(run, autograph=False).get_concrete_function(step.inputs, step.targets)
        with temporary_state.variables(step.model, traced):
            forward, backward = traced(step.inputs, step.targets)
    values = {op.name: _values(summary) for op, summary in zip(counted, forward, strict=True)}
    tensors = {op.name: _Tensor.of(op, layers, values.get(op.name)) for op in ops}
    return tensors, {path: _values(summary) for path, summary in zip(paths, backward, strict=True)}


def _counts(op: Any) -> bool:
    values = op.type not in MOVES - {"Cast"}
    return values and len(op.outputs) > 0 and op.outputs[0].dtype.is_floating


def _summary(tensor: Any) -> Any:
    import tensorflow as tf

    values = tf.abs(tf.cast(tensor, "float32"))
    finite = tf.math.is_finite(values)
    known = tf.where(finite, values, 0.0)
    count = tf.math.count_nonzero(finite, dtype="float32")
    size = tf.cast(tf.size(values), "float32")
    zeros = tf.math.count_nonzero(tf.equal(values, 0.0), dtype="float32")
    mean = tf.math.divide_no_nan(tf.reduce_sum(known), count)
    return tf.stack([size - count, zeros, tf.reduce_max(known), mean, size])


def _values(summary: Any) -> Values:
    bad, zeros, largest, mean, size = summary.numpy().tolist()
    return Values(int(bad), int(zeros), largest, mean, int(size))


@contextlib.contextmanager
def _quiet(layers: Sequence[keras.Operation]) -> Iterator[None]:
    """Lets layers that draw random numbers, which half precision draws otherwise, run as in inference."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if _draws(layer):
                temporary_state.put(stack, layer, "call", functools.partial(_in_inference, layer.call))
        yield


def _in_inference(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **{**kwargs, "training": False})


def _draws(layer: keras.Operation) -> bool:
    return hasattr(layer, "seed_generator") and "training" in inspect.signature(layer.call).parameters
