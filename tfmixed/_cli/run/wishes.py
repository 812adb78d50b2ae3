"""What the command line of `tfmixed run` asks for.

NumPy is loaded early only where a rule is named: a script may set the number of its threads before it loads it itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tfmixed.errors import UsageError

if TYPE_CHECKING:
    from tfmixed.config import Config, LogConfig
    from tfmixed.scaling import ScalingRule

HALF = ("float16", "bfloat16")
_POLICIES = ("auto", "float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Wish:
    """What is to be applied.

    Args:
        log_dir: The folder for logs and reports.
        policy: As in `set_policy`.
        source: Where the policy is asked for, in words.
        scale: The rule under any policy; None leaves it to the policy.
        islands: Whether models get float32 islands.
        resumes: Whether a run that was restored goes on in a log that the folder holds.
        config: The file's content, if there is one.
        promote: Whether scripts and custom layers see float32, as in `set_policy`.
    """

    log_dir: Path
    policy: str = "auto"
    source: str = "auto"
    scale: ScalingRule | None = None
    islands: bool = True
    resumes: bool = False
    config: Config | None = None
    promote: bool = True

    def rule(self, compute_dtype: str) -> ScalingRule | None:
        """Returns the rule for what computes in this dtype; None where nothing is to be scaled."""
        return self.scale or (self._under_float16 if compute_dtype == "float16" else None)

    @cached_property
    def _under_float16(self) -> ScalingRule:
        from tfmixed.scaling import ConstantScale, DynamicScale

        # A file that asks for float16 and no rule asks for float16 without scaling: as in `Config.optimizer`.
        unscaled = self.config is not None and self.policy.removeprefix("mixed_") == "float16"
        return ConstantScale(1.0) if unscaled else DynamicScale()

    @property
    def log(self) -> LogConfig:
        """How to log."""
        from tfmixed.config import LogConfig

        return self.config.log if self.config else LogConfig()

    def in_words(self, compute_dtype: str) -> str:
        """Returns what is applied beside the policy."""
        rule = self.rule(compute_dtype)
        parts = [f"loss scale {rule_in_words(rule)}" if rule else "no loss scale"]
        if compute_dtype in HALF:
            parts.append(f"float32 islands {'on' if self.islands else 'off'}")
        if rule:
            parts.append(f"log in {self.log_dir}{os.sep}")
        return ", ".join(parts)


def of_options(
    log_dir: Path, config: Path | None, policy: str | None, scale: str | None, islands: bool, resumes: bool
) -> Wish:
    """Returns what the options ask for.

    Args:
        log_dir: As in `Wish`.
        config: A file, which excludes `policy` and `scale`.
        policy: None: `"auto"`.
        scale: As `tfmixed simulate` takes rules, or `"none"`. None: dynamic under float16, none elsewhere.
        islands: As in `Wish`.
        resumes: As in `Wish`.

    Raises:
        UsageError: The options exclude each other, or one is out of range.
        ConfigError: The file cannot be used.
    """
    if config is None:
        name = _policy(policy or "auto")
        source = "auto" if name == "auto" else "--policy"
        return Wish(log_dir, name, source, _rule(scale), islands, resumes)
    given = [f"--{name}" for name, value in (("policy", policy), ("scale", scale)) if value is not None]
    if given:
        raise UsageError(f"--config and {' and '.join(given)} exclude each other: the file says both. Give one of them")
    from tfmixed.config import load_config

    read = load_config(config)
    return Wish(log_dir, read.policy, str(config), read.scaling, islands, resumes, read)


def rule_in_words(rule: ScalingRule) -> str:
    """Returns a rule as one or two words."""
    low, high = rule.bounds
    if low == high:
        return "none" if low == 1 else f"constant {low:g}"
    return type(rule).__name__.removesuffix("Scale").lower()


def _policy(name: str) -> str:
    if name not in _POLICIES:
        raise UsageError(f"--policy must be one of {', '.join(_POLICIES)}, received {name!r}")
    return name


def _rule(text: str | None) -> ScalingRule | None:
    if text is None:
        return None
    from tfmixed.scaling import get
    from tfmixed.scaling.replay import parse

    try:
        return get(None) if text == "none" else parse(text)
    except ValueError as error:
        raise UsageError(f"--scale: {error}") from error
