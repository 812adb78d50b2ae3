"""A model's forward and backward pass as TensorFlow traces it: each operation, with the layer that it stands in."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy
from keras import tree

from tfmixed._core import gradients
from tfmixed._utils import layer_tree, temporary_state

# A name scope for each layer's call, and for its regularizers. Keras's own do not tell layers of like names apart.
_CALL, _REGULARIZER = "tfmixed.call.", "tfmixed.regularizer."
_LAYER = re.compile(rf"(?:{re.escape(_CALL)}|{re.escape(_REGULARIZER)})(\d+)")
_BACKWARD = "gradient_tape/"
_FUNCTIONS = ("f", "cond", "body", "then_branch", "else_branch", "branches")


@dataclass(frozen=True)
class Node:
    """One operation of a trace.

    Args:
        op: The `tf.Operation`.
        name: Its name, after those of the operations that call the functions that it stands in.
        layer: In whose own call or regularizer it stands: a layer, or an operation that is a node of a functional
            model; None for what stands in none, such as the loss.
        backward: Does it belong to the gradient?
    """

    op: Any
    name: str
    layer: keras.Operation | None
    backward: bool

    @property
    def is_regularizer(self) -> bool:
        """True if it stands in a regularizer of the layer."""
        return _REGULARIZER in self.name and self.name.rfind(_REGULARIZER) > self.name.rfind(_CALL)


@dataclass(frozen=True)
class Trace:
    """What one traced step consists of.

    Args:
        nodes: What its results hang on, inside called functions too, in the order of their making.
        inputs: The placeholders of the inputs.
        outputs: The model's output tensors.
        targets: The placeholders of the targets.
        losses: Those that layers add, each with its layer.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    targets: tuple[Any, ...]
    losses: tuple[tuple[keras.layers.Layer, Any], ...]


