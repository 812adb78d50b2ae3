"""Precision settings of a training run in a TOML file.

policy = "mixed_float16"        # as in set_policy; defaults to "auto"
weights = "stochastic"          # with states = "int8" or others, as in LowPrecisionOptimizer; by default not used

[scaling]                       # without this table the loss is not scaled
rule = "dynamic"                # "dynamic", "constant" or "logmax", with the parameters of that rule
growth_interval = 1000          # or: like = "torch", with the parameters of that library

[log]                           # arguments of LossScaleLogger
every = 100

Loading a file imports no framework: `tfmixed run` reads it before the script has selected its backend.
"""

from __future__ import annotations

import difflib
import functools
import operator
import os
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import tomli_w

from tfmixed import hardware, scaling
from tfmixed._utils import atomic_write
from tfmixed.errors import ConfigError
from tfmixed.formats import STATES, WEIGHTS
from tfmixed.scaling import PEERS, RULES, ScalingRule

if TYPE_CHECKING:
    import keras

_POLICIES = ["auto", "float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"]
_NONE = "none"  # None in a file: TOML has no null


@dataclass(frozen=True)
class LogConfig:
    """Settings of the log of a run.

    Args:
        every: As in `LossScaleLogger`. Defaults to None, which collects at the end of each epoch only.
        verbose: As in `LossScaleLogger`. Defaults to 1.
        tensorboard: If True, TensorBoard scalars are written to the folder `tensorboard` of the run. Defaults to
            False.
    """

    every: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] | None = None
    verbose: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 1
    tensorboard: bool = False


