"""Mixed-precision training for TensorFlow and Keras 3.

Importing this package loads neither TensorFlow nor Keras. Public names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfmixed._utils.keras_registration import import_with_keras

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
        fidelity,
        formats,
        grad_scaler,
        hardware,
        islands,
        layers,
        losses,
        memory,
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
    from tfmixed.fidelity.measure import gradient_fidelity
    from tfmixed.grad_scaler import GradScaler
    from tfmixed.islands import force_float32
    from tfmixed.optimizer import LossScaleOptimizer, LowPrecisionOptimizer
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
    "LowPrecisionOptimizer": "optimizer",
    "audit": "auditing",
    "force_float32": "islands",
    "gradient_fidelity": "fidelity.measure",
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
    "LowPrecisionOptimizer",
    "__version__",
    "audit",
    "auditing",
    "callbacks",
    "compat",
    "config",
    "distribute",
    "doctor",
    "errors",
    "fidelity",
    "force_float32",
    "formats",
    "grad_scaler",
    "gradient_fidelity",
    "hardware",
    "islands",
    "layers",
    "load_config",
    "losses",
    "measure_gradients",
    "memory",
    "optimizer",
    "plotting",
    "policy",
    "policy_scope",
    "ranges",
    "records",
    "scaling",
    "set_policy",
]

# The extras that install optional packages.
_EXTRAS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch", "matplotlib": "plot"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        message = f"tfmixed.{name} needs {missing}: pip install 'tfmixed[{_EXTRAS[missing]}]'"
        raise ModuleNotFoundError(message, name=missing) from error
    return getattr(home, name) if name in _HOMES else home


def __dir__() -> list[str]:
    return __all__


# The modules whose classes saved models may contain.
import_with_keras([f"{__name__}.{module}" for module in ("_islands.layer_rewrite", "layers", "losses", "optimizer")])
