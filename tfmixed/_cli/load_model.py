"""Models named on the command line, as `module:function` or as a `.keras` file."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfmixed._utils import model_building
from tfmixed.errors import UsageError

_FORMS = '"module:function" that returns a Keras model, or a .keras file'


def load_model(spec: str) -> keras.Model:
    """Returns a model, built from the inputs that its function returns with it if necessary.

    Args:
        spec: See `load_step`.

    Raises:
        UsageError: As for `load_step`.
        ValueError: If the inputs are neither arrays nor a dataset.
    """
    model, inputs, targets = load_step(spec)
    if not model.built:
        model_building.build(model, model_building.first_batch(inputs, targets)[0])
    return model


def load_step(spec: str) -> tuple[keras.Model, Any, Any]:
    """Returns a model, and the inputs and targets that its function returns with it, or None.

    Errors in the module or the function propagate.

    Args:
        spec: Path of a `.keras` file, or `"module:function"`. The module may be in the current directory. The function
            takes no arguments and returns a Keras model, or a tuple of a model, inputs and targets.

    Raises:
        UsageError: If the file, module or function does not exist, if it does not give a Keras model, or if the model
            is not built and comes without inputs.
    """
    if spec.endswith(".keras"):
        return _read(spec), None, None
    function = load_function(spec)
    result = function if isinstance(function, keras.Model) else function()
    parts = result if isinstance(result, tuple) else (result,)
    model, inputs, targets = (*parts, None, None, None)[:3]
    if len(parts) > 3 or not isinstance(model, keras.Model):
        raise _error(spec, f"it returned {result!r:.60}. Return `model` or `model, x, y`")
    if inputs is None and not model.built:
        raise _error(spec, "its model is not built. Add a keras.Input, or return `model, x, y`")
    return model, inputs, targets


def load_training(spec: str) -> tuple[keras.Model, Any]:
    """Returns a compiled model, and its data as `fit` accepts them.

    Raises:
        UsageError: As for `load_step`, or if the model is not compiled or comes without data.
    """
    model, inputs, targets = load_step(spec)
    if not model.compiled or inputs is None:
        raise UsageError(
            "The model must be compiled and come with inputs and targets. Return `model, inputs, targets` or "
            f"`model, dataset` from the function. Received: {spec!r}"
        )
    return model, inputs if targets is None else (inputs, targets)


def load_function(spec: str) -> Callable[[], Any]:
    """Returns the function named by `"module:function"`. The module may be in the current directory.

    Raises:
        UsageError: If the module or function does not exist.
    """
    name, _, attribute = spec.rpartition(":")
    if not (name and attribute):
        raise _error(spec)
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise _error(spec, f"{name!r} is not a module name. Write it as in an import statement")
    module = _import(spec, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        kind = "has no attribute" if function is None else "has a non-callable"
        raise _error(spec, f"module {name!r} {kind} {attribute!r}")
    return function  # type: ignore[no-any-return]  # code of the user


def _error(spec: str, reason: str = "") -> UsageError:
    return UsageError(f"The model must be {_FORMS}. Received: {spec!r}{reason and f', but {reason}'}.")


def _read(spec: str) -> keras.Model:
    path = Path(spec)
    if not path.is_file():
        raise _error(spec, "there is no such file")
    if not zipfile.is_zipfile(path):
        raise _error(spec, "it was not written by `model.save`")
    return keras.models.load_model(path, compile=False)


def _import(spec: str, name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but not one that it imports
        raise _error(spec, f"there is no module {error.name!r} in {Path.cwd()} or among the installed ones") from None
