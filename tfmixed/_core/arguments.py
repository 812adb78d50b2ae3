"""Parses constructor arguments under their Keras 2, Keras 3 and PyTorch names."""

from __future__ import annotations

from typing import Any

import keras

from tfmixed import scaling
from tfmixed._utils import user_warnings
from tfmixed.scaling import ConstantScale, DynamicScale, ScalingRule, validation


def skip_limit(max_consecutive_skips: int | None) -> int | None:
    """Returns the argument, None or a positive integer; a `ValueError` is raised for other values."""
    limit = max_consecutive_skips
    return None if limit is None else validation.count("max_consecutive_skips", limit, 1)


def rule_from(
    scale: Any, initial_scale: float | None, dynamic_growth_steps: int | None, dynamic: bool | None
) -> ScalingRule:
    """Returns the rule for arguments of `LossScaleOptimizer`."""
    if isinstance(scale, bool) and dynamic is None:
        scale, dynamic = "dynamic", scale  # Keras 2 has `dynamic` in second place
    if (initial_scale, dynamic_growth_steps, dynamic) == (None, None, None):
        return scaling.get(scale)
    if scale != "dynamic":
        raise ValueError(
            "`scale` excludes Keras's `initial_scale`, `dynamic_growth_steps` and `dynamic`. Put the numbers into the "
            f"rule. Received: scale={scale!r}"
        )
    if dynamic is not None and not isinstance(dynamic, bool):
        raise ValueError(f"`dynamic` must be True, False or None. Received: dynamic={dynamic!r}")
    if dynamic is not False:
        return dynamic_rule(initial_scale, dynamic_growth_steps)
    if initial_scale is None or dynamic_growth_steps is not None:
        raise ValueError(
            "`dynamic=False` is a constant scale, which needs `initial_scale` and no `dynamic_growth_steps`. Pass "
            "`scale=128`, or set `loss_scale_factor` on the inner optimizer to scale without a finite check. "
            f"Received: initial_scale={initial_scale!r}, dynamic_growth_steps={dynamic_growth_steps!r}"
        )
    return ConstantScale(validation.scale("initial_scale", initial_scale))


def dynamic_rule(initial_scale: float | None, steps: int | None) -> DynamicScale:
    """Returns Keras's rule with the default bounds, widened to include the initial scale."""
    default = DynamicScale()
    first = default.initial_scale if initial_scale is None else validation.scale("initial_scale", initial_scale)
    interval = default.growth_interval if steps is None else validation.count("dynamic_growth_steps", steps, 1)
    return DynamicScale(
        initial_scale=first,
        growth_interval=interval,
        min_scale=min(first, 1.0),
        max_scale=max(first, 2.0**24),
    )


def inner_from(optimizer: Any) -> keras.optimizers.Optimizer:
    """Returns the optimizer to wrap, from an optimizer or its name."""
    inner = keras.optimizers.get(optimizer) if isinstance(optimizer, str) else optimizer
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise ValueError(f"`inner_optimizer` must not scale the loss itself. Received: a {type(inner).__name__}")
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"`inner_optimizer` must be a keras.optimizers.Optimizer or its name. Received: {inner!r}")
    own, base = type(inner), keras.optimizers.Optimizer
    if own.apply_gradients is not base.apply_gradients and own.apply is base.apply:
        user_warnings.warn(
            f"`apply_gradients` of {own.__name__} has no effect in a wrapper, which calls `apply`. Override "
            "`apply(self, grads, trainable_variables=None)` instead."
        )
    return inner


def scaler_rule(rule: Any, numbers: dict[str, Any]) -> ScalingRule:
    """Returns the rule for arguments of `GradScaler`: a rule, or PyTorch's four numbers."""
    if rule is None:
        return _torch_rule(**numbers)
    if numbers != scaling.PEERS["torch"].defaults:
        raise ValueError(f"`rule` excludes PyTorch's four numbers. Received: rule={rule!r}, {numbers}")
    if isinstance(rule, str) and rule in scaling.PEERS:
        raise ValueError(f"`rule` must be a rule. Pass tfmixed.scaling.like({rule!r}). Received: rule={rule!r}")
    return scaling.get(rule)


def _torch_rule(initial_scale: Any, growth_interval: Any, **factors: float) -> ScalingRule:
    if isinstance(initial_scale, str):
        raise ValueError(
            f"`init_scale` must be a number. Pass PyTorch's device by name, device={initial_scale!r}; it is ignored. "
            f"Received: init_scale={initial_scale!r}"
        )
    if isinstance(growth_interval, float) and growth_interval.is_integer():
        growth_interval = int(growth_interval)
    first = validation.scale("init_scale", initial_scale)
    return scaling.like("torch", initial_scale=first, growth_interval=growth_interval, **factors)
