"""Mixed-precision training for TensorFlow and Keras 3.

Importing this package loads neither TensorFlow nor Keras: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

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
    from tfmixed.probing import measure_gradients
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
    "measure_gradients": "probing",
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
    """Registers our classes as soon as Keras is imported, so that saved models load. Till then in `sys.meta_path`.

    wrapt's `when_imported` does the same, and takes five times as long to import as all the rest of this package.
    """

    looking = False

    @classmethod
    def find_spec(cls, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != "keras" or cls.looking:
            return None
        cls.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            cls.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_register(module: ModuleType) -> None:
                execute(module)
                if cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                _register()

            spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    for module in ("inplace", "layers", "losses", "optimizer"):
        importlib.import_module(f"{__name__}.{module}")


if "keras" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterKeras)
