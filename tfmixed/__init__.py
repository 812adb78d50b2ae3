"""Mixed-precision training for TensorFlow and Keras 3.

Importing this package loads neither TensorFlow nor Keras: each name below is imported when it is first used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tfmixed import (
        auditing,
        callbacks,
        compat,
        config,
        distribute,
        doctor,
        errors,
        formats,
        grad_scaler,
        hardware,
        islands,
        layers,
        losses,
        optimizer,
        plotting,
        policy,
        ranges,
        records,
        scaling,
    )
    from tfmixed.auditing import audit
    from tfmixed.config import Config, load_config
    from tfmixed.errors import ConfigError
    from tfmixed.grad_scaler import GradScaler
    from tfmixed.islands import force_float32
    from tfmixed.optimizer import LossScaleOptimizer
    from tfmixed.policy import policy_scope, set_policy
    from tfmixed.ranges.measure import measure_gradients
    from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

_HOMES = {
    "Config": "config",
    "ConfigError": "errors",
    "ConstantScale": "scaling",
    "DynamicScale": "scaling",
    "GradScaler": "grad_scaler",
    "LogMaxScale": "scaling",
    "LossScaleOptimizer": "optimizer",
    "audit": "auditing",
    "force_float32": "islands",
    "load_config": "config",
    "measure_gradients": "ranges.measure",
    "policy_scope": "policy",
    "set_policy": "policy",
}

__all__ = [
    "Config",
    "ConfigError",
    "ConstantScale",
    "DynamicScale",
    "GradScaler",
    "LogMaxScale",
    "LossScaleOptimizer",
    "__version__",
    "audit",
    "auditing",
    "callbacks",
    "compat",
    "config",
    "distribute",
    "doctor",
    "errors",
    "force_float32",
    "formats",
    "grad_scaler",
    "hardware",
    "islands",
    "layers",
    "load_config",
    "losses",
    "measure_gradients",
    "optimizer",
    "plotting",
    "policy",
    "policy_scope",
    "ranges",
    "records",
    "scaling",
    "set_policy",
]

# The extra that brings each package.
_EXTRAS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch", "matplotlib": "plot"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        lacking = (error.name or "").partition(".")[0]
        if lacking not in _EXTRAS:
            raise
        needs = f"tfmixed.{name} needs {lacking}: pip install 'tfmixed[{_EXTRAS[lacking]}]'"
        raise ModuleNotFoundError(needs, name=lacking) from error
    return getattr(home, name) if name in _HOMES else home


def __dir__() -> list[str]:
    return __all__


class _AfterKeras:
    """Finder in `sys.meta_path` that registers our classes once Keras is imported, since `load_model` needs them.

    Keras is found and loaded by what would do it without this finder, and no error of ours reaches its import.
    wrapt's `when_imported` takes five times as long to import as all the rest of this package.
    """

    is_idle = False

    @classmethod
    def find_spec(cls, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != "keras" or cls.is_idle:
            return None
        cls.is_idle = True  # for the other finders
        try:
            spec = importlib.util.find_spec(name)
        finally:
            cls.is_idle = False
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Registering(spec.loader))
        return spec


class _Registering:
    """Loader that registers our classes after another one, which stays as it is: modules of a zip file share theirs."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _AfterKeras.is_idle = True
        _register()


def _register() -> None:
    """Registers the classes that saved models may hold; warns of those that do not work with this version of Keras."""
    for module in ("_islands.layer_rewrite", "layers", "losses", "optimizer"):
        try:
            importlib.import_module(f"{__name__}.{module}")
        except Exception as error:
            with contextlib.suppress(Exception):  # warnings may be errors
                warnings.warn(
                    f"Saved models that need `tfmixed.{module}` cannot be loaded, because tfmixed {__version__} does "
                    f"not work with this version of Keras. Received: {type(error).__name__}: {error}",
                    stacklevel=3,
                )


if sys.modules.get("keras"):
    _register()
else:
    sys.meta_path.insert(0, _AfterKeras)
