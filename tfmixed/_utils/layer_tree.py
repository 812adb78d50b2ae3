"""What is inside a layer: layers and operations, their order and their paths."""

from __future__ import annotations

from typing import Any

import keras


def class_of(layer: Any) -> Any:
    """Returns the class that a layer or operation had when it was made, whatever was changed in place since."""
    return getattr(type(layer), "_made_as", type(layer))


def is_keras(layer: Any) -> bool:
    """Returns whether the `call` of a layer or operation is Keras's."""
    return bool(class_of(layer).call.__module__.startswith("keras."))


def graph_of(layer: Any) -> keras.Function | None:
    """Returns the functional graph that a layer runs, if that is all that its `call` does."""
    if not is_keras(layer):
        return None
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, keras.Function) else None


def children(layer: Any) -> list[Any]:
    """Returns the layers and operations right inside a layer. The same code makes them in the same order."""
    graph = graph_of(layer)
    inside = [] if graph is None else graph.operations
    sublayers = layer._layers if isinstance(layer, keras.layers.Layer) else ()
    inside += [other for other in sublayers if not any(other is one for one in inside)]
    return [one for one in inside if not isinstance(one, keras.layers.InputLayer)]


def descendants(layer: Any) -> list[Any]:
    """Returns all layers and operations inside a layer, from the outside in, each once."""
    found: dict[int, Any] = {}
    for child in children(layer):
        for one in [child, *descendants(child)]:
            found.setdefault(id(one), one)
    return list(found.values())


def paths(model: Any) -> dict[Any, str]:
    """Returns a model and all inside it, each with the names from the model's own on; the model has its own name."""
    found = {model: str(model.name)}
    for parent in [model, *descendants(model)]:
        above = "" if parent is model else f"{found[parent]}/"
        for child in children(parent):
            found.setdefault(child, f"{above}{child.name}")
    return found


def activations_of(layer: Any) -> list[str]:
    """Returns the names of the attributes that hold activations, where they can be replaced."""
    # Recurrent layers have properties that show their cell's; a layer as activation is a sublayer.
    found = {name: vars(layer).get(name) for name in ("activation", "recurrent_activation")}
    return [name for name, value in found.items() if callable(value) and not isinstance(value, keras.layers.Layer)]


def call_of(layer: Any) -> str:
    """Returns the name of the method with which a layer or operation computes."""
    return "quantized_call" if getattr(layer, "quantization_mode", None) else "call"


def policy_for(layer: keras.layers.Layer, policy: str) -> keras.DTypePolicy:
    """Returns a dtype policy for a layer that is quantized as the layer is."""
    before, wanted = layer.dtype_policy, keras.dtype_policies.get(policy)
    if isinstance(before, keras.dtype_policies.DTypePolicyMap):
        before = before[layer.path]
    if before.quantization_mode is None:
        return wanted
    return type(before).from_config({**before.get_config(), "source_name": wanted.name})
