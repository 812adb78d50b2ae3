"""Plans which layers of a model compute in float32, and which output dtypes follow for the layers around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from tfmixed._islands import layer_rewrite, sensitive_ops
from tfmixed._islands.casts import Float32Regularizer
from tfmixed._utils import layer_tree
from tfmixed.formats import HALF

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# These cast what they pass on and what they return, or run a `call` under the autocast scope of their own dtype.
_CASTING_WRAPPERS = (keras.layers.TimeDistributed, keras.layers.RNN, keras.layers.Bidirectional)


class Plan:
    """Changes to a model, collected first and made together: an output dtype depends on the layers around.

    Args:
        model: A built layer or model.
    """

    def __init__(self, model: keras.layers.Layer) -> None:
        self.model = model
        self.inside = layer_tree.descendants(model)
        self.paths = layer_tree.paths(model)
        self._parents: dict[Any, list[Any]] = {layer: [] for layer in [model, *self.inside]}
        for parent in self._parents:
            for child in layer_tree.children(parent):
                self._parents[child].append(parent)
        self._changes: dict[Any, dict[str, Any]] = {}
        self._adding: set[Any] = set()  # layers whose added losses become float32
        self._reports: dict[Any, dict[str, list[Any]]] = {}  # by layer and part: the layers that must have changed
        self._unsafe: list[Any] = []  # layers whose outputs may not fit half precision

    def force_sensitive(self, unsafe: Sequence[Any] = (), adding: Sequence[Any] = ()) -> None:
        """Forces what goes wrong in half precision.

        Args:
            unsafe: Layers in whose own code an audit found a severe hazard, in addition to the classes known here.
            adding: Layers that add a loss in half precision.
        """
        for layer in self.inside:
            if sensitive_ops.is_sensitive(layer):
                self.force_own_code(layer)
            elif names := sensitive_ops.sensitive_activations(layer):
                self._force_activations(layer, names)
        self._unsafe = list(unsafe)
        for layer in [*self._unsafe, *adding]:
            self.force_own_code(layer)
        for layer in adding:
            self._force_losses(layer, "added loss")
        for layer in [self.model, *self.inside]:
            self._force_regularizers(layer)
        self._force_output(self.model)

    def force_own_code(self, layer: Any) -> None:
        """Forces the `call` of a layer without its sublayers; of a Keras layer with weights, only the activation."""
        names, sublayers = layer_tree.activations_of(layer), layer_tree.children(layer)
        if layer_tree.graph_of(layer) is not None or not sensitive_ops.is_half(layer):
            return
        if layer_tree.is_keras(layer) and sublayers:  # a wrapper, or attention: its sublayers compute
            for child in sublayers:
                if not isinstance(layer, _ATTENTION) or isinstance(child, keras.layers.Softmax):
                    self.force_own_code(child)
        elif layer_tree.is_keras(layer) and names and layer.weights:
            self._force_activations(layer, names)
        else:
            for child in sublayers:
                self._change(child)  # returns float32 to float32 code
            self._change(layer, computes="float32")
            self._report(layer, "own code" if sublayers else "")

    def force_whole(self, layer: Any) -> None:
        """Forces a layer and all sublayers."""
        members = [layer, *layer_tree.descendants(layer)]
        for member in members:
            if layer_tree.graph_of(member) is None and sensitive_ops.is_half(member):
                self._change(member, computes="float32")
                self._report(layer, "", members)
            self._force_regularizers(member)

    def apply(self, is_traceable: Callable[[], bool] | None = None) -> list[str]:
        """Makes the changes, and returns the paths of what they changed.

        Args:
            is_traceable: Whether the model can still be traced. Custom code then receives float32 where half precision
                may not hold an output, if it accepts that. Defaults to None: custom code receives the dtype of before.
        """
        gives = {layer: "float32" if self._gives_float32(layer) else self._half(layer) for layer in self._changes}
        changes = {layer: {**change, "gives": gives[layer]} for layer, change in self._changes.items()}
        for layer in self._adding:
            changes.setdefault(layer, {})["adds"] = "float32"
        changed = {layer for layer, change in changes.items() if layer_rewrite.rewrite(layer, **change)}
        for layer in changed:
            for saver in self._savers(layer):
                layer_rewrite.swap_class(saver)
        if is_traceable is not None:
            half = {layer: gives[layer] for layer in self._changes if layer in changed and gives[layer] in HALF}
            self._try_float32_outputs(half, is_traceable)
        if changed:
            layer_rewrite.update_dtypes(self.model)
            reset_compiled_functions([self.model, *self.inside])
        return list(self._changed_paths(changed))

    def _changed_paths(self, changed: set[Any]) -> Iterator[str]:
        for layer in [*self.inside, self.model]:
            for part, members in self._reports.get(layer, {}).items():
                if changed & set(members):
                    yield f"{self.paths[layer]}: {part}" if part else self.paths[layer]

    def _force_activations(self, layer: Any, names: list[str]) -> None:
        if names and sensitive_ops.is_half(layer):
            self._change(layer, activations=names)
            self._report(layer, "activation")

    def _force_regularizers(self, layer: Any) -> None:
        if layer_rewrite.half_regularized(layer):
            self._force_losses(layer, "weight regularizer")
        regularizer = getattr(layer, "activity_regularizer", None)
        is_float32 = regularizer is None or isinstance(regularizer, Float32Regularizer)
        if not is_float32 and sensitive_ops.half_output(layer):
            self._force_losses(layer, "activity regularizer")

    def _force_losses(self, layer: Any, part: str) -> None:
        self._adding.add(layer)
        self._report(layer, part)

    def _force_output(self, layer: Any) -> None:
        if (graph := layer_tree.graph_of(layer)) is not None:
            for tensor in graph.outputs:
                self._force_output(tensor._keras_history[0])
        elif isinstance(layer, keras.layers.InputLayer) or not sensitive_ops.half_output(layer):
            return
        elif isinstance(layer, keras.layers.TimeDistributed):
            self._force_output(layer.layer)
        elif sensitive_ops.is_cheap(layer):
            self.force_own_code(layer)
        elif names := sensitive_ops.final_activations(layer):
            self._force_activations(layer, names)
        elif layer not in self._changes:
            self._change(layer)
            self._report(layer, "output")

    def _change(self, layer: Any, **change: Any) -> None:
        """Plans a change, as `layer_rewrite.rewrite` takes it, and the changes of parents that follow from it."""
        self._changes[layer] = {**self._changes.get(layer, {}), **change}
        for parent in self._parents[layer]:
            if isinstance(parent, _CASTING_WRAPPERS) and "computes" in change:
                self._change(parent, computes="float32")
            elif isinstance(parent, keras.layers.TimeDistributed):
                self._change(parent)
            elif self._is_output(layer, parent):
                self._change_wrappers(parent)

    def _change_wrappers(self, graph: Any) -> None:
        for parent in self._parents[graph]:
            if isinstance(parent, keras.layers.TimeDistributed):
                self._change(parent)
            elif self._is_output(graph, parent):
                self._change_wrappers(parent)

    def _report(self, layer: Any, part: str, members: list[Any] | None = None) -> None:
        parts = self._reports.setdefault(layer, {})
        if not part:  # the whole layer
            parts.clear()
        if "" not in parts:
            parts[part] = members or [layer]

    def _gives_float32(self, layer: Any) -> bool:
        """Returns whether all code around a layer accepts float32 from it: graphs, and code that is float32 itself."""
        if layer is self.model:
            return True
        return all(self._accepts_float32(parent, layer) for parent in self._parents[layer])

    def _accepts_float32(self, parent: Any, layer: Any) -> bool:
        if "computes" in {**layer_rewrite.changes_of(parent), **self._changes.get(parent, {})}:
            return True
        if isinstance(parent, keras.layers.TimeDistributed) or self._is_output(layer, parent):
            return self._gives_float32(parent)
        return layer_tree.graph_of(parent) is not None

    def _is_output(self, layer: Any, parent: Any) -> bool:
        graph = layer_tree.graph_of(parent)
        return graph is not None and any(layer is tensor._keras_history[0] for tensor in graph.outputs)

    def _half(self, layer: Any) -> str | None:
        return sensitive_ops.half_output(layer) if "computes" in self._changes[layer] else None

    def _try_float32_outputs(self, half: dict[Any, Any], is_traceable: Callable[[], bool]) -> None:
        """Has layers give float32 to custom code that accepts it: all of them if possible, else as many as possible."""
        losing = [layer for layer in half if any(self._loses(layer, parent) for parent in self._parents[layer])]
        for group in (losing, *([layer] for layer in losing)) if losing else ():
            for layer in group:
                layer_rewrite.rewrite(layer, gives="float32")
            if is_traceable():
                if group is losing:
                    return
                continue
            for layer in group:
                layer_rewrite.rewrite(layer, gives=half[layer])

    def _loses(self, layer: Any, parent: Any) -> bool:
        # The float32 tensor that a cast remembers does not leave a `tf.function`.
        is_decorated = hasattr(layer_tree.original_class(parent).call, "python_function")
        return not layer_tree.is_keras(parent) and (is_decorated or layer in self._unsafe)

    def _savers(self, layer: Any) -> list[Any]:
        """Returns the outermost parents whose config has to hold the change, since they make the layer themselves."""
        savers = []
        for parent in self._parents[layer]:
            savers += self._savers(parent) or ([] if layer_rewrite.saves_children(parent) else [parent])
        return savers


def reset_compiled_functions(layers: list[Any]) -> None:
    """Has Keras, and a `tf.function` that is the `call` of a layer, trace again."""
    for layer in layers:
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
        for function in (vars(cls).get("call") for cls in type(layer).__mro__):
            getattr(function, "_descriptor_cache", {}).pop(layer, None)
