"""TensorFlow traces of a model's forward and backward pass: each operation, with the layer that contains it."""

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
from tfmixed._probe.dry_run import loss_scale
from tfmixed._utils import layer_tree, temporary_state
from tfmixed.auditing.graph import ancestors

# Name scopes of a layer's call and of its regularizers. Keras's own scopes do not separate layers of the same name.
_CALL, _REGULARIZER = "tfmixed.call.", "tfmixed.regularizer."
_LAYER = re.compile(rf"(?:{re.escape(_CALL)}|{re.escape(_REGULARIZER)})(\d+)")
_BACKWARD = "gradient_tape/"
_FUNCTION_ATTRIBUTES = ("f", "cond", "body", "then_branch", "else_branch", "branches")


@dataclass(frozen=True)
class Node:
    """One operation of a trace."""

    op: Any  # the `tf.Operation`
    name: str  # its name, after the names of the operations that call the functions around it
    layer: keras.Operation | None  # the innermost layer or operation that contains it; None for the loss
    backward: bool  # whether it belongs to the gradient computation

    @property
    def is_regularizer(self) -> bool:
        """True if it belongs to a regularizer of the layer."""
        return self.name.rfind(_REGULARIZER) > self.name.rfind(_CALL)


@dataclass(frozen=True)
class Trace:
    """One traced step."""

    nodes: tuple[Node, ...]  # all that the results depend on, also in called functions, in the order of creation
    inputs: tuple[Any, ...]  # placeholders
    outputs: tuple[Any, ...]
    targets: tuple[Any, ...]  # placeholders
    losses: tuple[tuple[keras.layers.Layer, Any], ...]  # the losses that layers add


@dataclass(frozen=True)
class Step:
    """A training step without the update.

    Args:
        model: A built model.
        inputs: A structure of arrays, or of `tf.TensorSpec`.
        targets: A structure of arrays, or of `tf.TensorSpec`. Defaults to None, which replaces the loss of `compile` by
            the sum of the outputs.
    """

    model: keras.Model
    inputs: Any
    targets: Any = None

    def trace(self, backward: bool = True) -> Trace:
        """Traces the step in training mode without running it; the forward pass alone if `backward` is False."""
        try:  # inlined functions show their operations in the context of the caller
            return self._trace(backward, inline=True)
        except Exception:  # code that needs the AutoGraph of its own `tf.function`
            return self._trace(backward, inline=False)

    def _trace(self, backward: bool, inline: bool) -> Trace:
        import tensorflow as tf

        parts: list[Any] = []

        def step(inputs: Any, targets: Any) -> Any:
            with run_functions_eagerly(inline):
                results = self.run(inputs, targets) if backward else self.forward(inputs, targets)
            parts[:] = inputs, results[0], targets
            return results

        # TensorFlow warns of constants that overflow, which the audit reports. The model's own warnings are left to
        # the calls that the user makes.
        with layer_scopes(self.model) as layers, numpy.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tf.function(step, autograph=False).get_concrete_function(self.inputs, self.targets).graph
            losses = tuple((layer, loss) for layer in layers for loss in getattr(layer, "_losses", ()))
            inputs, outputs, targets = map(leaves, parts)
            return Trace(tuple(_nodes(graph, layers)), inputs, outputs, targets, losses)

    def run(self, inputs: Any, targets: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Returns the model's outputs, its loss, and the gradients by the paths of the variables."""
        import tensorflow as tf

        trained = [variable for variable in self.model.trainable_variables if not gradients.holds_gradient(variable)]
        variables = {variable.path: variable.value for variable in trained}
        with tf.GradientTape() as tape:
            outputs, loss = self.forward(inputs, targets)
        found = tape.gradient(loss, variables)
        return outputs, loss, {path: tf.convert_to_tensor(grad) for path, grad in found.items() if grad is not None}

    def forward(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Returns the model's outputs in training mode, and its loss, scaled by the optimizer's loss scale."""
        import tensorflow as tf

        arguments = {"training": True} if self.model._call_has_training_arg else {}
        outputs = self.model(inputs, **arguments)
        if targets is None:
            losses = [tensor for tensor in leaves(outputs) if tensor.dtype.is_floating] + self.model.losses
        else:
            losses = [self.model._compute_loss(inputs, targets, outputs)]
        total = tf.add_n([tf.reduce_sum(tf.cast(loss, "float32")) for loss in losses])
        return outputs, total * loss_scale(self.model)


@contextlib.contextmanager
def layer_scopes(model: keras.Model) -> Iterator[list[keras.Operation]]:
    """Puts each layer's call and regularizers in a name scope with the number of the layer in the yielded list.

    Random states and added losses that the calls change are restored. The losses of `compile` are replaced in the
    meantime, because they keep the structure of the first targets. Losses that layers add are summed in float32.
    """
    layers = list(layer_tree.paths(model))
    with temporary_state.states(model), temporary_state.losses_in_float32(layers), contextlib.ExitStack() as stack:
        if (own := model._compile_loss) is not None:
            unused = type(own)(model.loss, own._user_loss_weights, output_names=own.output_names)
            temporary_state.put(stack, model, "_compile_loss", unused)
        for number, layer in enumerate(layers):
            name = layer_tree.call_of(layer)
            temporary_state.put(stack, layer, name, _in_scope(f"{_CALL}{number}", getattr(layer, name)))
            weights = [(variable, "_regularizer") for variable in getattr(layer, "_trainable_variables", ())]
            for owner, name in [(layer, "activity_regularizer"), *weights]:
                if (regularizer := vars(owner).get(name)) is not None:
                    temporary_state.put(stack, owner, name, _in_scope(f"{_REGULARIZER}{number}", regularizer))
        yield layers


@contextlib.contextmanager
def run_functions_eagerly(enabled: bool) -> Iterator[None]:
    """Sets `tf.config.run_functions_eagerly`: if enabled, a nested `tf.function` is traced inline."""
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that tf.data is not affected
        tf.config.run_functions_eagerly(enabled)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def layer_of(op_name: str, layers: Sequence[keras.Operation]) -> keras.Operation | None:
    """Returns the innermost layer whose call or regularizer contains the operation."""
    numbers = _LAYER.findall(op_name)
    return layers[int(numbers[-1])] if numbers else None


def is_called_by(op: Any, layer: keras.Operation, layers: Sequence[keras.Operation]) -> bool:
    """Returns whether an operation belongs to a layer's call, or to a call inside it."""
    return any(layers[int(number)] is layer for number in re.findall(rf"{re.escape(_CALL)}(\d+)", op.name))


def leaves(structure: Any) -> tuple[Any, ...]:
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
        if op not in needed:
            continue
        layer, name, backward = layer_of(op.name, layers), op.name, op.name.startswith(_BACKWARD)
        if caller is not None:
            layer, name, backward = layer or caller.layer, f"{caller.name}/{name}", backward or caller.backward
        node = Node(op, name, layer, backward)
        yield node
        for function in _called_functions(op):
            # Functions that C++ created, such as the gradients of some losses, have no Python graph.
            if (inner := getattr(graph._get_function(function), "graph", None)) is not None:
                yield from _nodes(inner, layers, node)


def _called_functions(op: Any) -> Iterator[str]:
    for name in _FUNCTION_ATTRIBUTES:
        if name in op.node_def.attr:
            value = op.node_def.attr[name]
            yield from (function.name for function in (value.list.func or [value.func]) if function.name)
