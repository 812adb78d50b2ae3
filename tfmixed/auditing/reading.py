"""What in a model's forward and backward pass is unsafe in half precision."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
from keras import tree

from tfmixed import hardware
from tfmixed._utils import layer_tree, model_building, temporary_state
from tfmixed.auditing import comparison, differences, functions, inspection, rules, tracing
from tfmixed.auditing.findings import Audit, Finding
from tfmixed.auditing.hazards import SEVERITIES, Context, Found
from tfmixed.auditing.inputs import specs_from, specs_of, targets_for
from tfmixed.auditing.tracing import Node, Step, Trace
from tfmixed.formats import HALF

_OURS = f"{Path(__file__).parents[1]}{os.sep}"


def audit(model: keras.Model, inputs: Any = None, targets: Any = None) -> Audit:
    """Reads what a model's training step computes in half precision, and tells what can go wrong.

    The step is traced forward and backward, so that `keras.ops`, `tf.*` and custom layers are seen alike; the loss is
    that of `compile`. Variables and random states are afterwards as they were; attributes that a layer sets in Python
    are not.

    Args:
        model: A model. One that is not built yet is built for `inputs`, as `fit` would build it.
        inputs: A batch, as the model takes it. It is run once in the model's precision and once in float32, and what
            overflowed, vanished or came out wrong is reported where it first did. None only reads.
        targets: The batch's targets. None leaves the loss out of the run.

    Returns:
        The findings, the gravest first.

    Raises:
        ValueError: If `model` is not a Keras model, or no inputs are given and it is not built or does not tell their
            shape, or targets are given and it has no loss.
        NotImplementedError: Keras runs on another backend than TensorFlow, whose graphs this reads.

    Example:
    >>> layer = keras.layers.Lambda(lambda x: ops.sum(x, axis=-1, keepdims=True), dtype="mixed_float16")
    >>> model = keras.Sequential([keras.Input((12_544,)), layer, keras.layers.Dense(1, dtype="float32")])
    >>> audit(model).findings[0].risk
    'sum over 12,544 terms: overflows above a mean of 5.2'
    """
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            f"audit reads TensorFlow's graphs, received the backend {keras.backend.backend()!r}: set "
            "KERAS_BACKEND=tensorflow"
        )
    if not isinstance(model, keras.Model) or (inputs is None and not model.built):
        raise ValueError(f"`model` must be a Keras model that is built, or come with inputs. Received: {model!r:.80}")
    given = _tensors(inputs), _tensors(targets)
    if not model.built:
        model_building.build(model, given[0])
    specs = specs_of(model) if inputs is None else specs_from(given[0])
    step, half = _step(model, specs, given[1])
    context = _context(half, given[0])
    found = [*_of_graph(step, half, context), *inspection.casts(half, context), *inspection.outputs(half)]
    found += [*inspection.losses(half), *inspection.variables(model), *inspection.speed(model, half, context)]
    if inputs is not None:
        found += differences.found_in(list(comparison.differences(Step(model, *given))), model)
    dtypes = [layer.compute_dtype for layer in model._flatten_layers(include_self=False, recursive=True)]
    counts = {dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))}
    return Audit(
        model.name, counts, tuple(_merged(found, layer_tree.paths(model))), inputs is not None, step.targets is not None
    )


def specs(model: keras.Model, inputs: Any = None) -> Any:
    """Returns the `tf.TensorSpec` of a model's inputs.

    Raises:
        ValueError: The model does not tell them, and none are given.
    """
    return specs_of(model) if inputs is None else specs_from(_tensors(inputs))


def is_traceable(model: keras.Model, inputs: Any) -> bool:
    """Tells whether a model can be called with inputs of these `tf.TensorSpec`."""
    try:
        Step(model, inputs).trace(backward=False)
    except Exception:  # whatever the user's code raises
        return False
    return True


def unsafe(model: keras.Model, inputs: Any) -> tuple[list[keras.Operation], list[keras.Operation]]:
    """Returns the layers whose own code needs float32, as far as reading alone tells: for hazards, and for losses.

    Args:
        model: As in `audit`.
        inputs: What `specs` returned.

    Returns:
        Those with a severe hazard that float32 repairs, and those that add a loss in half precision.

    Raises:
        ValueError: The model cannot be called with these inputs.
    """
    step = Step(model, inputs)
    try:
        half = step.trace(backward=False)
    except Exception as error:  # whatever the user's code raises
        raise _untraceable(inputs, error) from error
    found = _of_graph(step, half, _context(half, None))
    layers = [
        layer
        for node, layer, hazard in found
        if hazard.severity == "severe" and not (node is not None and node.is_regularizer)
    ]
    # The logarithm of a half-precision softmax or sigmoid is mended where that is computed.
    owner = {id(node.op): node.layer for node in half.nodes}
    for node in half.nodes:
        made = functions.probabilities(node.op)
        if made is not None and node.layer in layers:
            layers.append(owner.get(id(made[0])))
    inside = list(layer_tree.paths(model))
    adding = [
        layer for layer, loss in half.losses if loss.dtype.name in HALF and tracing.stands_in(loss.op, layer, inside)
    ]
    return _distinct(layers), _distinct(adding)


def _distinct(layers: Iterable[Any]) -> list[Any]:
    return list({id(layer): layer for layer in layers if layer is not None}.values())


def _step(model: keras.Model, specs: Any, targets: Any) -> tuple[Step, Trace]:
    """Returns a step that can be traced, and its trace: with targets that are made up if need be, or without a loss."""
    if targets is not None:
        step = Step(model, specs, specs_from(targets))
        return step, step.trace()
    try:
        step = Step(model, specs, targets_for(model, specs))
        return step, step.trace()
    except Exception:  # the loss takes other targets, or the model other inputs
        step = Step(model, specs)
    try:
        return step, step.trace()
    except Exception as error:
        raise _untraceable(specs, error) from error


def _untraceable(specs: Any, error: Exception) -> ValueError:
    raised = f"{type(error).__name__}: {error}"
    return ValueError(f"inputs must be a batch that the model can be called with. With {specs} it raises {raised}")


def _context(trace: Trace, inputs: Any) -> Context:
    context = Context(trace, hardware.describe().main.kind == "cpu")
    for tensor, values in zip(trace.inputs, [] if inputs is None else tracing.tensors(inputs), strict=False):
        if values.dtype.is_integer and values.shape.num_elements():
            array = values.numpy()
            context.bounds.learn(tensor, float(array.min()), float(array.max()))
    return context


def _tensors(structure: Any) -> Any:
    if structure is None:
        return None
    return tree.map_structure(_tensor, structure)


def _tensor(array: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        if (tensor := keras.ops.convert_to_tensor(array)).shape.rank != 0:  # else a number, of lists of them
            return tensor
    raise ValueError(
        f"inputs and targets must be arrays, or structures of them, received {type(array).__name__}: of a dataset, "
        "pass one batch, and of lists of numbers make arrays"
    )


def _of_graph(step: Step, half: Trace, context: Context) -> Iterator[Found]:
    """Yields what single operations and constants of a traced step say."""

    def full() -> Trace:
        with temporary_state.in_float32(layer_tree.paths(step.model)):
            return step.trace(backward=False)

    yield from _of_operations(half, context)
    yield from inspection.constants(half, full, context)


def _of_operations(trace: Trace, context: Context) -> Iterator[Found]:
    owner = {id(node.op): node.layer for node in trace.nodes}
    for node in trace.nodes:
        if (hazard := rules.find(node, context)) is not None:
            # Inputs are cast on the way into a layer, before its own call.
            takers = [owner.get(id(user)) for user in context.users(node.op)] if node.op.type == "Cast" else []
            yield node, next((taker for taker in takers if taker is not None), node.layer), hazard


def _merged(found: list[Found], paths: dict[Any, str]) -> list[Finding]:
    """Makes one finding of what a layer does more than once, of its gravest occurrence, and sorts."""
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for node, layer, hazard in found:
        groups.setdefault((layer, hazard.op, hazard.dtype, hazard.advice), []).append((node, layer, hazard))
    findings = []
    for (layer, *_), group in groups.items():
        node, _, hazard = min(group, key=lambda each: (SEVERITIES.index(each[2].severity), -(each[2].length or 0)))
        path = "loss" if layer is None else paths.get(layer, layer.name)
        findings.append(Finding(path, source=_source(node, layer), count=len(group), **dataclasses.asdict(hazard)))
    # An output that a softmax before it makes wrong needs no finding of its own.
    made = {finding.layer for finding in findings if finding.op == "softmax" and finding.severity != "note"}
    kept = [finding for finding in findings if finding.op != "output" or finding.layer not in made]
    return sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity))


def _source(node: Node | None, layer: keras.Operation | None) -> str | None:
    """Returns where the user wrote the operation; None for what stands in a layer of Keras."""
    if node is None or node.backward or type(layer).__module__.startswith(("keras.", "tfmixed.")):
        return None
    # Beyond our own frames, the last of which calls the layer, begins what the layer does.
    frames = list(itertools.takewhile(lambda frame: not frame.filename.startswith(_OURS), reversed(node.op.traceback)))
    own = [frame for frame in frames if not frame.filename.startswith(_libraries())]
    return f"{Path(own[0].filename).name}:{own[0].lineno}" if own else None


@functools.cache
def _libraries() -> tuple[str, ...]:
    specs = map(importlib.util.find_spec, ("keras", "tensorflow", "numpy"))
    folders = [folder for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    return (*(f"{folder}{os.sep}" for folder in folders), "<")
