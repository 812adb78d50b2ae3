"""Finds the model that a command is asked about."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tfmixed.errors import UsageError

_FORMS = '"module:function" that returns a built Keras model, or a .keras file'


def load_model(spec: str) -> keras.Model:
    """Returns the model that `spec` names.

    Args:
        spec: `"module:function"`, where calling the function without arguments gives a built Keras model and the
            module may lie in the current directory; or the path of a `.keras` file.

    Raises:
        UsageError: There is no such file, module or function, or it gives no built Keras model. What goes wrong inside
            the module or the function is raised as it is.
    """
    if spec.endswith(".keras"):
        return _from_file(Path(spec))
    return _checked(spec, function_of(spec)())


def load_step(spec: str) -> tuple[keras.Model, Any, Any]:
    """Returns the model that `spec` names, with the inputs and targets that its function returned beside it, or None.

    Raises:
        UsageError: As for `load_model`.
    """
    if spec.endswith(".keras"):
        return _from_file(Path(spec)), None, None
    function = function_of(spec)
    made = function if isinstance(function, keras.Model) else function()
    model, inputs, targets = (*made, None, None)[:3] if isinstance(made, tuple) and made else (made, None, None)
    return _checked(spec, model), inputs, targets


def load_problem(spec: str) -> tuple[keras.Model, Any]:
    """Returns the model that `spec` names, compiled, and the data that its function returned beside it.

    Raises:
        UsageError: As for `load_model`; or it is not compiled, or comes alone.
    """
    model, inputs, targets = load_step(spec)
    if not model.compiled or inputs is None:
        raise UsageError(
            f"model must be compiled and come with inputs and targets, received {spec!r}: let the function return "
            "them as `model, inputs, targets`, or `model, dataset`"
        )
    return model, inputs if targets is None else (inputs, targets)


def function_of(spec: str) -> Callable[[], Any]:
    """Returns the function that `"module:function"` names; the module may lie in the current directory.

    Raises:
        UsageError: There is no such module or function.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise UsageError(f"model must be {_FORMS}, received {spec!r}")
    return _attribute(spec, _imported(spec, module), name)


def _from_file(path: Path) -> keras.Model:
    if not path.is_file():
        raise UsageError(f"model must be {_FORMS}, received {str(path)!r}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"model must be {_FORMS}, received {str(path)!r}: it was not written by model.save")
    return keras.models.load_model(path, compile=False)


def _imported(spec: str, module: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise UsageError(
            f"model must be {_FORMS}, received {spec!r}: there is no module {error.name!r} in {Path.cwd()} or among "
            "the installed ones"
        ) from None


def _attribute(spec: str, module: Any, name: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if not callable(function):
        kind = "has no attribute" if function is None else "can call no"
        raise UsageError(f"model must be {_FORMS}, received {spec!r}: module {module.__name__!r} {kind} {name!r}")
    return function  # type: ignore[no-any-return]  # whatever the user wrote


def _checked(spec: str, model: Any) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise UsageError(f"model must be {_FORMS}, received {spec!r}: it returned {model!r:.60}")
    if not model.built:
        raise UsageError(f"model must be {_FORMS}, received {spec!r}: its model is not built; give it a keras.Input")
    return model
