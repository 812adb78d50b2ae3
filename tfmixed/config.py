"""A training run's precision in a TOML file.

policy = "mixed_float16"        # as in set_policy; "auto" if absent

[scaling]                       # absent: no loss scaling
rule = "dynamic"                # "dynamic", "constant" or "logmax", with that rule's own parameters
growth_interval = 1000          # or: like = "torch", with that peer's

[log]                           # of LossScaleLogger
every = 100

Reading one loads no framework: `tfmixed run` does it before the script has chosen its backend.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from tfmixed import hardware, scaling
from tfmixed._utils import atomic_write
from tfmixed.errors import ConfigError
from tfmixed.scaling import RULES, ScalingRule, validation

if TYPE_CHECKING:
    import keras

_POLICIES = ["auto", "float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"]
_NONE = "none"  # TOML has no null


@dataclass(frozen=True)
class LogConfig:
    """How the run is logged.

    Args:
        every: As in `LossScaleLogger`; None collects at the end of an epoch only.
        verbose: As in `LossScaleLogger`.
        tensorboard: Write TensorBoard scalars into the run's folder `tensorboard`.
    """

    every: int | None = None
    verbose: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.every is not None:
            validation.count("every", self.every, 1)
        validation.count("verbose", self.verbose, 0)
        if not isinstance(self.tensorboard, bool):
            raise ValueError(f"tensorboard must be true or false, received {self.tensorboard!r}")


@dataclass(frozen=True)
class Config:
    """What a configuration file says.

    Args:
        policy: Name of the dtype policy, or `"auto"`.
        scaling: The rule, or None for no loss scaling.
        log: How the run is logged.

    Raises:
        ConfigError: A value is of another kind.

    Example:
    >>> Config("mixed_float16", scaling.DynamicScale()).optimizer("sgd").rule.initial_scale
    32768.0
    """

    policy: str = "auto"
    scaling: ScalingRule | None = None
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.policy != "auto" and not _is_policy(self.policy):
            nearest = _nearest(self.policy, _POLICIES) if isinstance(self.policy, str) else ""
            raise ConfigError(f'policy must be "auto" or the name of a dtype policy, received {self.policy!r}{nearest}')
        if not isinstance(self.log, LogConfig):
            raise ConfigError(f"log must be a LogConfig, received {self.log!r}")
        if self.scaling is not None and type(self.scaling) not in RULES.values():
            raise ConfigError(f"scaling must be None or a rule of tfmixed, received {self.scaling!r}")

    @property
    def _wraps(self) -> bool:
        name = hardware.describe().policy if self.policy == "auto" else self.policy
        return self.scaling is not None or name == "mixed_float16"

    def apply(self) -> keras.DTypePolicy:
        """Sets the global policy, as `set_policy` does, and returns it."""
        from tfmixed.policy import set_policy

        return set_policy(self.policy)

    def optimizer(self, inner: keras.optimizers.Optimizer | str) -> keras.optimizers.Optimizer:
        """Returns `inner` wrapped into a `LossScaleOptimizer`, or as it is where nothing is to be scaled.

        Without `scaling`, `mixed_float16` wraps it too, with a scale of 1: Keras would scale a bare optimizer there.
        """
        import keras

        from tfmixed._core.loss_scale_optimizer import LossScaleOptimizer

        return LossScaleOptimizer(inner, self.scaling) if self._wraps else keras.optimizers.get(inner)

    def callbacks(self, run_dir: str | os.PathLike[str]) -> list[keras.callbacks.Callback]:
        """Returns the callbacks that log into `run_dir`; none where the optimizer is not wrapped."""
        from tfmixed.callbacks import LossScaleLogger

        if not self._wraps:
            return []
        run = Path(run_dir)
        tensorboard = run / "tensorboard" if self.log.tensorboard else None
        return [LossScaleLogger(run / "loss_scale.jsonl", tensorboard, self.log.every, self.log.verbose)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load_config` turns into an equal Config. It appears whole or not at all."""
        tables: dict[str, Any] = {"policy": self.policy}
        if self.scaling is not None:
            names = {kind: name for name, kind in RULES.items()}
            values = asdict(self.scaling)  # type: ignore[call-overload]  # every rule is a dataclass
            tables["scaling"] = {"rule": names[type(self.scaling)], **_without_null(values, _NONE)}
        tables["log"] = _without_null(asdict(self.log), None)
        atomic_write.write_text(path, tomli_w.dumps(tables))


def load_config(path: str | os.PathLike[str]) -> Config:
    """Reads a configuration file.

    Raises:
        ConfigError: The file is missing or no TOML, a key is unknown, or a value is of the wrong type or out of range.
            The message names the file, the key, and the nearest key that exists.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError; thousands of brackets
        raise ConfigError(f"{path}: is no TOML file: {error}") from error
    try:
        return _config(tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _config(tables: dict[str, Any]) -> Config:
    _check_keys("", tables, (entry.name for entry in fields(Config)))
    scale = _rule(_table("scaling", tables)) if "scaling" in tables else None
    return Config(tables.get("policy", "auto"), scale, _log(_table("log", tables)))


def _is_policy(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    if name in _POLICIES:
        return True
    import keras

    try:
        return "float" in keras.dtype_policies.get(name).compute_dtype
    except ValueError:
        return False


def _rule(table: dict[str, Any]) -> ScalingRule:
    values = {key: None if value == _NONE else value for key, value in table.items() if key not in ("rule", "like")}
    kind, names = ("like", scaling.PEERS) if "like" in table else ("rule", RULES)
    name = _choice(f"scaling.{kind}", table.get(kind, "dynamic"), names)
    known = scaling.PEERS[name].defaults if kind == "like" else [entry.name for entry in fields(RULES[name])]
    if "rule" in table and "like" in table:
        raise ConfigError(f"scaling.rule and scaling.like exclude each other, received {table['rule']!r} and {name!r}")
    _check_keys("scaling.", values, [kind, *known])
    if name == "constant" and "value" not in values:
        raise ConfigError('scaling.value is missing: rule = "constant" needs the scale')
    try:
        return scaling.like(name, **values) if kind == "like" else RULES[name](**values)
    except ValueError as error:
        raise ConfigError(f"scaling.{error}") from None


def _log(table: dict[str, Any]) -> LogConfig:
    _check_keys("log.", table, (entry.name for entry in fields(LogConfig)))
    try:
        return LogConfig(**table)
    except ValueError as error:
        raise ConfigError(f"log.{error}") from None


def _table(key: str, tables: dict[str, Any]) -> dict[str, Any]:
    table = tables.get(key, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{key} must be a table [{key}], received {table!r}")
    return table


def _choice(key: str, value: Any, names: Iterable[str]) -> str:
    if value not in (known := list(names)):
        raise ConfigError(f"{key} must be one of {', '.join(known)}, received {value!r}{_nearest(str(value), known)}")
    return str(value)


def _check_keys(prefix: str, table: dict[str, Any], names: Iterable[str]) -> None:
    known = list(names)
    for key in table:
        if key not in known:
            raise ConfigError(f"{prefix}{key} is no known key{_nearest(key, known)} (known: {', '.join(known)})")


def _nearest(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _without_null(table: dict[str, Any], stand_in: str | None) -> dict[str, Any]:
    filled = {key: stand_in if value is None else value for key, value in table.items()}
    return {key: value for key, value in filled.items() if value is not None}
