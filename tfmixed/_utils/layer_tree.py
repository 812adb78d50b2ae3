"""The layers and operations inside a layer, their order and their paths."""

from __future__ import annotations

from typing import Any

import keras


def original_class(layer: Any) -> Any:
    """Returns the class that a layer was created from."""
    return getattr(type(layer), "_original_class", type(layer))


def is_keras(layer: Any) -> bool:
    """Returns whether Keras defines the `call` of a layer or operation."""
    return bool(original_class(layer).call.__module__.startswith("keras."))


def graph_of(layer: Any) -> keras.Function | None:
    """Returns the functional graph that a layer runs, or None if its `call` does anything else."""
    if not is_keras(layer):
        return None
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, keras.Function) else None


def children(layer: Any) -> list[Any]:
    """Returns the layers and operations directly inside a layer, in an order that the code of the layer determines."""
    graph = graph_of(layer)
    inside = [] if graph is None else graph.operations
    sublayers = layer._layers if isinstance(layer, keras.layers.Layer) else ()
    inside += [sublayer for sublayer in sublayers if not any(sublayer is operation for operation in inside)]
    return [child for child in inside if not isinstance(child, keras.layers.InputLayer)]


def descendants(layer: Any) -> list[Any]:
    """Returns all layers and operations inside a layer, parents first, without duplicates."""
    found: dict[int, Any] = {}
    for child in children(layer):
        for descendant in [child, *descendants(child)]:
            found.setdefault(id(descendant), descendant)
    return list(found.values())


def paths(model: Any) -> dict[Any, str]:
    """Returns the path of a model, its own name, and of all layers inside: names below the model, joined by `/`."""
    found = {model: str(model.name)}
    for parent in [model, *descendants(model)]:
        prefix = "" if parent is model else f"{found[parent]}/"
        for child in children(parent):
            found.setdefault(child, f"{prefix}{child.name}")
    return found


def activations_of(layer: Any) -> list[str]:
    """Returns the names of the attributes that hold replaceable activations."""
    # Recurrent layers forward the properties of their cell; an activation that is a layer is a sublayer.
    found = {name: vars(layer).get(name) for name in ("activation", "recurrent_activation")}
    return [name for name, value in found.items() if callable(value) and not isinstance(value, keras.layers.Layer)]


def call_of(layer: Any) -> str:
    """Returns the name of the method with which a layer or operation computes."""
    return "quantized_call" if getattr(layer, "quantization_mode", None) else "call"


def policy_for(layer: keras.layers.Layer, policy: str) -> keras.DTypePolicy:
    """Returns a dtype policy with the quantization mode of a layer."""
    before, wanted = layer.dtype_policy, keras.dtype_policies.get(policy)
    if isinstance(before, keras.dtype_policies.DTypePolicyMap):
        before = before[layer.path]
    if before.quantization_mode is None:
        return wanted
    return type(before).from_config({**before.get_config(), "source_name": wanted.name})
