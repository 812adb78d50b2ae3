"""Rewrites layers and operations of a built model in place, so that they compute in float32.

Only the class of a layer changes, to a subclass of the original one. Variables and their paths, nodes of functional
graphs, `isinstance` checks and optimizer state stay the same. The config gains one entry with the changes, and Keras
saves all rewritten layers under the name `tfmixed>Forced`.

A Keras `DTypePolicyMap` cannot express these changes. It maps layer paths to policies, but layers without a `build`
method have no path (Keras 3.15): `Softmax`, for example, also inside `MultiHeadAttention`. Custom code does not pass
its policy on to sublayers, and operations have no policy. A policy cannot describe a single activation or output, nor
float16 variables with float32 computation. An existing map stays in force.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import keras
from keras import tree

from tfmixed._islands.casts import FLOATS, Float32Activation, Float32Regularizer, cast, widen
from tfmixed._utils import temporary_state
from tfmixed._utils.layer_tree import activations_of, children, descendants, graph_of, original_class
from tfmixed.formats import HALF

_ENTRY = "in_float32"
_set = object.__setattr__  # Keras's own tracks values, and refuses some after the build


@keras.saving.register_keras_serializable("tfmixed", "Forced")
class Forced(keras.Operation):
    """Mixin that the class of a rewritten layer adds to the original class."""

    _original_class: Any
    _computes: str | None = None  # compute dtype; None: that of the policy
    _gives: str | None = None  # dtype of floating outputs; None: as computed
    _adds: str | None = None  # dtype of added losses; None: as computed
    _pending: dict[str, Any] = {}  # noqa: RUF012 - changes of sublayers that are not built yet, by position

    def __init_subclass__(cls, **_: Any) -> None:
        """Hides the subclass from the original class, which treats subclasses as custom code."""

    @property
    def compute_dtype(self) -> Any:
        # The policy stays as saved: it decides the dtypes of variables and sublayers.
        return self._computes or super().compute_dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before the casts of Keras, so that the float32 output of another rewritten layer is found without loss.
        if self._computes == "float32":
            args, kwargs = tree.map_structure(widen, (args, kwargs))
        return super().__call__(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_with_casts(super().call, args, kwargs)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._call_with_casts(super().quantized_call, args, kwargs)

    def _call_with_casts(self, call: Any, args: Any, kwargs: Any) -> Any:
        # Keras builds a loaded model by `call` alone, without the casts of `__call__`.
        dtype = self.compute_dtype if self._pending and self.autocast else self._computes
        args, kwargs = tree.map_structure(lambda x: cast(x, dtype), (args, kwargs))
        return tree.map_structure(lambda x: cast(x, self._gives), call(*args, **kwargs))

    @property
    def quantize(self) -> Any:
        """The original method: Keras quantizes only layers that are exactly of one of its classes."""
        return functools.partial(_quantize, self)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree.map_structure(lambda x: _cast_spec(x, self._computes), (args, kwargs))
        return tree.map_structure(lambda x: _cast_spec(x, self._gives), super().compute_output_spec(*args, **kwargs))

    @property
    def activity_regularizer(self) -> Any:
        regularizer = vars(self).get("activity_regularizer")
        return None if regularizer is None else Float32Regularizer(regularizer)

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        self.__dict__["activity_regularizer"] = value

    def add_loss(self, loss: Any) -> None:
        super().add_loss(tree.map_structure(widen, loss))

    def get_config(self) -> dict[str, Any]:
        with _with_original_class(self):
            config = keras.saving.serialize_keras_object(self)
        of = {key: config[key] for key in ("module", "class_name", "registered_name")}
        changes = {**changes_of(self), "inside": {**self._pending, **_changes_inside(self)}}
        return {**config["config"], _ENTRY: {"of": of, **changes}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        changes = dict(config.pop(_ENTRY))
        of, inside = changes.pop("of"), changes.pop("inside")
        with temporary_state.global_policy(config.get("dtype")):
            if cls is Forced:
                layer = keras.saving.deserialize_keras_object({**of, "config": config}, custom_objects)
            else:  # a clone: the original class need not be registered
                layer = cls._original_class.from_config(config)
        if inside:
            _set(swap_class(layer), "_pending", {"": changes, **inside})
            if layer.built:
                _apply_pending(layer)
        else:
            rewrite(layer, **changes)
        return layer

    def build_from_config(self, config: dict[str, Any]) -> None:
        with temporary_state.global_policy(self.dtype_policy):
            super().build_from_config(config)
        _apply_pending(self)

    def _post_build(self) -> None:
        super()._post_build()
        _apply_pending(self)


def rewrite(
    layer: Any, computes: str | None = None, gives: str | None = None, adds: str | None = None, activations: Any = ()
) -> bool:
    """Rewrites a layer or operation in place, and returns whether that changed anything.

    Args:
        layer: The layer or operation.
        computes: The dtype in which it computes. Defaults to that of its policy.
        gives: The dtype of its floating outputs. Defaults to the dtype in which they are computed.
        adds: The dtype of the losses that its regularizers add. Defaults to the dtype in which they are computed.
        activations: Names of attributes whose activations are computed in float32.
    """
    before = changes_of(layer)
    for name in set(activations) - set(before.get("activations", ())):
        setattr(layer, name, Float32Activation(getattr(layer, name)))
    for key, dtype in {"computes": computes, "gives": gives, "adds": adds}.items():
        if dtype is not None and dtype != before.get(key):
            _set(swap_class(layer), f"_{key}", dtype)
            _cast_constants(layer)
            _widen_regularizers(layer)
    return changes_of(layer) != before


def changes_of(layer: Any) -> dict[str, Any]:
    """Returns the changes of a layer or operation, as arguments of `rewrite`."""
    changes = {key: getattr(layer, f"_{key}", None) for key in ("computes", "gives", "adds")}
    changes["activations"] = [
        name for name in activations_of(layer) if isinstance(getattr(layer, name), Float32Activation)
    ]
    return {key: value for key, value in changes.items() if value}


def swap_class(layer: Any) -> Any:
    """Gives a layer the subclass of its class that adds `Forced`, unless it has it already, and returns the layer."""
    if not isinstance(layer, Forced):
        _set(layer, "__class__", _forced(original_class(layer)))
    return layer


@functools.cache
def _forced(cls: Any) -> Any:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    names["_original_class"] = cls
    new: Any = types.new_class(cls.__name__, (Forced, cls), exec_body=lambda body: body.update(names))
    keras.saving.register_keras_serializable("tfmixed", "Forced")(new)
    keras.saving.get_custom_objects()["tfmixed>Forced"] = Forced  # the name loads the general class
    return new


@contextlib.contextmanager
def _with_original_class(layer: Any) -> Iterator[None]:
    # Keras treats methods that it finds overridden differently.
    now = type(layer)
    _set(layer, "__class__", original_class(layer))
    try:
        yield
    finally:
        _set(layer, "__class__", now)


def _quantize(layer: Any, *args: Any, **kwargs: Any) -> None:
    with _with_original_class(layer):
        layer.quantize(*args, **kwargs)


@contextlib.contextmanager
def without_rewrites(model: Any) -> Iterator[None]:
    """Undoes all rewrites within the context, so that a model saved there needs nothing of this package."""
    with contextlib.ExitStack() as stack:
        for layer in [model, *descendants(model)]:
            for name in changes_of(layer).get("activations", ()):
                activation = getattr(layer, name)
                stack.callback(_set, layer, name, activation)
                _set(layer, name, activation.activation)
            if isinstance(layer, Forced):
                stack.enter_context(_with_original_class(layer))
        yield


def _cast_constants(layer: Any) -> None:
    # The only layer of Keras that keeps constants in the dtype in which it was built (3.15).
    if isinstance(layer, keras.layers.Normalization) and layer.built:
        if layer.input_mean is None:
            layer.finalize_state()
        else:
            layer.build(*layer._build_shapes_dict.values())


def _widen_regularizers(layer: Any) -> None:
    for variable in half_regularized(layer) if getattr(layer, "_adds", None) else ():
        variable.regularizer = Float32Regularizer(variable.regularizer)


def half_regularized(layer: Any) -> list[Any]:
    """Returns the half-precision variables of a layer itself whose regularizer computes in half precision."""
    half = [variable for variable in getattr(layer, "_trainable_variables", ()) if variable.dtype in HALF]
    return [
        variable
        for variable in half
        if variable.regularizer and not isinstance(variable.regularizer, Float32Regularizer)
    ]


def saves_children(layer: Any) -> bool:
    """Returns whether the config of a layer contains those of its sublayers, with their changes."""
    cls = original_class(layer)
    return isinstance(layer, (keras.Function, keras.Sequential)) and all(
        getattr(cls, name).__module__.startswith("keras.") for name in ("__init__", "get_config")
    )


def _changes_inside(layer: Any, position: str = "") -> dict[str, Any]:
    """Returns changes and policies of sublayers by position: a loaded custom layer makes them under any policy."""
    if not position and saves_children(layer):
        return {}
    changes = {}
    for index, child in enumerate(children(layer)):
        here, policy = f"{position}{index}", getattr(child, "dtype_policy", None)
        changes[here] = changes_of(child)
        if policy is not None and not isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            changes[here]["policy"] = keras.dtype_policies.serialize(policy)
        changes.update(_changes_inside(child, f"{here}/"))
    return changes


def _apply_pending(layer: Forced) -> None:
    """Applies the saved changes once all sublayers exist, since some of them alone would not fit together."""
    for position, changes in layer._pending.items():
        found = layer
        for index in map(int, filter(None, position.split("/"))):
            found = children(found)[index]
        if "policy" in changes and found.dtype_policy != (policy := keras.dtype_policies.get(changes["policy"])):
            found.dtype_policy = policy
        rewrite(found, **{key: value for key, value in changes.items() if key != "policy"})
    _set(layer, "_pending", {})
    _widen_regularizers(layer)
    update_dtypes(layer)


def update_dtypes(layer: Any) -> None:
    """Gives the symbolic tensors of a layer and of its sublayers the dtypes that they have after a rewrite."""
    for inner in [*reversed(descendants(layer)), layer]:
        nodes = {} if (graph := graph_of(inner)) is None else graph._nodes_by_depth
        for node in (node for depth in sorted(nodes, reverse=True) for node in nodes[depth]):
            for tensor, dtype in [] if node.is_input else zip(node.outputs, _dtypes(node), strict=True):
                tensor._dtype = dtype


def _dtypes(node: Any) -> list[str]:
    layer, now = node.operation, [tensor.dtype for tensor in node.outputs]
    if not isinstance(layer, keras.layers.Layer):
        spec = layer.compute_output_spec(*node.arguments.args, **node.arguments.kwargs)
        return [tensor.dtype for tensor in tree.flatten(spec)]
    if (inner := graph_of(layer)) is not None:
        now = [tensor.dtype for tensor in inner.outputs]
    # Layers cast their inputs, so the layers before this one do not matter.
    dtype = getattr(layer, "_gives", None) or getattr(layer, "_computes", None)
    return [dtype if dtype and before in FLOATS else before for before in now]


def _cast_spec(x: Any, dtype: str | None) -> Any:
    if dtype is None or not isinstance(x, keras.KerasTensor) or x.dtype not in FLOATS:
        return x
    return keras.KerasTensor(x.shape, dtype=dtype, sparse=x.sparse, name=x.name)
