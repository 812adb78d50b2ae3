"""What is to compute in float32 in a model, and what follows from that for the layers around it."""

from __future__ import annotations

from typing import Any

import keras

from tfmixed import auditing
from tfmixed._islands import layer_rewrite, sensitive_ops
from tfmixed._utils import layer_tree, user_warnings
from tfmixed.formats import HALF

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
_FRAMES = (keras.layers.TimeDistributed, keras.layers.RNN, keras.layers.Bidirectional)


class Plan:
    """What is to compute in float32 in a model: collected first, since what a layer gives depends on what is around it.

    Args:
        model: A built layer or model.
    """

    def __init__(self, model: keras.layers.Layer) -> None:
        self.model = model
        self.inside = layer_tree.descendants(model)
        self._parents: dict[Any, list[Any]] = {layer: [] for layer in [model, *self.inside]}
        self.paths = layer_tree.paths(model)
        for parent in self._parents:
            for child in layer_tree.children(parent):
                self._parents[child].append(parent)
        self._wanted: dict[Any, dict[str, Any]] = {}
        self._adding: set[Any] = set()  # layers whose losses are to be float32
        self._reports: dict[Any, dict[str, list[Any]]] = {}
        self._traced: Any = None  # the specs of inputs with which the model can be traced
        self._risky: list[Any] = []  # what may give what half precision does not hold

    def sensitive(self, inputs: Any = None) -> None:
        """Forces all that goes wrong in half precision, as far as classes and a trace tell.

        Args:
            inputs: A batch, if need be.
        """
        for layer in self.inside:
            if sensitive_ops.is_sensitive(layer):
                self.own_code(layer)
            elif names := sensitive_ops.activations(layer):
                self._activations(layer, names)
        adding = self._read(inputs)
        for layer in [*self._risky, *adding]:
            self.own_code(layer)
        for layer in adding:
            self._add(layer, "added loss")
        for layer in [self.model, *self.inside]:
            self._regularizers(layer)
        self._output(self.model)

    def _read(self, inputs: Any) -> list[Any]:
        """Traces a model that can be, for what is risky, and returns the layers that add a loss in half precision."""
        if keras.backend.backend() != "tensorflow" or not isinstance(self.model, keras.Model):
            return []
        try:
            specs = auditing.specs(self.model, inputs)
            self._risky, adding = auditing.unsafe(self.model, specs)
        except ValueError as error:
            user_warnings.warn(f"force_float32 looks at known classes only: {error}")
            return []
        self._traced = specs
        return adding

    def own_code(self, layer: Any) -> None:
        """Forces what a layer's own `call` computes; of Keras's layers with weights, only the activation."""
        names, sublayers = layer_tree.activations_of(layer), layer_tree.children(layer)
        if layer_tree.graph_of(layer) is not None or not sensitive_ops.is_half(layer):
            return
        if layer_tree.is_keras(layer) and sublayers:  # A wrapper, or attention: its own code is only a frame.
            for child in sublayers:
                if not isinstance(layer, _ATTENTION) or isinstance(child, keras.layers.Softmax):
                    self.own_code(child)
        elif layer_tree.is_keras(layer) and names and layer.weights:
            self._activations(layer, names)
        else:
            for child in sublayers:
                self._want(child)  # It gives float32 into float32 code.
            self._want(layer, computes="float32")
            self._report(layer, "own code" if sublayers else "")

    @property
    def is_final(self) -> bool:
        """Returns whether nothing was found in the code: what is right in float32 shows what it was given wrong."""
        return not self._risky

    def whole(self, layer: Any) -> None:
        """Forces a layer and all that is in it."""
        members = [layer, *layer_tree.descendants(layer)]
        for one in members:
            if layer_tree.graph_of(one) is None and sensitive_ops.is_half(one):
                self._want(one, computes="float32")
                self._report(layer, "", members)
            self._regularizers(one)

    def make(self) -> list[str]:
        """Changes the layers, and returns the reports of those that were not so before."""
        gives = {layer: "float32" if self._gives_wide(layer) else self._back(layer) for layer in self._wanted}
        changes = {layer: {**change, "gives": gives[layer]} for layer, change in self._wanted.items()}
        for layer in self._adding:
            changes.setdefault(layer, {})["adds"] = "float32"
        changed = set()
        for layer, change in changes.items():
            if layer_rewrite.put(layer, **change):
                changed.add(layer)
                for keeper in self._keepers(layer):
                    layer_rewrite.swapped(keeper)
        if self._traced is not None:
            self._widen([layer for layer in self._wanted if layer in changed and gives[layer] in HALF], gives)
        if changed:
            layer_rewrite.retype(self.model)
            _forget_functions([self.model, *self.inside])
        order = [layer for layer in [*self.inside, self.model] if layer in self._reports]
        reports = [(self.paths[layer], *each) for layer in order for each in self._reports[layer].items()]
        return [f"{path}: {what}" if what else path for path, what, of in reports if changed & set(of)]

    def _activations(self, layer: Any, names: list[str]) -> None:
        """Forces activations of a layer by the names of the attributes that hold them."""
        if names and sensitive_ops.is_half(layer):
            self._want(layer, activations=names)
            self._report(layer, "activation")

    def _regularizers(self, layer: Any) -> None:
        """Has the losses of a layer's regularizers computed in float32."""
        if layer_rewrite.half_regularized(layer):
            self._add(layer, "weight regularizer")
        regularizer = getattr(layer, "activity_regularizer", None)
        if (
            regularizer
            and not isinstance(regularizer, layer_rewrite.Float32Regularizer)
            and sensitive_ops.half_given(layer)
        ):
            self._add(layer, "activity regularizer")

    def _add(self, layer: Any, what: str) -> None:
        """Makes losses that a layer adds float32."""
        self._adding.add(layer)
        self._report(layer, what)

    def _output(self, layer: Any) -> None:
        """Makes what a layer gives float32, since the model returns it."""
        if (graph := layer_tree.graph_of(layer)) is not None:
            for tensor in graph.outputs:
                self._output(tensor._keras_history[0])
        elif isinstance(layer, keras.layers.InputLayer) or not sensitive_ops.half_given(layer):
            return
        elif isinstance(layer, keras.layers.TimeDistributed):
            self._output(layer.layer)
        elif sensitive_ops.is_plain(layer):
            self.own_code(layer)
        elif names := sensitive_ops.nonlinear(layer):
            self._activations(layer, names)
        elif layer not in self._wanted:
            self._want(layer)
            self._report(layer, "output")

    def _want(self, layer: Any, **change: Any) -> None:
        """Plans a change of a layer, as `layer_rewrite.put` takes it, and what follows from it for those around it."""
        self._wanted[layer] = {**self._wanted.get(layer, {}), **change}
        for parent in self._parents[layer]:
            if isinstance(parent, _FRAMES) and "computes" in change:
                # They cast what they hand on and what they return, or run a `call` in the scope of their own dtype.
                self._want(parent, computes="float32")
            elif isinstance(parent, keras.layers.TimeDistributed):
                self._want(parent)
            elif self._is_output(layer, parent):
                self._want_around(parent)

    def _want_around(self, graph: Any) -> None:
        """Has what wraps a graph say what that gives."""
        for parent in self._parents[graph]:
            if isinstance(parent, keras.layers.TimeDistributed):
                self._want(parent)
            elif self._is_output(graph, parent):
                self._want_around(parent)

    def _report(self, layer: Any, what: str, members: list[Any] | None = None) -> None:
        reports = self._reports.setdefault(layer, {})
        if not what:
            reports.clear()
        if "" not in reports:
            reports[what] = members or [layer]

    def _gives_wide(self, layer: Any) -> bool:
        """Returns whether what is around a layer takes float32 from it: graphs, and code that computes in float32."""
        if layer is self.model:
            return True
        return all(self._takes_wide(parent, layer) for parent in self._parents[layer])

    def _takes_wide(self, parent: Any, layer: Any) -> bool:
        if "computes" in {**layer_rewrite.change_of(parent), **self._wanted.get(parent, {})}:
            return True
        if isinstance(parent, keras.layers.TimeDistributed) or self._is_output(layer, parent):
            return self._gives_wide(parent)
        return layer_tree.graph_of(parent) is not None

    def _is_output(self, layer: Any, parent: Any) -> bool:
        graph = layer_tree.graph_of(parent)
        return graph is not None and any(layer is tensor._keras_history[0] for tensor in graph.outputs)

    def _back(self, layer: Any) -> str | None:
        return sensitive_ops.half_given(layer) if "computes" in self._wanted[layer] else None

    def _widen(self, layers: list[Any], gives: dict[Any, Any]) -> None:
        """Has layers in a user's code give float32, if that code takes it and half precision may not hold it."""
        takers = [layer for layer in layers if any(self._loses(layer, parent) for parent in self._parents[layer])]
        for group in (takers, *([each] for each in takers)):
            for layer in group:
                layer_rewrite.put(layer, gives="float32")
            if not group or auditing.is_traceable(self.model, self._traced):
                return
            for layer in group:
                layer_rewrite.put(layer, gives=gives[layer])

    def _loses(self, layer: Any, parent: Any) -> bool:
        # Within a `tf.function`, what a tensor was before its cast to half is lost on the way out.
        decorated = hasattr(layer_tree.class_of(parent).call, "python_function")
        return not layer_tree.is_keras(parent) and (decorated or layer in self._risky)

    def _keepers(self, layer: Any) -> list[Any]:
        """Returns the outermost layers around that save what was changed inside, where Keras would make it anew."""
        keepers = []
        for parent in self._parents[layer]:
            keepers += self._keepers(parent) or ([] if layer_rewrite.saves_children(parent) else [parent])
        return keepers


def _forget_functions(layers: list[Any]) -> None:
    """Makes Keras, and a `tf.function` that is a layer's `call`, trace anew what they compiled before."""
    for layer in layers:
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
        for function in (vars(kind).get("call") for kind in type(layer).__mro__):
            getattr(function, "_descriptor_cache", {}).pop(layer, None)
