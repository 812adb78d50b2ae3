"""Finds the model that a command is asked about."""

from __future__ import annotations

import contextlib
import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
from keras.src.trainers.data_adapters import get_data_adapter

from tfmixed._utils import temporary_state
from tfmixed.errors import UsageError
from tfmixed.scaling import validation

_FORMS = '"module:function" that returns a Keras model, or a .keras file'


def load_model(spec: str) -> keras.Model:
    """Returns the model that `spec` names, built for the inputs beside it if need be.

    Args:
        spec: As in `load_step`.

    Raises:
        UsageError: As for `load_step`.
        ValueError: If the inputs beside it are neither arrays nor a dataset.
    """
    model, inputs, targets = load_step(spec)
    if not model.built:
        build(model, first_batch(inputs, targets)[0])
    return model


def load_step(spec: str) -> tuple[keras.Model, Any, Any]:
    """Returns the model that `spec` names, with the inputs and targets that its function returned beside it, or None.

    Args:
        spec: `"module:function"`, where calling the function without arguments gives a Keras model, or a tuple of a
            model, inputs and targets. The module may lie in the current directory. Or the path of a `.keras` file.

    Raises:
        UsageError: If there is no such file, module or function, or it gives no Keras model, or one that is not built
            and comes without inputs. What fails inside the module or the function is raised as it is.
    """
    if spec.endswith(".keras"):
        return _from_file(Path(spec)), None, None
    function = function_of(spec)
    made = function if isinstance(function, keras.Model) else function()
    parts = made if isinstance(made, tuple) else (made,)
    model, inputs, targets = (*parts, None, None, None)[:3]
    if len(parts) > 3 or not isinstance(model, keras.Model):
        raise UsageError(
            f"model must be {_FORMS}, received {spec!r}: it returned {made!r:.60}. Return `model` or `model, x, y`"
        )
    if inputs is None and not model.built:
        raise UsageError(
            f"model must be {_FORMS}, received {spec!r}: its model is not built. Give it a keras.Input, or return "
            "`model, x, y`"
        )
    return model, inputs, targets


def load_problem(spec: str) -> tuple[keras.Model, Any]:
    """Returns the model that `spec` names, compiled, and the data that its function returned beside it.

    Raises:
        UsageError: As for `load_step`; or the model is not compiled, or comes alone.
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
        UsageError: If there is no such module or function.
    """
    module, _, name = spec.rpartition(":")
    if not (module and name):
        raise UsageError(f"model must be {_FORMS}, received {spec!r}")
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(
            f"model must be {_FORMS}, received {spec!r}: {module!r} is not the name of a module. Write it as in an "
            "import, and run the command in the folder where the module lies"
        )
    return _attribute(spec, _imported(spec, module), name)


def first_batch(inputs: Any, targets: Any = None) -> tuple[Any, Any]:
    """Returns inputs and targets: those given, or the first batch where a dataset of both is given instead."""
    if targets is not None or all(hasattr(leaf, "shape") or leaf is None for leaf in keras.tree.flatten(inputs)):
        return inputs, targets
    for batch in batches(inputs):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return x, y
    raise ValueError(f"data must hold a batch at least, received {inputs!r:.200}")


def batches(data: Any, batch_size: int | None = None) -> Iterator[Any]:
    """Yields the batches that `fit` would train on.

    Args:
        data: What `fit` takes, as in `measure_gradients`.
        batch_size: Of arrays. Defaults to None, which is 32.

    Raises:
        ValueError: If `fit` does not take the data.
    """
    parts = data if isinstance(data, tuple) else (data,)
    if not 1 <= len(parts) <= 3 or parts[0] is None or (isinstance(parts[0], (list, tuple, dict)) and not parts[0]):
        raise ValueError(
            f"data must be what `fit` takes, as (x, y, sample_weight) or a dataset, received {data!r:.200}"
        )
    if batch_size is not None:
        validation.count("batch_size", batch_size, 1)
    adapter = get_data_adapter(*parts, batch_size=batch_size)
    iterators = {"tensorflow": "get_tf_dataset", "jax": "get_jax_iterator", "torch": "get_torch_dataloader"}
    with contextlib.ExitStack() as stack:
        if isinstance(data, keras.utils.PyDataset):  # no epoch of a user's begins or ends, where data may be shuffled
            for name in ("on_epoch_begin", "on_epoch_end"):
                temporary_state.put(stack, data, name, lambda: None)
        adapter.on_epoch_begin()
        stack.callback(adapter.on_epoch_end)  # ends the workers of a PyDataset
        yield from getattr(adapter, iterators[keras.backend.backend()])()


def build(model: keras.Model, inputs: Any) -> None:
    """Builds a model by a symbolic call with the shapes and dtypes of a batch, without running it.

    Raises:
        ValueError: If the inputs are not arrays, or a structure of them.
    """

    def symbolic(array: Any) -> keras.KerasTensor:
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(
                f"inputs must be arrays, or a structure of them, to build a model. Received: {type(array).__name__}"
            )
        return keras.KerasTensor(tuple(array.shape), keras.backend.standardize_dtype(array.dtype))

    model(keras.tree.map_structure(symbolic, inputs))


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