@dataclass(frozen=True)
class Config:
    """The settings in a configuration file.

    Args:
        policy: Name of the dtype policy. Defaults to `"auto"`, the fastest policy for this hardware.
        scaling: The scaling rule. Defaults to None: the loss is not scaled.
        log: Settings of the log.
        weights: As in `LowPrecisionOptimizer`. Defaults to None: the optimizer is not wrapped in one.
        states: As in `LowPrecisionOptimizer`, if `weights` is given. Defaults to `"bfloat16"`.

    Raises:
        ConfigError: If an argument has another type, or the policy does not exist.

    Example:
    >>> Config("mixed_float16", scaling.DynamicScale()).optimizer("sgd").rule.initial_scale
    32768.0
    """

    policy: str = "auto"
    scaling: ScalingRule | None = None
    log: LogConfig = field(default_factory=LogConfig)
    weights: str | None = None
    states: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.policy != "auto" and not _is_policy(self.policy):
            nearest = _nearest(str(self.policy), _POLICIES)
            raise ConfigError(
                f'policy must be "auto" or the name of a dtype policy. Received: policy={self.policy!r}.{nearest}'
            )
        for key, known in (("weights", WEIGHTS), ("states", STATES)):
            value = getattr(self, key)
            if value not in (*known, *(() if key == "states" else (None,))):
                raise ConfigError(f"{key} must be one of {', '.join(known)}. Received: {key}={value!r}")
        if self.policy == "float16" and self.weights in ("stochastic", "split"):
            raise ConfigError(
                f"weights must be nearest under the policy float16. Choose the policy bfloat16 or mixed_float16. "
                f"Received: weights={self.weights!r}"
            )
        if not isinstance(self.log, LogConfig):
            raise ConfigError(f"log must be a LogConfig. Received: log={self.log!r}")
        if self.scaling is not None and type(self.scaling) not in RULES.values():
            raise ConfigError(f"scaling must be None or a rule of tfmixed.scaling. Received: scaling={self.scaling!r}")

    @property
    def _wraps(self) -> bool:
        name = hardware.describe().policy if self.policy == "auto" else self.policy
        return self.scaling is not None or name == "mixed_float16"

    @property
    def low_precision(self) -> dict[str, Any]:
        """Arguments of the `LowPrecisionOptimizer`, or none without `weights`."""
        return {} if self.weights is None else {"weights": self.weights, "states": self.states}

    def apply(self) -> keras.DTypePolicy:
        """Sets the global dtype policy, as `set_policy` does, and returns it."""
        from tfmixed.policy import set_policy

        return set_policy(self.policy)

    def optimizer(self, inner: keras.optimizers.Optimizer | str) -> keras.optimizers.Optimizer:
        """Returns `inner` in a `LowPrecisionOptimizer` if `weights` is given, and in a `LossScaleOptimizer` if scaled.

        Under `mixed_float16` without `scaling` it is wrapped with a constant scale of 1, since Keras would scale an
        optimizer that is not wrapped.
        """
        import keras

        from tfmixed.optimizer import LossScaleOptimizer, LowPrecisionOptimizer

        if self.weights is not None:
            inner = LowPrecisionOptimizer(inner, **self.low_precision)
        return LossScaleOptimizer(inner, self.scaling) if self._wraps else keras.optimizers.get(inner)

    def callbacks(self, run_dir: str | os.PathLike[str]) -> list[keras.callbacks.Callback]:
        """Returns the callbacks that log to `run_dir`. The list is empty if the optimizer is not wrapped."""
        from tfmixed.callbacks import LossScaleLogger

        if not self._wraps:
            return []
        run = Path(run_dir)
        tensorboard = run / "tensorboard" if self.log.tensorboard else None
        return [LossScaleLogger(run / "loss_scale.jsonl", tensorboard, self.log.every, self.log.verbose)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file from which `load_config` returns an equal `Config`. The write is atomic."""
        tables: dict[str, Any] = {"policy": self.policy, **self.low_precision}
        if self.scaling is not None:
            names = {rule: name for name, rule in RULES.items()}
            values = asdict(self.scaling)  # type: ignore[call-overload]  # every rule is a dataclass
            values = {key: _NONE if value is None else value for key, value in values.items()}
            tables["scaling"] = {"rule": names[type(self.scaling)], **values}
        tables["log"] = {key: value for key, value in asdict(self.log).items() if value is not None}
        atomic_write.write_text(path, tomli_w.dumps(tables))


class _Tables(msgspec.Struct):
    """The types of the values in a file."""

    policy: str = "auto"
    scaling: dict[str, Any] | None = None
    log: LogConfig = LogConfig()
    weights: str | None = None
    states: str = "bfloat16"


def load_config(path: str | os.PathLike[str]) -> Config:
    """Reads a configuration file.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has an unknown key, or if a value has the wrong type
            or is out of range. The message names the file, the key, and the nearest known key.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: The file cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, too many brackets
        raise ConfigError(f"{path}: The file is not valid TOML: {error}.") from error
    try:
        return _config(tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _config(tables: dict[str, Any]) -> Config:
    _check_keys("", tables, (entry.name for entry in fields(Config)))
    try:
        typed = msgspec.convert(tables, _Tables)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        key = place.rstrip("`")
        value = functools.reduce(operator.getitem, key.split("."), tables)
        raise ConfigError(f"Invalid value of '{key}'. {reason}. Received: {value!r}") from None
    _check_keys("log.", tables.get("log", {}), (entry.name for entry in fields(LogConfig)))
    if "states" in tables and typed.weights is None:
        raise ConfigError(f"'states' needs 'weights'. Received: states={typed.states!r}")
    rule = None if typed.scaling is None else _rule(typed.scaling)
    return Config(typed.policy, rule, typed.log, typed.weights, typed.states)


def _rule(table: dict[str, Any]) -> ScalingRule:
    if "rule" in table and "like" in table:
        raise ConfigError(
            f"Only one of 'scaling.rule' and 'scaling.like' may be set. Received: {table['rule']!r} and "
            f"{table['like']!r}"
        )
    kind = "like" if "like" in table else "rule"
    name, names = table.get(kind, "dynamic"), list(PEERS if kind == "like" else RULES)
    if name not in names:
        raise ConfigError(
            f"'scaling.{kind}' must be one of {', '.join(names)}. Received: {name!r}.{_nearest(str(name), names)}"
        )
    values = {key: None if value == _NONE else value for key, value in table.items() if key != kind}
    known = PEERS[name].defaults if kind == "like" else [entry.name for entry in fields(RULES[name])]
    _check_keys("scaling.", values, [kind, *known])
    if name == "constant" and "value" not in values:
        raise ConfigError("'scaling.value' is missing. A constant rule needs the scale.")
    try:
        return scaling.like(name, **values) if kind == "like" else RULES[name](**values)
    except ValueError as error:
        raise ConfigError(f"[scaling] {error}") from None


def _is_policy(name: Any) -> bool:
    if not isinstance(name, str) or name in _POLICIES:
        return isinstance(name, str)
    import keras

    try:
        return "float" in keras.dtype_policies.get(name).compute_dtype
    except ValueError:
        return False


def _check_keys(prefix: str, table: dict[str, Any], names: Iterable[str]) -> None:
    known = [prefix + name for name in names]
    for key in table:
        if prefix + key not in known:
            nearest = _nearest(prefix + key, known)
            raise ConfigError(f"Unknown key {prefix + key!r}.{nearest} Known keys: {', '.join(known)}.")


def _nearest(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
