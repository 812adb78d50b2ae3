"""Loss-scaling rules as values: pure state transitions with no framework in them.

A rule says how the loss scale moves from one training step to the next:

    state = rule.start()
    state = rule.next(state, finite)  # once a step; state.scale multiplies the next loss

`next` selects and never branches on a tensor, so one body serves numpy, TensorFlow (eager, `tf.function` and
TF1 graphs) and `keras.ops`: what `simulate` says is what training does. A `DynamicScale` takes the same steps to the
last bit in all of them (on JAX, factors that float32 cannot hold differ in the last digits), a `LogMaxScale` up to the
rounding of each framework's logarithm and exponential.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy

from tfmixed.records.scale_history import ScaleHistory
from tfmixed.scaling.logmax import LogMaxScale, LogMaxState
from tfmixed.scaling.presets import PEERS, like
from tfmixed.scaling.rules import ConstantScale, ConstantState, DynamicScale, DynamicState, ScalingRule

__all__ = [
    "PEERS",
    "RULES",
    "ConstantScale",
    "ConstantState",
    "DynamicScale",
    "DynamicState",
    "LogMaxScale",
    "LogMaxState",
    "ScaleHistory",
    "ScalingRule",
    "get",
    "like",
    "simulate",
]


# What files and commands call them.
RULES: dict[str, type[Any]] = {"dynamic": DynamicScale, "constant": ConstantScale, "logmax": LogMaxScale}


def get(scale: Any) -> ScalingRule:
    """Returns the rule that `scale` stands for.

    Args:
        scale: `"dynamic"` (a default `DynamicScale`), a number (constant), None (constant 1.0: no scaling, but
            non-finite steps are skipped), a rule, or what a rule's `get_config` returned.

    Raises:
        ValueError: It is none of these.

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
    raise ValueError(f'scale must be "dynamic", a number above 0, a scaling rule or None, received {scale!r}')


def simulate(rule: Any, trace: Iterable[Any] | None, amax: Sequence[float] | None = None) -> list[float]:
    """Returns the scale after each step of a recorded trace.

    Args:
        rule: Any rule, or what `get` turns into one.
        trace: One `T` (all gradients finite) or `F` (overflow) a step, as a string or as booleans. None takes it
            from `amax`: a step is finite where its `amax` is.
        amax: The largest absolute unscaled gradient of each step, for rules that need it.

    Raises:
        ValueError: Another letter, `amax` of another length, or neither of the two.

    Example:
    >>> simulate(DynamicScale(initial_scale=4.0), "FFT")
    [2.0, 1.0, 1.0]
    """
    rule = get(rule)
    if trace is None:
        if amax is None:
            raise ValueError("trace or amax must be given, received None for both")
        trace = [bool(numpy.isfinite(value)) for value in amax]
    flags = [_flag(letter) for letter in trace]
    sizes: Sequence[float | None] = [None] * len(flags) if amax is None else list(amax)
    if len(sizes) != len(flags):
        raise ValueError(f"amax must have one value a step, received {len(sizes)} for {len(flags)} steps")
    state, scales = rule.start(), []
    for finite, size in zip(flags, sizes, strict=True):
        with numpy.errstate(over="ignore"):  # beyond float32 it is inf, an overflow
            largest = None if size is None else numpy.float32(size)
        state = rule.next(state, finite, largest)
        scales.append(float(state.scale))
    return scales


def _flag(letter: Any) -> bool:
    if isinstance(letter, (bool, numpy.bool_)):
        return bool(letter)
    if letter in ("T", "F"):
        return bool(letter == "T")
    raise ValueError(f"trace must hold one T (finite) or F (overflow) a step, received {letter!r}")