@dataclass(frozen=True)
class Step:
    """A training step without an update: a model, and what goes in.

    Args:
        model: A built model.
        inputs: A structure of arrays, or of `tf.TensorSpec`.
        targets: The same; None without a loss.
    """

    model: keras.Model
    inputs: Any
    targets: Any = None

    def trace(self, backward: bool = True) -> Trace:
        """Traces the step as it trains, forward alone if asked to. Runs no operation."""
        try:
            return self._traced(backward, inlined=True)
        except Exception:  # what needs AutoGraph within its own `tf.function`
            return self._traced(backward, inlined=False)

    def _traced(self, backward: bool, inlined: bool) -> Trace:
        import tensorflow as tf

        found: dict[str, Any] = {}

        def traced(inputs: Any, targets: Any) -> Any:
            with functions_run_eagerly(inlined):  # inlined: each operation is seen in the context of its caller
                results = self.run(inputs, targets) if backward else self.forward(inputs, targets)
            found.update(inputs=inputs, outputs=results[0], targets=targets)
            return results

        # TensorFlow warns of constants that overflow, which are looked at below; what the model's own code has to say,
        # it says when it is called.
        with scoped(self.model) as layers, numpy.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = tf.function(traced, autograph=False)
            graph = function.get_concrete_function(self.inputs, self.targets).graph
            inputs, outputs, targets = (tensors(found[part]) for part in ("inputs", "outputs", "targets"))
            losses = tuple((layer, loss) for layer in layers for loss in getattr(layer, "_losses", ()))
            return Trace(tuple(_nodes(graph, layers)), inputs, outputs, targets, losses)

    def run(self, inputs: Any, targets: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Returns the model's outputs, its loss, and the gradients of that by the paths of the variables."""
        import tensorflow as tf

        trained = [each for each in self.model.trainable_variables if not gradients.holds_gradient(each)]
        variables = {variable.path: variable.value for variable in trained}
        with tf.GradientTape() as tape:
            outputs, loss = self.forward(inputs, targets)
        found = tape.gradient(loss, variables)
        return outputs, loss, {path: tf.convert_to_tensor(each) for path, each in found.items() if each is not None}

    def forward(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Returns the model's outputs in training, and its loss.

        The loss is that of `compile`, scaled by the optimizer; without targets, the sum of the outputs.
        """
        arguments = {"training": True} if self.model._call_has_training_arg else {}
        outputs = self.model(inputs, **arguments)
        return outputs, self._loss(inputs, targets, outputs)

    def _loss(self, inputs: Any, targets: Any, outputs: Any) -> Any:
        import tensorflow as tf

        if targets is None:
            losses = [each for each in tensors(outputs) if each.dtype.is_floating] + self.model.losses
        else:
            losses = [self.model._compute_loss(inputs, targets, outputs)]
        total = tf.add_n([tf.reduce_sum(tf.cast(loss, "float32")) for loss in losses])
        return total * loss_scale(self.model)


def loss_scale(model: keras.Model) -> Any:
    """Returns the present scale of a model's optimizer; 1 without one. The optimizer does not notice."""
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return 1.0
    return optimizer.dynamic_scale.value if optimizer.built else float(optimizer.initial_scale)


@contextlib.contextmanager
def scoped(model: keras.Model) -> Iterator[list[keras.Operation]]:
    """Gives each layer's call and regularizers a name scope that tells its number in the list that it yields.

    What the calls change in random states and added losses is restored. The losses of `compile` are replaced meanwhile,
    because they keep the structure of the first targets they are given; those that layers add are summed in float32.
    """
    layers = list(layer_tree.paths(model))
    with temporary_state.states(model), temporary_state.losses_in_float32(layers), contextlib.ExitStack() as stack:
        if (own := model._compile_loss) is not None:
            fresh = type(own)(model.loss, own._user_loss_weights, output_names=own.output_names)
            temporary_state.put(stack, model, "_compile_loss", fresh)
        for number, layer in enumerate(layers):
            name = layer_tree.call_of(layer)
            temporary_state.put(stack, layer, name, _in_scope(f"{_CALL}{number}", getattr(layer, name)))
            owners = [(each, "_regularizer") for each in getattr(layer, "_trainable_variables", ())]
            for owner, name in [(layer, "activity_regularizer"), *owners]:
                if (regularizer := vars(owner).get(name)) is not None:
                    temporary_state.put(stack, owner, name, _in_scope(f"{_REGULARIZER}{number}", regularizer))
        yield layers


@contextlib.contextmanager
def functions_run_eagerly(wanted: bool) -> Iterator[None]:
    """Has what a `tf.function` computes stand where it is called, or in a graph of its own, whatever the script set."""
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of input pipelines, which are none of this
        tf.config.run_functions_eagerly(wanted)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def layer_of(name: str, layers: Sequence[keras.Operation]) -> keras.Operation | None:
    """Returns the innermost layer whose call an operation of that name stands in."""
    numbers = _LAYER.findall(name)
    return layers[int(numbers[-1])] if numbers else None


def stands_in(op: Any, layer: keras.Operation, layers: Sequence[keras.Operation]) -> bool:
    """Returns whether an operation stands in a layer's call, or in one that this makes."""
    return any(layers[int(number)] is layer for number in re.findall(rf"{re.escape(_CALL)}(\d+)", op.name))


def ancestors(tensors: Sequence[Any]) -> set[Any]:
    """Returns the operations that tensors hang on, their own included."""
    found, rest = set(), [tensor.op for tensor in tensors]
    while rest:
        op = rest.pop()
        if op not in found:
            found.add(op)
            rest += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return found


def tensors(structure: Any) -> tuple[Any, ...]:
    """Returns the leaves of a structure that are not None."""
    return tuple(leaf for leaf in tree.flatten(structure) if leaf is not None)


def _in_scope(scope: str, call: Callable[..., Any]) -> Callable[..., Any]:
    import tensorflow as tf

    @functools.wraps(call)
    def scoped_call(*args: Any, **kwargs: Any) -> Any:
        with tf.name_scope(scope):
            return call(*args, **kwargs)

    return scoped_call


def _nodes(graph: Any, layers: Sequence[keras.Operation], caller: Node | None = None) -> Iterator[Node]:
    needed = ancestors(graph.outputs)
    for op in graph.get_operations():
        if op in needed:
            layer = layer_of(op.name, layers) or (caller.layer if caller else None)
            backward = op.name.startswith(_BACKWARD) or (caller is not None and caller.backward)
            node = Node(op, f"{caller.name}/{op.name}" if caller else op.name, layer, backward)
            yield node
            for name in _called(op):
                # What C++ made, such as gradients of some losses, has no Python graph.
                if (inner := getattr(graph._get_function(name), "graph", None)) is not None:
                    yield from _nodes(inner, layers, node)


def _called(op: Any) -> Iterator[str]:
    for name in _FUNCTIONS:
        if name in op.node_def.attr:
            value = op.node_def.attr[name]
            yield from (function.name for function in (value.list.func or [value.func]) if function.name)
