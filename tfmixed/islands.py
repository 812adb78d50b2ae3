"""Float32 islands in a half-precision model that is already built."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras

from tfmixed import auditing, inplace, sensitive, structure
from tfmixed.formats import HALF

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
_FRAMES = (keras.layers.TimeDistributed, keras.layers.RNN, keras.layers.Bidirectional)

Selector = str | type | Callable[[Any], bool]


def force_float32(
    model: keras.layers.Layer, layers: Selector | Collection[Selector] = "sensitive", inputs: Any = None
) -> list[str]:
    """Makes parts of a built model compute in float32, in place, and says which.

    Weights, their names in files, the state of the optimizer and everything else stay. The model saves and loads with
    the change. Under a policy like `"float16"` the weights stay float16 variables; they are computed with in float32.

    `"sensitive"` are: softmax layers, also those inside attention; softmax, exponential and the like as `activation`
    of any layer, whose matrix product stays half; `Attention`, `UnitNormalization`, `Normalization`,
    `Dot(normalize=True)`; average pooling over 128 elements or more, over masked sequences too; of the `keras.ops`
    in a functional graph: softmax, exponentials, norms, products, and sums over long or unknown axes or of squares;
    what the model returns; on TensorFlow the code of one's own layers in which `audit` finds something severe. Whatever
    is named instead is forced whole, with its matrix products and all that is in it.

    In functional and Sequential graphs what is forced gives float32. In the `call` of a user's own class it gives the
    dtype that it gave before, since TensorFlow refuses to mix them.

    Args:
        model: Built; of any kind.
        layers: `"sensitive"`, a name or pattern (as of files: `"block_*/attention"`) that is matched with names and
            with paths, a class, a layer, a function from a layer to a bool, or a list of these.
        inputs: A batch, for "sensitive" models that do not tell what they are called with. Nothing runs.

    Returns:
        What was changed now, in the order of the model, a path each: the names of the layers from the model's own on,
        joined by `/`, and where not all of that layer was changed, what was: `"block/mha/softmax"`,
        `"predictions: activation"`, `"logits: output"`, `"block: own code"` (all but its sublayers). Nothing for what
        was changed before, or is float32 anyway.

    Raises:
        ValueError: The model is not built; a name or pattern matches nothing.

    Example:
    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> hidden, last = keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, "softmax", name="predictions")
    >>> model = keras.Sequential([keras.Input((3,)), hidden, last])
    >>> force_float32(model)
    ['predictions: activation']
    >>> force_float32(model, "hid*")
    ['hidden']
    >>> force_float32(model)
    []
    >>> keras.config.set_dtype_policy("float32")
    """
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(f"model must be a Keras model, received {model!r}")
    if not model.built:
        raise ValueError(f"model must be built, received {model!r}: call it on data, or `model.build(input_shape)`")
    made: list[str] = []
    # What is right in float32 shows what it was given wrong: until nothing more is found.
    while new := [each for each in _force_once(model, layers, inputs) if each not in made]:
        made += new
    return made


def _force_once(model: keras.layers.Layer, layers: Any, inputs: Any) -> list[str]:
    changes = _Changes(model)
    for selector in layers if isinstance(layers, (list, tuple, set)) else [layers]:
        if selector == "sensitive":
            changes.sensitive(inputs)
        else:
            for layer in changes.matching(selector):
                changes.whole(layer)
    return changes.make()


def force_own_code(model: keras.layers.Layer, layers: Iterable[keras.Operation]) -> list[str]:
    """Makes the code of some layers and operations of a built model compute in float32, and not their sublayers'.

    What an audit of the model's graph found: the user's own layers, operations of functional graphs, Keras's layers.

    Args:
        model: As in `force_float32`.
        layers: Layers and operations inside the model, or the model itself.

    Returns:
        As `force_float32` does.
    """
    changes = _Changes(model)
    for layer in layers:
        changes.own_code(layer)
    return changes.make()


class _Changes:
    """What is to be changed in a model: collected first, since what a layer gives depends on what is around it."""

    def __init__(self, model: keras.layers.Layer) -> None:
        self.model = model
        self.inside = structure.descendants(model)
        self.parents: dict[Any, list[Any]] = {layer: [] for layer in [model, *self.inside]}
        self.paths = structure.paths(model)
        for parent in self.parents:
            for child in structure.children(parent):
                self.parents[child].append(parent)
        self.wanted: dict[Any, dict[str, Any]] = {}
        self.reports: dict[Any, tuple[str, list[Any]]] = {}
        self.traced: Any = None  # the specs of inputs with which the model can be traced
        self.risky: list[Any] = []  # what may give what half precision does not hold

    def want(self, layer: Any, **change: Any) -> None:
        self.wanted[layer] = {**self.wanted.get(layer, {}), **change}
        for parent in self.parents[layer]:
            if isinstance(parent, _FRAMES) and "computes" in change:
                # They cast what they hand on and what they return, or run a `call` in the scope of their own dtype.
                self.want(parent, computes="float32")
            elif isinstance(parent, keras.layers.TimeDistributed):
                self.want(parent)
            elif self._is_output(layer, parent):
                self._want_around(parent)

    def _want_around(self, graph: Any) -> None:
        """Has what wraps a graph say what that gives."""
        for parent in self.parents[graph]:
            if isinstance(parent, keras.layers.TimeDistributed):
                self.want(parent)
            elif self._is_output(graph, parent):
                self._want_around(parent)

    def report(self, layer: Any, what: str, members: list[Any] | None = None) -> None:
        if not what or layer not in self.reports:
            self.reports[layer] = (what, members or [layer])

    def sensitive(self, inputs: Any) -> None:
        for layer in self.inside:
            if sensitive.is_sensitive(layer):
                self.own_code(layer)
            elif names := sensitive.activations(layer):
                self.activations(layer, names)
        self.traced = _specs(self.model, inputs)
        self.risky = [] if self.traced is None else auditing.unsafe(self.model, self.traced)
        for layer in self.risky:
            self.own_code(layer)
        self.output(self.model)

    def activations(self, layer: Any, names: list[str]) -> None:
        if names and sensitive.is_half(layer):
            self.want(layer, activations=names)
            self.report(layer, "activation")

    def own_code(self, layer: Any) -> None:
        """Forces what a layer's own `call` computes; of Keras's layers with weights, only the activation."""
        names, sublayers = structure.activations_of(layer), structure.children(layer)
        if structure.graph_of(layer) is not None or not sensitive.is_half(layer):
            return
        if sensitive.is_keras(layer) and sublayers:  # A wrapper, or attention: its own code is only a frame.
            for child in sublayers:
                if not isinstance(layer, _ATTENTION) or isinstance(child, keras.layers.Softmax):
                    self.own_code(child)
        elif sensitive.is_keras(layer) and names and layer.weights:
            self.activations(layer, names)
        else:
            for child in sublayers:
                self.want(child)  # It gives float32 into float32 code.
            self.want(layer, computes="float32")
            self.report(layer, "own code" if sublayers else "")

    def whole(self, layer: Any) -> None:
        """Forces a layer and all that is in it."""
        members = [layer, *structure.descendants(layer)]
        for one in members:
            if structure.graph_of(one) is None and sensitive.is_half(one):
                self.want(one, computes="float32")
                self.report(layer, "", members)

    def output(self, layer: Any) -> None:
        """Makes what a layer gives float32, since the model returns it."""
        if (graph := structure.graph_of(layer)) is not None:
            for tensor in graph.outputs:
                self.output(tensor._keras_history[0])
        elif isinstance(layer, keras.layers.InputLayer) or not sensitive.half_given(layer):
            return
        elif isinstance(layer, keras.layers.TimeDistributed):
            self.output(layer.layer)
        elif sensitive.is_plain(layer):
            self.own_code(layer)
        elif names := sensitive.nonlinear(layer):
            self.activations(layer, names)
        elif layer not in self.wanted:
            self.want(layer)
            self.report(layer, "output")

    def matching(self, selector: Selector) -> list[Any]:
        if isinstance(selector, str):
            return self._named(selector)
        if any(selector is layer for layer in self.inside):
            return [selector]
        if isinstance(selector, keras.Operation):
            raise ValueError(f"layers must be among the model's, received {selector!r}")
        if isinstance(selector, type):
            return [layer for layer in self.inside if isinstance(layer, selector)]
        if callable(selector):
            return [layer for layer in self.inside if isinstance(layer, keras.layers.Layer) and selector(layer)]
        raise ValueError(
            'layers must be "sensitive", a name or pattern, a class, a layer, a function from one to a bool or a list '
            f"of these, received {selector!r}"
        )

    def _named(self, pattern: str) -> list[Any]:
        names = {layer: {layer.name, self.paths[layer]} for layer in self.inside}
        found = [layer for layer in self.inside if any(fnmatch.fnmatchcase(name, pattern) for name in names[layer])]
        if not found:
            known = sorted(set().union(*names.values()))
            near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.4) or known[:5]
            raise ValueError(f"layers must match layers of the model, received {pattern!r}, which is near {near}")
        return found

    def gives_wide(self, layer: Any) -> bool:
        """Returns whether what is around a layer takes float32 from it: graphs, and code that computes in float32."""
        if layer is self.model:
            return True
        return all(self._takes_wide(parent, layer) for parent in self.parents[layer])

    def _takes_wide(self, parent: Any, layer: Any) -> bool:
        if "computes" in {**inplace.change_of(parent), **self.wanted.get(parent, {})}:
            return True
        if isinstance(parent, keras.layers.TimeDistributed) or self._is_output(layer, parent):
            return self.gives_wide(parent)
        return structure.graph_of(parent) is not None

    def _is_output(self, layer: Any, parent: Any) -> bool:
        graph = structure.graph_of(parent)
        return graph is not None and any(layer is tensor._keras_history[0] for tensor in graph.outputs)

    def make(self) -> list[str]:
        """Changes the layers, and returns the reports of those that were not so before."""
        gives = {layer: "float32" if self.gives_wide(layer) else self._back(layer) for layer in self.wanted}
        changed = set()
        for layer, change in self.wanted.items():
            if inplace.put(layer, **change, gives=gives[layer]):
                changed.add(layer)
                for keeper in self._keepers(layer):
                    inplace.swapped(keeper)
        if self.traced is not None:
            self._widen([layer for layer in self.wanted if layer in changed and gives[layer] in HALF], gives)
        if changed:
            inplace.retype(self.model)
            _forget_functions([self.model, *self.inside])
        order = [layer for layer in [*self.inside, self.model] if layer in self.reports]
        reports = [(self.paths[layer], *self.reports[layer]) for layer in order]
        return [f"{path}: {what}" if what else path for path, what, of in reports if changed & set(of)]

    def _widen(self, layers: list[Any], gives: dict[Any, Any]) -> None:
        """Has layers in a user's code give float32, if that code takes it and half precision may not hold it."""
        takers = [layer for layer in layers if any(self._loses(layer, parent) for parent in self.parents[layer])]
        for group in (takers, *([each] for each in takers)):
            for layer in group:
                inplace.put(layer, gives="float32")
            if not group or auditing.is_traceable(self.model, self.traced):
                return
            for layer in group:
                inplace.put(layer, gives=gives[layer])

    def _loses(self, layer: Any, parent: Any) -> bool:
        # Within a `tf.function`, what a tensor was before its cast to half is lost on the way out.
        decorated = hasattr(structure.class_of(parent).call, "python_function")
        return not sensitive.is_keras(parent) and (decorated or layer in self.risky)

    def _back(self, layer: Any) -> str | None:
        return sensitive.half_given(layer) if "computes" in self.wanted[layer] else None

    def _keepers(self, layer: Any) -> list[Any]:
        """Returns the outermost layers around that save what was changed inside, where Keras would make it anew."""
        keepers = []
        for parent in self.parents[layer]:
            keepers += self._keepers(parent) or ([] if inplace.saves_children(parent) else [parent])
        return keepers


def _specs(model: Any, inputs: Any) -> Any:
    """Returns the specs of inputs with which a model can be traced; None if there are none."""
    if keras.backend.backend() != "tensorflow" or not isinstance(model, keras.Model):
        return None
    try:
        return auditing.specs(model, inputs)
    except ValueError as error:
        warnings.warn(f"force_float32 looks at known classes only: {error}", stacklevel=5)
        return None


def _forget_functions(layers: list[Any]) -> None:
    """Makes Keras, and a `tf.function` that is a layer's `call`, trace anew what they compiled before."""
    for layer in layers:
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
        for function in (vars(kind).get("call") for kind in type(layer).__mro__):
            getattr(function, "_descriptor_cache", {}).pop(layer, None)
