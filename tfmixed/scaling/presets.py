"""The rules of other projects, expressed in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from tfmixed.formats import FLOAT32
from tfmixed.scaling import validation
from tfmixed.scaling.logmax import LogMaxScale
from tfmixed.scaling.rules import DynamicScale, ScalingRule


@dataclass(frozen=True)
class Peer:
    """One project: how its parameters become a rule, and what they are when absent."""

    rule: Callable[..., ScalingRule]
    defaults: dict[str, Any]


def like(peer: str, **params: Any) -> ScalingRule:
    """Returns the rule of another project, step for step.

    Args:
        peer: One of `scaling.PEERS`.
        **params: That project's parameters under this module's names; its own defaults fill the rest. Where one
            `factor` serves both ways in the peer, it does here.

    Raises:
        ValueError: No such peer, or a parameter that it does not have.

    Where a peer would reach 0 or inf, the rule stops at float32's smallest normal or at its last finite value.

    Example:
    >>> like("torch").initial_scale
    65536.0
    """
    if not isinstance(peer, str) or peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, received {peer!r}")
    defaults = PEERS[peer].defaults
    if not params.keys() <= defaults.keys():
        raise ValueError(f"params of {peer} must be among {', '.join(defaults)}, received {', '.join(params)}")
    return PEERS[peer].rule(**{**defaults, **params})


# Four kinds of arithmetic: torch multiplies its float32 scale by a float64 factor, DeepSpeed and fairseq compute in
# float64 alone; Megatron and flax multiply by a float32 factor; jmp, TensorFlow 1 and OpenSeq2Seq divide by one.


def _unbounded(**params: Any) -> DynamicScale:
    rule = {"min_scale": None, "max_scale": None, **params}
    no_floor = rule["min_scale"] == 0 and not isinstance(rule["min_scale"], bool)
    return DynamicScale(**{**rule, "min_scale": None if no_floor else rule["min_scale"]})


def _single(name: str, factor: float) -> float:
    return float(numpy.float32(validation.number(name, factor)))


def _unbounded_single(growth_factor: float, backoff_factor: float, **params: Any) -> DynamicScale:
    growth, backoff = _single("growth_factor", growth_factor), _single("backoff_factor", backoff_factor)
    return _unbounded(growth_factor=growth, backoff_factor=backoff, **params)


def _both_ways(factor: float, **params: Any) -> DynamicScale:
    return _unbounded(growth_factor=factor, backoff_factor=1 / validation.number("factor", factor, above=1.0), **params)


def _both_ways_single(factor: float, **params: Any) -> DynamicScale:
    return _both_ways(_single("factor", factor), **params)


def _flax(growth_interval: int, **params: Any) -> DynamicScale:
    # It grows at the first finite step after `growth_interval` others, and saturates at float32's maximum.
    interval = validation.count("growth_interval", growth_interval, 1)
    return _unbounded_single(growth_interval=interval + 1, max_scale=FLOAT32.max, **params)


def _deepspeed(consecutive_hysteresis: bool, **params: Any) -> DynamicScale:
    # The first growth, at the start and after an overflow, comes one step later than the next ones.
    if not isinstance(consecutive_hysteresis, bool):
        raise ValueError(f"consecutive_hysteresis must be True or False, received {consecutive_hysteresis!r}")
    return _both_ways(refill="finite" if consecutive_hysteresis else "growth", growth_delay=1, **params)


def _fairseq(threshold: float | None, min_scale: float, **params: Any) -> DynamicScale:
    # It raises where the scale would reach `min_scale`; a rule cannot raise, so its scale stops there.
    floor = validation.scale("min_scale", min_scale)
    if threshold is not None:
        floor = max(floor, validation.scale("threshold", threshold))
    return _both_ways(min_scale=floor, **params)


def _apex(initial_scale: float, max_scale: float, **params: Any) -> DynamicScale:
    ceiling = validation.scale("max_scale", max_scale)
    return _unbounded(
        initial_scale=min(validation.scale("initial_scale", initial_scale), ceiling), max_scale=ceiling, **params
    )


def _tf1(**params: Any) -> DynamicScale:
    return _both_ways_single(min_scale=1.0, **params)


def _openseq2seq_backoff(scale_min: float, scale_max: float, **params: Any) -> DynamicScale:
    return _both_ways_single(initial_scale=scale_max, min_scale=scale_min, max_scale=scale_max, **params)


def _openseq2seq_logmax(
    scale_min: float, scale_max: float, overflow_std_dev: float, log_max: float, **params: Any
) -> LogMaxScale:
    # For an overflow it feeds 2**log_max where log_max was meant; and it aims at 2**16 whatever log_max is.
    return LogMaxScale(
        initial_scale=scale_min,
        min_scale=scale_min,
        max_scale=scale_max,
        std_devs=overflow_std_dev,
        overflow_log2=2.0 ** validation.number("log_max", log_max, most=32.0),
        **params,
    )


_TORCH = {"initial_scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}

PEERS: dict[str, Peer] = {
    "torch": Peer(_unbounded, _TORCH),
    "flax": Peer(_flax, {**_TORCH, "min_scale": FLOAT32.smallest_normal}),
    "jmp": Peer(
        _both_ways_single, {"initial_scale": 2.0**15, "factor": 2.0, "growth_interval": 2000, "min_scale": 1.0}
    ),
    "deepspeed": Peer(
        _deepspeed,
        {
            "initial_scale": 2.0**32,
            "factor": 2.0,
            "growth_interval": 1000,
            "min_scale": 1.0,
            "hysteresis": 1,
            "consecutive_hysteresis": False,
        },
    ),
    "megatron": Peer(
        _unbounded_single,
        {**_TORCH, "initial_scale": 2.0**32, "growth_interval": 1000, "hysteresis": 2, "min_scale": 1.0},
    ),
    "fairseq": Peer(
        _fairseq,
        {
            "initial_scale": 2.0**15,
            "factor": 2.0,
            "growth_interval": 2000,
            "tolerance": 0.0,
            "threshold": None,
            "min_scale": 1e-4,
        },
    ),
    "apex": Peer(_apex, {"initial_scale": 2.0**16, "growth_interval": 2000, "min_scale": None, "max_scale": 2.0**24}),
    "keras": Peer(_unbounded, {"initial_scale": 2.0**15, "growth_interval": 2000}),
    "tf1": Peer(_tf1, {"initial_scale": 2.0**15, "factor": 2.0, "growth_interval": 2000}),
    "openseq2seq_backoff": Peer(
        _openseq2seq_backoff, {"factor": 2.0, "growth_interval": 2000, "scale_min": 1.0, "scale_max": 2.0**14}
    ),
    "openseq2seq_logmax": Peer(
        _openseq2seq_logmax,
        {
            "beta1": 0.99,
            "beta2": 0.999,
            "overflow_std_dev": 3.09,
            "log_max": 16.0,
            "scale_min": 1.0,
            "scale_max": 2.0**14,
        },
    ),
}
