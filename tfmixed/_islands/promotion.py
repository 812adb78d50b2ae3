"""Promotion to float32 where half-precision layers meet code that is not Keras's.

TensorFlow refuses to add bfloat16 and float32, and scripts are full of float32: constants, noise, labels, masks. So
Keras's layers keep their half precision among themselves, and all other code sees float32: what a script gets from
a layer that it calls, what custom layers are given and get from Keras's layers inside, and losses that layers add.

A layer takes this, as its policy, when it is made. Policies, configs and variables stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree

from tfmixed._islands import layer_rewrite
from tfmixed._utils import layer_tree
from tfmixed._utils.patching import around
from tfmixed.formats import HALF

_Plain = Callable[..., Any]
# Packages whose layers are written for half precision, and whose functions take it.
_LIBRARIES = {"keras", "keras_hub", "keras_nlp", "keras_cv", "keras_rs", "tfmixed"}
_FRAMEWORKS = {*_LIBRARIES, "tensorflow", "jax", "torch"}
_PREPROCESSING = "keras.src.layers.preprocessing."
# Layers of Keras that run code from elsewhere.
_HOSTS = (
    keras.layers.Lambda,
    keras.layers.JaxLayer,
    keras.layers.TFSMLayer,
    keras.layers.TorchModuleWrapper,
)
_MARK = "_tfmixed_promotes"


class _Call(threading.local):
    """The innermost layer that a thread is running."""

    layer: Any = None


_call = _Call()
_is_on = False


def is_on() -> bool:
    """Returns whether layers that are made now promote."""
    return _is_on


def switch(on: bool) -> None:
    """Sets whether layers that are made from now on promote."""
    global _is_on
    if on:
        _install()
    _is_on = on


@functools.cache
def _install() -> None:
    kind = keras.layers.Layer
    around(kind, "__init__", _made)
    around(kind, "compute_dtype", _compute_dtype)
    around(kind, "losses", _losses)
    around(kind, "__call__", _called)
    around(kind, "stateless_call", _called_stateless)
    around(kind, "compute_output_spec", _specified)
    for name in ("activity_regularizer", "activation", "recurrent_activation"):
        setattr(kind, name, _Function(name))


def _made(plain: _Plain, layer: Any, *arguments: Any, **named: Any) -> None:
    plain(layer, *arguments, **named)
    if _is_on:
        object.__setattr__(layer, _MARK, True)  # Keras's own tracks values


def _compute_dtype(plain: _Plain, layer: Any) -> str:
    dtype = plain(layer)
    return "float32" if dtype in HALF and _MARK in vars(layer) and _runs_other_code(layer) else dtype


def _losses(plain: _Plain, layer: Any) -> list[Any]:
    return [_widened(loss) for loss in plain(layer)] if _MARK in vars(layer) else plain(layer)


def _called(plain: _Plain, layer: Any, *arguments: Any, **named: Any) -> Any:
    with _within(layer):
        outputs = plain(layer, *arguments, **named)
    return _promoted(layer, outputs)


def _called_stateless(plain: _Plain, layer: Any, *arguments: Any, **named: Any) -> tuple[Any, ...]:
    with _within(layer):
        outputs, *rest = plain(layer, *arguments, **named)
    return _promoted(layer, outputs), *rest


def _specified(plain: _Plain, layer: Any, *arguments: Any, **named: Any) -> Any:
    with _within(layer):
        return plain(layer, *arguments, **named)


class _Regularizer(layer_rewrite.Float32Regularizer):
    """Made for one call."""


class _Activation(layer_rewrite.Float32Activation):
    """Made for one call."""


class _Function:
    """An attribute of layers that holds a function, which computes in float32 for the thread that runs the layer.

    The layer's `__dict__` keeps the function itself. So configs and files are unchanged, and calls may overlap.

    Args:
        name: The name of the attribute.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.of_a_script = name != "activity_regularizer"  # activations of Keras take half precision
        self.inside = "activation" if self.of_a_script else "regularizer"
        self.wrapper: Any = _Activation if self.of_a_script else _Regularizer

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None or self.name not in vars(layer):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {self.name!r}", name=self.name, obj=layer)
        function = vars(layer)[self.name]
        if _call.layer is not layer or _MARK not in vars(layer) or not callable(function):
            return function
        return function if self.of_a_script and _package(function) in _FRAMEWORKS else self.wrapper(function)

    def __set__(self, layer: Any, function: Any) -> None:
        # Keras puts back what it read during a call, or hands it to sublayers that it makes then.
        is_wrapped = isinstance(function, self.wrapper)
        vars(layer)[self.name] = getattr(function, self.inside) if is_wrapped else function

    def __delete__(self, layer: Any) -> None:
        if vars(layer).pop(self.name, self) is self:
            raise AttributeError(self.name)


@contextlib.contextmanager
def _within(layer: Any) -> Iterator[None]:
    around_it, _call.layer = _call.layer, layer
    try:
        yield
    finally:
        _call.layer = around_it


def _promoted(layer: Any, outputs: Any) -> Any:
    """Returns in float32 what a layer gives to code that is not Keras's; symbolic tensors stay."""
    caller = _call.layer
    if _MARK not in vars(layer) or (
        caller is not None and (caller.compute_dtype in HALF or not _runs_other_code(caller))
    ):
        return outputs
    return tree.map_structure(_widened, outputs)


def _runs_other_code(layer: Any) -> bool:
    """Returns whether a layer's `call` is not Keras's, or prepares data, or loops over such a layer."""
    kind = layer_tree.class_of(layer)
    if _package(kind.call) not in _LIBRARIES or issubclass(kind, _HOSTS):
        return True
    if isinstance(layer, keras.layers.RNN):
        inside = [getattr(layer, "cell", None)]
    elif isinstance(layer, keras.layers.StackedRNNCells):
        inside = getattr(layer, "cells", [])
    elif isinstance(layer, keras.layers.TimeDistributed):
        inside = [getattr(layer, "layer", None)]
    else:
        return bool(kind.call.__module__.startswith(_PREPROCESSING))
    return any(_runs_other_code(each) for each in inside if each is not None)


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def _widened(x: Any) -> Any:
    return layer_rewrite.convert(x, "float32")
