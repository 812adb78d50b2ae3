"""`audit`, and the parts of it that `force_float32` uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from tfmixed import hardware
from tfmixed._utils import layer_tree, model_building, temporary_state
from tfmixed.auditing import float32_run, math_functions, trace_rules
from tfmixed.auditing.findings import Audit, findings_of
from tfmixed.auditing.hazards import Context, Found
from tfmixed.auditing.input_specs import specs, target_specs, tensors
from tfmixed.auditing.trace import Step, Trace, is_called_by, leaves
from tfmixed.formats import HALF


def audit(model: keras.Model, inputs: Any = None, targets: Any = None) -> Audit:
    """Reports the operations of a model's training step that are unsafe in half precision.

    The forward and backward pass are traced, so that `keras.ops`, `tf.*` and custom layers are all read. The loss is
    that of `compile`. Variables and random states are restored; attributes that a layer sets in Python are not.

    Args:
        model: A Keras model. It is built from `inputs` if it is not built yet.
        inputs: A batch, as the model accepts it. It runs once in the model's precision and once in float32, and the
            first values that overflow, vanish or are wrong are reported. Defaults to None, which runs nothing.
        targets: The targets of the batch. Defaults to None, which leaves the loss out of the run.

    Returns:
        The findings, in the order of severity.

    Raises:
        ValueError: If `model` is not a Keras model, if `inputs` is None and the model is not built or does not know its
            input shapes, or if `inputs` or `targets` do not fit the model.
        NotImplementedError: If the Keras backend is not TensorFlow.

    Example:
    >>> layer = keras.layers.Lambda(lambda x: ops.sum(x, axis=-1, keepdims=True), dtype="mixed_float16")
    >>> model = keras.Sequential([keras.Input((12_544,)), layer, keras.layers.Dense(1, dtype="float32")])
    >>> audit(model).findings[0].risk
    'sum over 12,544 terms: overflows above a mean of 5.2'
    """
    if keras.backend.backend() != "tensorflow":
        backend = keras.backend.backend()
        raise NotImplementedError(f"`audit` needs the backend TensorFlow, whose graphs it reads. Received: {backend}")
    if not isinstance(model, keras.Model) or (inputs is None and not model.built):
        raise ValueError(f"`model` must be a Keras model that is built, or come with inputs. Received: {model!r:.80}")
    inputs, targets = tensors(inputs), tensors(targets)
    if not model.built:
        model_building.build(model, inputs)
    step, half = _traced_step(model, specs(model, inputs), targets)
    context = _context(half, inputs)
    found = [*_graph_hazards(step, half, context), *trace_rules.casts(half, context), *trace_rules.outputs(half)]
    found += [*trace_rules.variables(model), *trace_rules.optimizer(model), *trace_rules.speed(model, half, context)]
    if inputs is not None:
        found += float32_run.compare(Step(model, inputs, targets))
    dtypes = Counter(layer.compute_dtype for layer in model._flatten_layers(include_self=False, recursive=True))
    findings = findings_of(found, layer_tree.paths(model))
    return Audit(model.name, dict(sorted(dtypes.items())), findings, inputs is not None, step.targets is not None)


def is_traceable(model: keras.Model, inputs: Any) -> bool:
    """Returns whether a model can be called with inputs of these `tf.TensorSpec`."""
    try:
        Step(model, inputs).trace(backward=False)
    except Exception:  # of the user's code
        return False
    return True


def unsafe(model: keras.Model, inputs: Any) -> tuple[list[keras.Operation], list[keras.Operation]]:
    """Returns the layers whose own code needs float32, judged by a trace of the forward pass.

    Args:
        model: A built model.
        inputs: The `tf.TensorSpec` of its inputs, as `specs` returns them.

    Returns:
        The layers with a severe hazard that float32 repairs, and the layers that add a loss in half precision.

    Raises:
        ValueError: If the model cannot be called with these inputs.
    """
    step = Step(model, inputs)
    half = _traced(step, backward=False)
    severe = [
        layer
        for node, layer, hazard in _graph_hazards(step, half, _context(half, None))
        if hazard.severity == "severe" and not (node is not None and node.is_regularizer)
    ]
    # The logarithm of a half-precision softmax or sigmoid is repaired where the softmax or sigmoid is computed.
    owner = {id(node.op): node.layer for node in half.nodes}
    for node in half.nodes:
        found = math_functions.probabilities(node.op)
        if found is not None and node.layer in severe:
            severe.append(owner.get(id(found[0])))
    layers = list(layer_tree.paths(model))
    adding = [layer for layer, loss in half.losses if loss.dtype.name in HALF and is_called_by(loss.op, layer, layers)]
    return _unique_layers(severe), _unique_layers(adding)


def _unique_layers(layers: Iterable[Any]) -> list[Any]:
    return list({id(layer): layer for layer in layers if layer is not None}.values())


def _traced_step(model: keras.Model, inputs: Any, targets: Any) -> tuple[Step, Trace]:
    """Returns a step and its trace, with targets as given or as the loss accepts them, or else without a loss."""
    if targets is not None:
        step = Step(model, inputs, specs(model, targets))
        return step, step.trace()
    try:
        step = Step(model, inputs, target_specs(model, inputs))
        return step, step.trace()
    except Exception:  # the loss needs other targets, or the model other inputs
        step = Step(model, inputs)
    return step, _traced(step)


def _traced(step: Step, backward: bool = True) -> Trace:
    try:
        return step.trace(backward)
    except Exception as error:  # of the user's code
        raise ValueError(
            "`inputs` must be a batch that the model can be called with. "
            f"Received: {step.inputs}, with which the model raises {type(error).__name__}: {error}"
        ) from error


def _context(trace: Trace, inputs: Any) -> Context:
    context = Context(trace, hardware.describe().main.kind == "cpu")
    for tensor, values in zip(trace.inputs, leaves(inputs), strict=False):
        if values.dtype.is_integer and values.shape.num_elements():
            array = values.numpy()
            context.bounds.set(tensor, float(array.min()), float(array.max()))
    return context


def _graph_hazards(step: Step, half: Trace, context: Context) -> Iterator[Found]:
    def trace_float32() -> Trace:
        with temporary_state.in_float32(layer_tree.paths(step.model)):
            return step.trace(backward=False)

    yield from trace_rules.operations(half, context)
    yield from trace_rules.constants(half, trace_float32, context)
