"""Rules by name: `get` for the rules of tfmixed, `like` for those of other projects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy

from tfmixed.formats import FLOAT32
from tfmixed.scaling import validation
from tfmixed.scaling.base import ScalingRule
from tfmixed.scaling.constant import ConstantScale
from tfmixed.scaling.dynamic import DynamicScale
from tfmixed.scaling.logmax import LogMaxScale

# Names of the rules in configuration files and commands.
RULES: dict[str, type[Any]] = {"dynamic": DynamicScale, "constant": ConstantScale, "logmax": LogMaxScale}


def get(scale: Any) -> ScalingRule:
    """Returns the rule that `scale` denotes.

    Args:
        scale: `"dynamic"` (a `DynamicScale` with default arguments), a number (a `ConstantScale`), `None` (a constant
            scale of 1, which still skips non-finite steps), a rule, or the result of a rule's `get_config`.

    Raises:
        ValueError: If `scale` is not one of these.

    Example:
    >>> get(128).value
    128.0
    """
    if isinstance(scale, ScalingRule):
        return scale
    if isinstance(scale, dict):
        return ScalingRule.from_config(scale)
    if scale is None:
        return ConstantScale(1.0)
    if isinstance(scale, str) and scale == "dynamic":
        return DynamicScale()
    if isinstance(scale, Real) and not isinstance(scale, bool):
        return ConstantScale(scale)  # type: ignore[arg-type]  # any real number; the rule checks its range
    raise ValueError(
        f'`scale` must be "dynamic", a positive number, a scaling rule or `None`. Received: scale={scale!r}'
    )


def like(peer: str, **params: Any) -> ScalingRule:
    """Returns the scaling rule of another project, which makes the same decisions step by step.

    Where that project would reach 0 or infinity, the rule stops at float32's smallest normal number or at its last
    finite value.

    Args:
        peer: A key of `scaling.PEERS`.
        **params: Parameters of that project under the names of `DynamicScale` or `LogMaxScale`. `factor` is a growth
            factor whose inverse is the backoff factor. Defaults are those of the project.

    Raises:
        ValueError: If `peer` is unknown, does not have a parameter, or a parameter is out of range.

    Example:
    >>> like("torch").initial_scale
    65536.0
    """
    if not isinstance(peer, str) or peer not in PEERS:
        raise ValueError(f"`peer` must be one of {', '.join(PEERS)}. Received: peer={peer!r}")
    if unknown := params.keys() - PEERS[peer].defaults.keys():
        names = ", ".join(PEERS[peer].defaults)
        raise ValueError(f"Parameters of {peer} must be among {names}. Received: {', '.join(sorted(unknown))}")
    return PEERS[peer].rule(**{**PEERS[peer].defaults, **params})


@dataclass(frozen=True)
class Peer:
    """The scaling rule of another project, and the project's parameters with their default values."""

    rule: Callable[..., ScalingRule]
    defaults: dict[str, Any]


# The arithmetic of the projects: PyTorch multiplies a float32 scale by a float64 factor, DeepSpeed and fairseq compute
# in float64, Megatron and flax multiply by a float32 factor, and jmp, TensorFlow 1 and OpenSeq2Seq divide by one.


def _unbounded(min_scale: Any = None, **params: Any) -> DynamicScale:
    floor = None if min_scale == 0 and not isinstance(min_scale, bool) else min_scale
    return DynamicScale(**{"min_scale": floor, "max_scale": None, **params})


def _single(name: str, factor: float) -> float:
    return float(numpy.float32(validation.number(name, factor)))


def _unbounded_single(growth_factor: float, backoff_factor: float, **params: Any) -> DynamicScale:
    growth, backoff = _single("growth_factor", growth_factor), _single("backoff_factor", backoff_factor)
    return _unbounded(growth_factor=growth, backoff_factor=backoff, **params)


def _symmetric(factor: float, **params: Any) -> DynamicScale:
    return _unbounded(growth_factor=factor, backoff_factor=1 / validation.number("factor", factor, above=1.0), **params)


def _symmetric_single(factor: float, **params: Any) -> DynamicScale:
    return _symmetric(_single("factor", factor), **params)


