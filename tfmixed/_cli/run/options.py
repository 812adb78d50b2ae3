"""Options of `tfmixed run`, checked, and passed on to the script's process in the environment.

NumPy is imported only to read a scaling rule: a script may set the number of NumPy's threads before it imports NumPy.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfmixed._utils import atomic_write
from tfmixed.errors import UsageError

if TYPE_CHECKING:
    from tfmixed.config import Config, LogConfig
    from tfmixed.scaling import ScalingRule

HALF = ("float16", "bfloat16")  # not from `tfmixed.formats`, which imports NumPy
VARIABLE = "TFMIXED_RUN"  # environment variable that holds the options as JSON
_POLICIES = ("auto", "float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class RunOptions:
    """Options as given on the command line.

    Args:
        folder: Folder of logs and reports.
        is_continued: Whether a restored run continues a log in `folder`. True if `--log-dir` is given.
        config: TOML file that gives policy, scale and logging, or None.
        policy: Dtype policy, or None.
        scale: Scaling rule as `tfmixed simulate` takes it, `"none"`, or None.
        weights: Rounding of half-precision weights, as in `LowPrecisionOptimizer`, or None for the script's optimizer.
        states: Form of optimizer states with `weights`, or None for the default.
        islands: Whether models get float32 islands.
        promote: Whether scripts and custom layers get float32, as in `set_policy`.
        float32_sums: Whether gradients are summed in float32, as in `set_policy`.
        tf1: Whether the script uses TensorFlow 1.
    """

    folder: str
    is_continued: bool = False
    config: str | None = None
    policy: str | None = None
    scale: str | None = None
    weights: str | None = None
    states: str | None = None
    islands: bool = True
    promote: bool = True
    float32_sums: bool = True
    tf1: bool = False

    def to_json(self) -> str:
        """Returns the options as JSON."""
        return json.dumps(dataclasses.asdict(self))

    def check(self) -> None:
        """Checks the options before the script starts.

        Raises:
            UsageError: If options exclude each other, a value is out of range, or the folder cannot be written.
            ConfigError: If the config file cannot be used.
        """
        if self.policy is not None and self.policy not in _POLICIES:
            raise UsageError(f"--policy must be one of {', '.join(_POLICIES)}. Received: {self.policy!r}.")
        if self.tf1:
            self._check_tf1()
        given = {"--policy": self.policy, "--scale": self.scale, "--weights": self.weights, "--states": self.states}
        if self.config is not None and (wrong := [option for option, value in given.items() if value is not None]):
            raise UsageError(f"--config excludes {wrong[0]}. Set it in the config file.")
        if self.states is not None and self.weights is None:
            raise UsageError(f"--states needs --weights. Received: --states {self.states}.")
        _ = self.loaded_config, self.rule, self.low_precision
        if self.is_continued:
            try:
                atomic_write.prepare(Path(self.folder, "loss_scale.jsonl"))
            except OSError as error:
                raise UsageError(f"--log-dir must be a writable folder. Received: {self.folder!r} ({error}).") from None

    def _check_tf1(self) -> None:
        given = {
            "--config": self.config is not None,
            "--weights": self.weights is not None,
            "--no-islands": not self.islands,
            "--no-promote": not self.promote,
            "--no-float32-sums": not self.float32_sums,
            "--log-dir": self.is_continued,
        }
        if wrong := [option for option, is_given in given.items() if is_given]:
            raise UsageError(f"--tf1 excludes {wrong[0]}, which applies to Keras models only.")
        if self.policy == "float64":
            raise UsageError("--policy must not be float64 with --tf1: the graph rewrite converts to half precision.")
        if self.scale not in (None, "dynamic"):
            raise UsageError(
                "--scale must be dynamic with --tf1. For another scale, call enable_mixed_precision_graph_rewrite(opt, "
                f"loss_scale) in the script. Received: {self.scale!r}."
            )

    @cached_property
    def loaded_config(self) -> Config | None:
        """Content of the config file, or None."""
        if self.config is None:
            return None
        from tfmixed.config import load_config

        return load_config(Path(self.config))

    @property
    def log(self) -> LogConfig:
        """Logging settings."""
        from tfmixed.config import LogConfig

        return self.loaded_config.log if self.loaded_config else LogConfig()

    @property
    def requested_policy(self) -> str:
        """Name of the requested dtype policy. Defaults to `"auto"`."""
        if self.loaded_config:
            return self.loaded_config.policy
        return self.policy or ("auto" if self.weights is None else "bfloat16")

    @property
    def low_precision(self) -> dict[str, Any]:
        """Arguments of the `LowPrecisionOptimizer` that models get, or none if they keep the script's optimizer."""
        if self.loaded_config:
            return self.loaded_config.low_precision
        if self.weights is None:
            return {}
        from tfmixed.config import Config

        return Config(self.policy or "bfloat16", weights=self.weights, states=self.states or "bfloat16").low_precision

    @property
    def policy_source(self) -> str:
        """Origin of the requested policy, in words."""
        default = "auto" if self.weights is None else "--weights"
        return self.config or (default if self.policy in (None, "auto") else "--policy")

    @cached_property
    def rule(self) -> ScalingRule | None:
        """Scaling rule that applies under every policy, or None if the policy decides.

        Raises:
            UsageError: If `--scale` is not a rule.
        """
        if self.loaded_config:
            return self.loaded_config.scaling
        if self.scale is None:
            return None
        from tfmixed.scaling import get
        from tfmixed.scaling.replay import parse

        try:
            return get(None) if self.scale == "none" else parse(self.scale)
        except ValueError as error:
            raise UsageError(f"--scale: {error}") from error

    def rule_for(self, compute_dtype: str) -> ScalingRule | None:
        """Returns the scaling rule for models that compute in a dtype, or None if nothing is scaled."""
        return self.rule or (self._float16_rule if compute_dtype == "float16" else None)

    @cached_property
    def _float16_rule(self) -> ScalingRule:
        from tfmixed.scaling import ConstantScale, DynamicScale

        # A config file that gives float16 without a rule means float16 without scaling, as in `Config.optimizer`.
        is_unscaled = self.loaded_config and self.requested_policy.removeprefix("mixed_") == "float16"
        return ConstantScale(1.0) if is_unscaled else DynamicScale()

    def describe(self, compute_dtype: str) -> str:
        """Returns what is applied under a policy, in words."""
        rule = self.rule_for(compute_dtype)
        parts = [f"loss scale {_describe_rule(rule)}" if rule else "no loss scale"]
        parts += [f"{key} {value}" for key, value in self.low_precision.items()]
        if compute_dtype in HALF:
            parts.append(f"float32 islands {'on' if self.islands else 'off'}")
        if rule:
            parts.append(f"log in {os.path.join(self.folder, '')}")
        return ", ".join(parts)


def _describe_rule(rule: ScalingRule) -> str:
    low, high = rule.bounds
    if low == high:
        return "none" if low == 1 else f"constant {low:g}"
    return type(rule).__name__.removesuffix("Scale").lower()
