"""Layers and operations of a built model that compute in float32 from now on: their class changes, they stay.

The new class is a subclass of the old one. So variables, their paths, nodes of functional graphs, `isinstance` and
the state of optimizers are as before. Its config is the old one and an entry that says what was changed, and Keras
saves it under one name, `tfmixed>Forced`.

Keras's `DTypePolicyMap` cannot say this. It maps the paths of layers to policies, but `Softmax`, also the one of
`MultiHeadAttention`, and all other layers without a `build` of their own have no path (Keras 3.15), a user's code does
not hand its policy on to its sublayers, plain operations have no policy, no policy speaks of an activation or an
output alone, and none has float16 variables and float32 computations. A map that a layer already has stays in force.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops, tree
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

from tfmixed._utils import temporary_state
from tfmixed._utils.layer_tree import activations_of, children, class_of, descendants, graph_of
from tfmixed.formats import HALF

_ENTRY = "in_float32"
_set = object.__setattr__  # Keras's own tracks values, and refuses some after the build.


@keras.saving.register_keras_serializable("tfmixed", "Forced")
class Forced(keras.Operation):
    """What the new classes add to the old ones."""

    _made_as: Any  # the old class
    _computes: str | None = None  # None: as the policy says
    _gives: str | None = None  # the dtype of floating outputs; None: as computed
    _adds: str | None = None  # the dtype of the losses of its regularizers; None: as computed
    _later: dict[str, Any] = {}  # noqa: RUF012 - what waits for sublayers to be made, by their places

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps the old class from treating the new one as one that a user wrote."""

    @property
    def compute_dtype(self) -> Any:
        # Not by the policy: it stays what is saved, what sublayers get, and what the dtype of variables comes from.
        return self._computes or super().compute_dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before Keras casts them itself, so that what another forced layer gave is found with all its bits.
        return super().__call__(*tree.map_structure(self._widened, args), **tree.map_structure(self._widened, kwargs))

    def _widened(self, x: Any) -> Any:
        return convert(x, "float32") if self._computes == "float32" else x

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._converted(super().call, args, kwargs)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._converted(super().quantized_call, args, kwargs)

    def _converted(self, call: Any, args: Any, kwargs: Any) -> Any:
        # Keras builds a loaded model by its `call` alone, which leaves out the casts of `__call__`.
        dtype = self.compute_dtype if self._later and self.autocast else self._computes
        args, kwargs = tree.map_structure(lambda x: convert(x, dtype), (args, kwargs))
        return tree.map_structure(lambda x: convert(x, self._gives), call(*args, **kwargs))

    @property
    def quantize(self) -> Any:
        """The method of the layer as it was made: Keras quantizes only what is exactly of one of its classes."""
        return functools.partial(_quantize, self)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        if self._computes is not None:
            args, kwargs = tree.map_structure(lambda x: _respec(x, self._computes), (args, kwargs))
        return tree.map_structure(lambda x: _respec(x, self._gives), super().compute_output_spec(*args, **kwargs))

    @property
    def activity_regularizer(self) -> Any:
        regularizer = vars(self).get("activity_regularizer")
        return None if regularizer is None else Float32Regularizer(regularizer)

    @activity_regularizer.setter
    def activity_regularizer(self, value: Any) -> None:
        self.__dict__["activity_regularizer"] = value

    def add_loss(self, loss: Any) -> None:
        super().add_loss(tree.map_structure(_widen, loss))

    def get_config(self) -> dict[str, Any]:
        with _as_before(self):
            config = keras.saving.serialize_keras_object(self)
        of = {key: config[key] for key in ("module", "class_name", "registered_name")}
        changes = {**change_of(self), "inside": {**self._later, **_changes_inside(self)}}
        return {**config["config"], _ENTRY: {"of": of, **changes}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        change = dict(config.pop(_ENTRY))
        of, inside = change.pop("of"), change.pop("inside")
        with temporary_state.global_policy(config.get("dtype")):
            if cls is Forced:
                layer = keras.saving.deserialize_keras_object({**of, "config": config}, custom_objects)
            else:  # asked for by its own class, which need not be registered
                layer = cls._made_as.from_config(config)
        if inside:
            _set(swapped(layer), "_later", {"": change, **inside})
            if layer.built:
                _repeat(layer)
        else:
            put(layer, **change)
        return layer

    def build_from_config(self, config: dict[str, Any]) -> None:
        with temporary_state.global_policy(self.dtype_policy):
            super().build_from_config(config)
        _repeat(self)

    def _post_build(self) -> None:
        super()._post_build()
        _repeat(self)


@keras.saving.register_keras_serializable("tfmixed")
class Float32Activation:
    """An activation that is computed in float32 and gives the dtype that it was given.

    Args:
        activation: What Keras takes as an activation.

    Example:
    >>> activation = Float32Activation("softmax")
    >>> activation(ops.cast([[0.0, -20.0]], "float16")).dtype.name
    'float16'
    """

    def __init__(self, activation: Any) -> None:
        self.activation = keras.activations.get(activation)
        self.__name__ = getattr(self.activation, "__name__", type(self.activation).__name__)

    def __call__(self, x: Any) -> Any:
        return convert(self.activation(_widen(x)), keras.backend.standardize_dtype(x.dtype))

    def get_config(self) -> dict[str, Any]:
        return {"activation": keras.activations.serialize(self.activation)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Float32Activation:
        return cls(**config)


@keras.saving.register_keras_serializable("tfmixed")
class Float32Regularizer(keras.regularizers.Regularizer):
    """A regularizer that computes its loss in float32, whatever the dtype of what it is given.

    Args:
        regularizer: What Keras takes as a regularizer.

    Example:
    >>> regularizer = Float32Regularizer(keras.regularizers.L2(1.0))
    >>> float(regularizer(ops.cast([300.0], "float16")))
    90000.0
    """

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = keras.regularizers.get(regularizer)

    def __call__(self, x: Any) -> Any:
        return _widen(self.regularizer(_widen(ops.convert_to_tensor(x))))

    def get_config(self) -> dict[str, Any]:
        return {"regularizer": keras.regularizers.serialize(self.regularizer)}


def convert(x: Any, dtype: str | None) -> Any:
    """Casts between the floating dtypes. What was float32 before a cast to half is found again, with all its bits.

    A user's code gets half precision from a softmax, since TensorFlow refuses to mix; but where that very tensor is
    what the model returns, its float32 values are.
    """
    if dtype is None or not ops.is_tensor(x):
        return x
    before = keras.backend.standardize_dtype(x.dtype)
    if before == dtype or before not in ("float32", *HALF):
        return x
    wide = get_tensor_attr(x, "_tfmixed_wide") if dtype == "float32" else None
    y = ops.cast(x, dtype) if wide is None else wide
    if (mask := get_tensor_attr(x, "_keras_mask")) is not None:
        set_tensor_attr(y, "_keras_mask", mask)
    if before == "float32":
        set_tensor_attr(y, "_tfmixed_wide", x)
    return y


def _widen(x: Any) -> Any:
    return convert(x, "float32")


def _respec(x: Any, dtype: str | None) -> Any:
    if dtype is None or not isinstance(x, keras.KerasTensor) or x.dtype not in ("float32", *HALF):
        return x
    return keras.KerasTensor(x.shape, dtype=dtype, sparse=x.sparse, name=x.name)


@contextlib.contextmanager
def _as_before(layer: Any) -> Iterator[None]:
    # Keras makes configs in other ways for methods that it finds not to be overridden.
    now = type(layer)
    _set(layer, "__class__", class_of(layer))
    try:
        yield
    finally:
        _set(layer, "__class__", now)


def _quantize(layer: Any, *args: Any, **kwargs: Any) -> None:
    with _as_before(layer):
        layer.quantize(*args, **kwargs)


@contextlib.contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Has a model, and all in it, look as before anything was changed: what is saved then needs nothing of ours."""
    with contextlib.ExitStack() as stack:
        for each in [model, *descendants(model)]:
            for name in change_of(each).get("activations", ()):
                activation = getattr(each, name)
                stack.callback(_set, each, name, activation)
                _set(each, name, activation.activation)
            if isinstance(each, Forced):
                stack.enter_context(_as_before(each))
        yield


@functools.cache
def _forced(cls: Any) -> Any:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")} | {"_made_as": cls}
    new: Any = types.new_class(cls.__name__, (Forced, cls), exec_body=lambda body: body.update(names))
    keras.saving.register_keras_serializable("tfmixed", "Forced")(new)
    keras.saving.get_custom_objects()["tfmixed>Forced"] = Forced  # Whoever asks by name gets the general one.
    return new


def swapped(layer: Any) -> Any:
    """Gives a layer the new class, if it has not got it."""
    if not isinstance(layer, Forced):
        _set(layer, "__class__", _forced(class_of(layer)))
    return layer


def change_of(layer: Any) -> dict[str, Any]:
    """Returns what was changed in a layer or operation, as `put` takes it."""
    change = {key: getattr(layer, f"_{key}", None) for key in ("computes", "gives", "adds")}
    change["activations"] = [
        name for name in activations_of(layer) if isinstance(getattr(layer, name), Float32Activation)
    ]
    return {key: value for key, value in change.items() if value}


def put(
    layer: Any, computes: str | None = None, gives: str | None = None, adds: str | None = None, activations: Any = ()
) -> set[str]:
    """Changes a layer or operation in place, and returns which of the four that were new to it."""
    wanted = {"computes": computes, "gives": gives, "adds": adds}
    old = change_of(layer)
    for name in set(activations) - set(old.get("activations", ())):
        setattr(layer, name, Float32Activation(getattr(layer, name)))
    for key, dtype in wanted.items():
        if dtype is not None and dtype != old.get(key):
            _set(swapped(layer), f"_{key}", dtype)
            _cast_constants(layer)
            _widen_regularizers(layer)
    return {key for key, value in change_of(layer).items() if value != old.get(key)}


def _cast_constants(layer: Any) -> None:
    # Keras's only layer that keeps constants in the dtype that it had when it was built (3.15).
    if isinstance(layer, keras.layers.Normalization) and layer.built:
        if layer.input_mean is None:
            layer.finalize_state()
        else:
            layer.build(*layer._build_shapes_dict.values())


def _widen_regularizers(layer: Any) -> None:
    for variable in half_regularized(layer) if getattr(layer, "_adds", None) else ():
        variable.regularizer = Float32Regularizer(variable.regularizer)


def half_regularized(layer: Any) -> list[Any]:
    """Returns a layer's own variables in half precision whose regularizer computes in it."""
    own = [each for each in getattr(layer, "_trainable_variables", ()) if each.dtype in HALF]
    return [each for each in own if each.regularizer and not isinstance(each.regularizer, Float32Regularizer)]


def saves_children(layer: Any) -> bool:
    """Returns whether a layer's config holds the configs of what is inside, with what was changed there."""
    old = class_of(layer)
    if not isinstance(layer, (keras.Function, keras.Sequential)):
        return False
    return all(getattr(old, name).__module__.startswith("keras.") for name in ("__init__", "get_config"))


def _changes_inside(layer: Any, place: str = "") -> dict[str, Any]:
    """Returns changes, and policies, since a user's code makes its sublayers anew under whatever the global one is."""
    if not place and saves_children(layer):
        return {}
    changes = {}
    for index, child in enumerate(children(layer)):
        here, policy = f"{place}{index}", getattr(child, "dtype_policy", None)
        changes[here] = change_of(child)
        if policy is not None and not isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            changes[here]["policy"] = keras.dtype_policies.serialize(policy)
        changes.update(_changes_inside(child, f"{here}/"))
    return changes


def _repeat(layer: Forced) -> None:
    """Repeats the changes of a saved layer once its sublayers are made: half of them would not fit together."""
    for place, change in layer._later.items():
        found = layer
        for index in map(int, filter(None, place.split("/"))):
            found = children(found)[index]
        if "policy" in change and found.dtype_policy != (policy := keras.dtype_policies.get(change["policy"])):
            found.dtype_policy = policy
        put(found, **{key: value for key, value in change.items() if key != "policy"})
    _set(layer, "_later", {})
    _widen_regularizers(layer)
    retype(layer)


def retype(layer: Any) -> None:
    """Gives symbolic tensors, of a layer and inside it, the dtypes that they have since layers were changed."""
    for each in [*reversed(descendants(layer)), layer]:
        nodes = {} if (graph := graph_of(each)) is None else graph._nodes_by_depth
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
    dtype = getattr(layer, "_gives", None) or getattr(layer, "_computes", None)
    # A layer casts what it is given: what comes before it changes nothing.
    return [dtype if dtype and each in ("float32", *HALF) else each for each in now]
