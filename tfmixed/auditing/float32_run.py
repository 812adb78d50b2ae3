"""One batch in half precision and in float32: the tensors at which the two runs first differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import tree

from tfmixed._probe.dry_run import loss_scale
from tfmixed._utils import temporary_state
from tfmixed.auditing.graph import DATA_MOVEMENT, ancestors
from tfmixed.auditing.hazards import Found, Hazard
from tfmixed.auditing.trace import Step, layer_of, layer_scopes, run_functions_eagerly
from tfmixed.formats import HALF


class Statistics(NamedTuple):
    """Statistics of the values of one tensor."""

    nonfinite: int
    zeros: int
    largest: float  # finite magnitude
    mean: float  # of the finite magnitudes
    size: int


@dataclass(frozen=True)
class Difference:
    """Statistics of one tensor in half precision and in float32."""

    layer: keras.Operation | None
    op: str  # type of the operation; for the gradient of a variable, the path of the variable
    dtype: str  # in the half-precision run
    half: Statistics
    full: Statistics

    @property
    def overflowed(self) -> int:
        """Number of values that are infinite or NaN, and finite in float32."""
        return max(0, self.half.nonfinite - self.full.nonfinite)

    @property
    def underflowed(self) -> float:
        """Share of the nonzero values that became 0."""
        nonzero = self.full.size - self.full.zeros
        return max(0, self.half.zeros - self.full.zeros) / nonzero if nonzero else 0.0

    @property
    def deviation(self) -> float:
        """Relative deviation of the mean magnitude from that in float32."""
        return abs(self.half.mean / self.full.mean - 1) if self.full.mean else 0.0

    @property
    def exceeds_rounding(self) -> bool:
        """True if the values are wrong, rather than rounded."""
        return self.overflowed > 0 or self.underflowed > 0.05 or self.deviation > 0.02


def compare(step: Step) -> Iterator[Found]:
    """Runs a training step in the model's precision and in float32, and yields the hazards that show.

    Layers with a `seed_generator` run in inference mode, since half precision draws other random numbers. The model is
    restored. Tensors are matched by the names of their operations. Tensors that depend on others that differ already,
    or on random numbers, are not reported.
    """
    with layer_scopes(step.model) as layers, temporary_state.random_layers_in_inference(layers):
        half, half_gradients = _run(step, layers)
        with temporary_state.in_float32(layers):
            full, full_gradients = _run(step, layers)
    for difference in _first_differences(half, full):
        yield None, difference.layer, _hazard(difference)
    dtype = next((tensor.dtype for tensor in half.values() if tensor.dtype in HALF), "float32")
    gradients = [Difference(None, path, dtype, values, full_gradients[path]) for path, values in half_gradients.items()]
    yield from ((None, None, hazard) for hazard in _gradient_hazards(gradients, step.model))


@dataclass(frozen=True)
class _Tensor:
    op: str
    dtype: str
    layer: keras.Operation | None
    inputs: tuple[str, ...]
    values: Statistics | None  # None: not floating, or data movement


def _run(step: Step, layers: Sequence[keras.Operation]) -> tuple[dict[str, _Tensor], dict[str, Statistics]]:
    """Returns the tensors of the forward pass by the names of their operations, and the gradients by variable path."""
    import tensorflow as tf

    ops: list[Any] = []
    paths: list[str] = []

    def run(inputs: Any, targets: Any) -> tuple[list[Any], list[Any]]:
        outputs, loss, gradients = step.run(inputs, targets)
        needed = ancestors([*tree.flatten(outputs), loss])
        ops[:] = [op for op in tf.compat.v1.get_default_graph().get_operations() if op in needed]
        paths[:] = gradients
        forward = [_statistics(op.outputs[0]) for op in ops if _is_compared(op)]
        return forward, [_statistics(gradient) for gradient in gradients.values()]

    with run_functions_eagerly(False):
        # The concrete function, because TensorFlow warns of functions that are traced repeatedly.
        traced = tf.function(run, autograph=False).get_concrete_function(step.inputs, step.targets)
        with temporary_state.variables(step.model, traced):
            results = traced(step.inputs, step.targets)
    forward, backward = ([_as_statistics(vector) for vector in vectors] for vectors in results)
    values = dict(zip((op.name for op in ops if _is_compared(op)), forward, strict=True))
    tensors = {}
    for op in ops:
        dtype, inputs = op.outputs[0].dtype.name if op.outputs else "", tuple(tensor.op.name for tensor in op.inputs)
        tensors[op.name] = _Tensor(op.type, dtype, layer_of(op.name, layers), inputs, values.get(op.name))
    return tensors, dict(zip(paths, backward, strict=True))


def _is_compared(op: Any) -> bool:
    return op.type not in DATA_MOVEMENT - {"Cast"} and len(op.outputs) > 0 and op.outputs[0].dtype.is_floating


def _statistics(tensor: Any) -> Any:
    import tensorflow as tf

    values = tf.abs(tf.cast(tensor, "float32"))
    is_finite = tf.math.is_finite(values)
    finite = tf.where(is_finite, values, 0.0)
    count = tf.math.count_nonzero(is_finite, dtype="float32")
    size = tf.cast(tf.size(values), "float32")
    zeros = tf.math.count_nonzero(tf.equal(values, 0.0), dtype="float32")
    mean = tf.math.divide_no_nan(tf.reduce_sum(finite), count)
    return tf.stack([size - count, zeros, tf.reduce_max(finite), mean, size])


def _as_statistics(vector: Any) -> Statistics:
    nonfinite, zeros, largest, mean, size = vector.numpy().tolist()
    return Statistics(int(nonfinite), int(zeros), largest, mean, int(size))


def _first_differences(half: dict[str, _Tensor], full: dict[str, _Tensor]) -> Iterator[Difference]:
    tainted: set[str] = set()
    for name, tensor in half.items():
        # A cast to half precision has no counterpart in float32: it is compared with its input.
        is_cast = tensor.op == "Cast" and tensor.dtype in HALF
        reference = half.get(tensor.inputs[0]) if is_cast else full.get(name)
        inherits, is_random = not tainted.isdisjoint(tensor.inputs), "Random" in tensor.op
        difference = None
        if tensor.values and reference and reference.values and reference.values.size == tensor.values.size:
            difference = Difference(tensor.layer, tensor.op, tensor.dtype, tensor.values, reference.values)
        differs = difference is not None and difference.exceeds_rounding
        if inherits or is_random or differs:
            tainted.add(name)
        if difference is None or not differs or is_random or tensor.op == "Const" or tensor.dtype not in HALF:
            continue
        # Some constants differ on purpose: an overflow after one of them is reported all the same.
        after_constant = any(half[name].op == "Const" for name in tensor.inputs if name in tainted and name in half)
        if not inherits or (after_constant and difference.overflowed):
            yield difference


def _hazard(difference: Difference) -> Hazard:
    half, full, dtype = difference.half, difference.full, difference.dtype
    op = f"a cast to {dtype}" if difference.op == "Cast" else difference.op
    if count := difference.overflowed:
        risk = f"{count:,} of {half.size:,} values overflowed: in float32 they reach {full.largest:.3g} ({op})"
        return Hazard("overflow", dtype, "severe", risk)
    if (share := difference.underflowed) > 0.05:
        risk = f"{share:.0%} of the values became 0: in float32 their mean is {full.mean:.2g} ({op})"
        return Hazard("underflow", dtype, "severe" if share > 0.5 else "warning", risk)
    deviation = difference.deviation
    risk = f"off by {deviation:.0%}: the mean is {half.mean:.3g}, in float32 {full.mean:.3g} ({op})"
    return Hazard("wrong values", dtype, "severe" if deviation > 0.1 else "warning", risk)


def _gradient_hazards(gradients: list[Difference], model: keras.Model) -> Iterator[Hazard]:
    """Yields one hazard for all gradients that overflow, and one for all that mostly become 0."""
    total, scale = len(model.trainable_variables), f"at a loss scale of {float(loss_scale(model)):,.0f}"
    if overflowed := [gradient for gradient in gradients if gradient.overflowed]:
        worst = max(overflowed, key=lambda gradient: gradient.overflowed / gradient.full.size)
        risk = f"gradients of {len(overflowed)} of {total} variables overflow {scale}, most in {worst.op}"
        advice = "a smaller scale; a dynamic one adjusts by itself"
        yield Hazard("gradient overflow", worst.dtype, "note", risk, advice)
    if underflowed := [gradient for gradient in gradients if not gradient.overflowed and gradient.underflowed > 0.5]:
        worst = max(underflowed, key=lambda gradient: gradient.underflowed)
        risk = f"more than half of the gradients of {len(underflowed)} of {total} variables become 0 {scale}, "
        yield Hazard("gradient underflow", worst.dtype, "warning", f"{risk}most in {worst.op}", "a larger loss scale")