def _flax(growth_interval: int, **params: Any) -> DynamicScale:
    # Grows at the first finite step after `growth_interval` others, and saturates at float32's maximum.
    interval = validation.count("growth_interval", growth_interval, 1)
    return _unbounded_single(growth_interval=interval + 1, max_scale=FLOAT32.max, **params)


def _deepspeed(consecutive_hysteresis: bool, **params: Any) -> DynamicScale:
    # The first growth, at the start and after an overflow, comes one step later than the following ones.
    refill = "finite" if validation.boolean("consecutive_hysteresis", consecutive_hysteresis) else "growth"
    return _symmetric(refill=refill, growth_delay=1, **params)


def _fairseq(threshold: float | None, min_scale: float, **params: Any) -> DynamicScale:
    # Fairseq raises an error where the scale would reach `min_scale`. A rule cannot, so its scale stops there.
    floor = validation.scale("min_scale", min_scale)
    if threshold is not None:
        floor = max(floor, validation.scale("threshold", threshold))
    return _symmetric(min_scale=floor, **params)


def _apex(initial_scale: float, max_scale: float, **params: Any) -> DynamicScale:
    ceiling = validation.scale("max_scale", max_scale)
    first = min(validation.scale("initial_scale", initial_scale), ceiling)
    return _unbounded(initial_scale=first, max_scale=ceiling, **params)


def _openseq2seq_backoff(scale_min: float, scale_max: float, **params: Any) -> DynamicScale:
    return _symmetric_single(initial_scale=scale_max, min_scale=scale_min, max_scale=scale_max, **params)


def _openseq2seq_logmax(
    scale_min: float, scale_max: float, overflow_std_dev: float, log_max: float, **params: Any
) -> LogMaxScale:
    # For an overflow it uses 2**log_max in place of log_max, and it aims at 2**16 whatever log_max is.
    overflow_log2 = 2.0 ** validation.number("log_max", log_max, most=32.0)
    bounds = {"initial_scale": scale_min, "min_scale": scale_min, "max_scale": scale_max}
    return LogMaxScale(std_devs=overflow_std_dev, overflow_log2=overflow_log2, **bounds, **params)


_TORCH = {"initial_scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
_TF1 = {"initial_scale": 2.0**15, "factor": 2.0, "growth_interval": 2000}
_LARGE = {"initial_scale": 2.0**32, "growth_interval": 1000, "min_scale": 1.0}
_OPENSEQ2SEQ = {"scale_min": 1.0, "scale_max": 2.0**14}
_LOGMAX = {"beta1": 0.99, "beta2": 0.999, "overflow_std_dev": 3.09, "log_max": 16.0}

PEERS: dict[str, Peer] = {
    "torch": Peer(_unbounded, _TORCH),
    "flax": Peer(_flax, {**_TORCH, "min_scale": FLOAT32.smallest_normal}),
    "jmp": Peer(_symmetric_single, {**_TF1, "min_scale": 1.0}),
    "deepspeed": Peer(_deepspeed, {"factor": 2.0, **_LARGE, "hysteresis": 1, "consecutive_hysteresis": False}),
    "megatron": Peer(_unbounded_single, {**_TORCH, **_LARGE, "hysteresis": 2}),
    "fairseq": Peer(_fairseq, {**_TF1, "tolerance": 0.0, "threshold": None, "min_scale": 1e-4}),
    "apex": Peer(_apex, {"initial_scale": 2.0**16, "growth_interval": 2000, "min_scale": None, "max_scale": 2.0**24}),
    "keras": Peer(_unbounded, {"initial_scale": 2.0**15, "growth_interval": 2000}),
    "tf1": Peer(lambda **params: _symmetric_single(min_scale=1.0, **params), _TF1),
    "openseq2seq_backoff": Peer(_openseq2seq_backoff, {"factor": 2.0, "growth_interval": 2000, **_OPENSEQ2SEQ}),
    "openseq2seq_logmax": Peer(_openseq2seq_logmax, {**_LOGMAX, **_OPENSEQ2SEQ}),
}
