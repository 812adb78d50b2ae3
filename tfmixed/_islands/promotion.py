"""Promotion to float32 where half-precision layers meet code that is not part of Keras.

TensorFlow refuses to add bfloat16 and float32, and scripts are full of float32: constants, noise, labels, masks. Keras
layers therefore keep half precision among themselves, and all other code sees float32: scripts in the outputs of the
layers that they call, custom layers in their inputs and in the outputs of Keras layers inside, and added losses.

A layer gets the promotion, like its policy, when it is created. Policies, configs and variables do not change.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree

from tfmixed._islands.casts import Float32Activation, Float32Regularizer, widen
from tfmixed._utils import layer_tree
from tfmixed._utils.patching import around
from tfmixed.formats import HALF

_Method = Callable[..., Any]
# Packages whose layers are written for half precision, and packages whose functions accept it.
_LIBRARIES = {"keras", "keras_hub", "keras_nlp", "keras_cv", "keras_rs", "tfmixed"}
_FRAMEWORKS = {*_LIBRARIES, "tensorflow", "jax", "torch"}
_PREPROCESSING = "keras.src.layers.preprocessing."
# Keras layers that run code from elsewhere.
_HOSTS = (keras.layers.Lambda, keras.layers.JaxLayer, keras.layers.TFSMLayer, keras.layers.TorchModuleWrapper)
_MARK = "_tfmixed_promotes"


class _Running(threading.local):
    """The innermost layer that the thread is running."""

    layer: Any = None


_running = _Running()
_is_on = False


def is_on() -> bool:
    """Returns whether new layers get the promotion."""
    return _is_on


def switch(on: bool) -> None:
    """Sets whether new layers get the promotion."""
    global _is_on
    if on:
        _install()
    _is_on = on


@functools.cache
def _install() -> None:
    layer = keras.layers.Layer
    around(layer, "__init__", _init)
    around(layer, "compute_dtype", _compute_dtype)
    around(layer, "losses", _losses)
    around(layer, "__call__", _call)
    around(layer, "stateless_call", _stateless_call)
    around(layer, "compute_output_spec", _compute_output_spec)
    layer.activity_regularizer = _PromotedFunction("activity_regularizer", _Regularizer, "regularizer", set())
    layer.activation = _PromotedFunction("activation", _Activation, "activation", _FRAMEWORKS)
    layer.recurrent_activation = _PromotedFunction("recurrent_activation", _Activation, "activation", _FRAMEWORKS)


def _init(original: _Method, layer: Any, *args: Any, **kwargs: Any) -> None:
    original(layer, *args, **kwargs)
    if _is_on:
        object.__setattr__(layer, _MARK, True)  # Keras's own tracks values


def _compute_dtype(original: _Method, layer: Any) -> str:
    dtype = original(layer)
    return "float32" if dtype in HALF and _MARK in vars(layer) and _runs_other_code(layer) else dtype


def _losses(original: _Method, layer: Any) -> list[Any]:
    return [widen(loss) for loss in original(layer)] if _MARK in vars(layer) else original(layer)


def _call(original: _Method, layer: Any, *args: Any, **kwargs: Any) -> Any:
    with _within(layer):
        outputs = original(layer, *args, **kwargs)
    return _promoted(layer, outputs)


def _stateless_call(original: _Method, layer: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    with _within(layer):
        outputs, *rest = original(layer, *args, **kwargs)
    return _promoted(layer, outputs), *rest


def _compute_output_spec(original: _Method, layer: Any, *args: Any, **kwargs: Any) -> Any:
    with _within(layer):
        return original(layer, *args, **kwargs)


class _Regularizer(Float32Regularizer):
    """Regularizer for a single call."""


class _Activation(Float32Activation):
    """Activation for a single call."""


class _PromotedFunction:
    """Layer attribute that holds a function, and returns it as a float32 function to the thread that runs the layer.

    The `__dict__` of the layer keeps the function itself, so configs and files do not change, and calls may overlap.

    Args:
        name: The name of the attribute.
        wrapper: The class that wraps the function.
        wrapped: The attribute of `wrapper` that holds the function.
        excluded: Packages whose functions are not wrapped.
    """

    def __init__(self, name: str, wrapper: Any, wrapped: str, excluded: set[str]) -> None:
        self.name, self.wrapper, self.wrapped, self.excluded = name, wrapper, wrapped, excluded

    def __get__(self, layer: Any, cls: Any = None) -> Any:
        if layer is None or self.name not in vars(layer):
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self.name!r}", name=self.name, obj=layer)
        function = vars(layer)[self.name]
        if _running.layer is not layer or _MARK not in vars(layer) or not callable(function):
            return function
        return function if _package(function) in self.excluded else self.wrapper(function)

    def __set__(self, layer: Any, function: Any) -> None:
        # Keras sets what it read during a call again, or passes it to new sublayers.
        is_wrapped = isinstance(function, self.wrapper)
        vars(layer)[self.name] = getattr(function, self.wrapped) if is_wrapped else function

    def __delete__(self, layer: Any) -> None:
        if vars(layer).pop(self.name, self) is self:
            raise AttributeError(self.name)


@contextlib.contextmanager
def _within(layer: Any) -> Iterator[None]:
    caller, _running.layer = _running.layer, layer
    try:
        yield
    finally:
        _running.layer = caller


def _promoted(layer: Any, outputs: Any) -> Any:
    """Returns the outputs of a layer, in float32 if the caller is not Keras code; symbolic tensors stay."""
    caller = _running.layer
    is_inside_keras = caller is not None and (caller.compute_dtype in HALF or not _runs_other_code(caller))
    return outputs if is_inside_keras or _MARK not in vars(layer) else tree.map_structure(widen, outputs)


def _runs_other_code(layer: Any) -> bool:
    """Returns whether the `call` of a layer is not part of Keras, preprocesses data, or runs such a layer in a loop."""
    cls = layer_tree.original_class(layer)
    if _package(cls.call) not in _LIBRARIES or issubclass(cls, _HOSTS):
        return True
    if isinstance(layer, keras.layers.RNN):
        inside = [getattr(layer, "cell", None)]
    elif isinstance(layer, keras.layers.StackedRNNCells):
        inside = getattr(layer, "cells", [])
    elif isinstance(layer, keras.layers.TimeDistributed):
        inside = [getattr(layer, "layer", None)]
    else:
        return bool(cls.call.__module__.startswith(_PREPROCESSING))
    return any(_runs_other_code(sublayer) for sublayer in inside if sublayer is not None)


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]
