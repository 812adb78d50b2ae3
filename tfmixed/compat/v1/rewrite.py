"""The switch of grappler's rewrite to half precision, for sessions and functions of this process."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.protobuf import rewriter_config_pb2
from tensorflow.python.client.session import BaseSession
from tensorflow.python.framework.test_util import IsMklEnabled
from tensorflow.python.training.experimental import mixed_precision_global_state as flags

from tfmixed import hardware
from tfmixed._utils import user_warnings
from tfmixed.policy import BESIDE_REWRITE, REWRITE

_OPTIONS = {
    None: {},
    "float16": {"auto_mixed_precision": True},
    # Off, so that TensorFlow, which sets it for each session while its flag is set, leaves it: on some CPUs both
    # passes would run.
    "bfloat16": {"auto_mixed_precision": False, "auto_mixed_precision_onednn_bfloat16": True},
}
_ON, _OFF = rewriter_config_pb2.RewriterConfig.ON, rewriter_config_pb2.RewriterConfig.OFF
_POLICY = "the Keras policy {!r} was set"


class _Switch:
    """What is switched on in this process."""

    enabled = False
    dtype: str | None = None
    holders: dict[str, Callable[[], None]] = {}  # noqa: RUF012  # replaced, never changed
    before: dict[str, Any] = {}  # noqa: RUF012  # replaced, never changed
    plain_init: Callable[..., None] = BaseSession.__init__


def enable(dtype: str = "auto") -> str | None:
    """Switches the rewrite on for functions and for sessions that are made from now on; returns the dtype.

    Args:
        dtype: `"float16"` (the CUDA pass, on GPUs), `"bfloat16"` (oneDNN's, on CPUs), or `"auto"`: whichever is fast
            here. Where none is, nothing is switched on, with a warning, and None is returned.

    Raises:
        ValueError: Another `dtype`, or Keras has a policy for mixed precision.
    """
    if _mixed():
        raise ValueError(BESIDE_REWRITE.format(_POLICY.format(_mixed()), REWRITE))
    chosen = _chosen(dtype)
    if chosen is not None:
        _warn_of_sessions()
    if not _Switch.enabled:
        known = tf.config.optimizer.get_experimental_options()
        _Switch.before = {name: known.get(name, False) for name in _OPTIONS["bfloat16"]}
    _Switch.enabled, _Switch.dtype = True, chosen
    tf.config.optimizer.set_experimental_options({**_Switch.before, **_OPTIONS[chosen]})
    flags.set_mixed_precision_graph_rewrite_enabled(True)
    hold("enabled", _follow)
    return chosen


def disable() -> None:
    """Switches the rewrite off, for functions and for sessions that are made from now on."""
    if not _Switch.enabled and flags.is_mixed_precision_graph_rewrite_enabled():
        tf.compat.v1.mixed_precision.disable_mixed_precision_graph_rewrite()  # TensorFlow's own, without `install`
        return
    if not _Switch.enabled:
        user_warnings.warn("the graph rewrite is switched off already")
        return
    tf.config.optimizer.set_experimental_options(_Switch.before)
    flags.set_mixed_precision_graph_rewrite_enabled(False)
    _Switch.enabled, _Switch.dtype = False, None
    release("enabled")


def active() -> str | None:
    """Returns the dtype that the rewrite converts to, or None."""
    return _Switch.dtype


def is_enabled() -> bool:
    """Returns whether somebody switched the rewrite on, whatever this machine made of it."""
    return _Switch.enabled


def check_policy() -> None:
    """Raises if a Keras policy for mixed precision was set after the rewrite was switched on.

    Raises:
        ValueError: It was.
    """
    if _Switch.enabled and _mixed():
        raise ValueError(BESIDE_REWRITE.format(REWRITE, _POLICY.format(_mixed())))


def hold(holder: str, before: Callable[[], None]) -> None:
    """Lets each new session ask what to convert, after a call of `before`, until its holder calls `release`."""
    if not _Switch.holders:
        _Switch.plain_init = BaseSession.__init__
    _Switch.holders = {**_Switch.holders, holder: before}
    BaseSession.__init__ = _init


def release(holder: str) -> None:
    """Undoes `hold`."""
    _Switch.holders = {name: before for name, before in _Switch.holders.items() if name != holder}
    if not _Switch.holders:
        BaseSession.__init__ = _Switch.plain_init


def _init(self: Any, target: str = "", graph: Any = None, config: Any = None) -> None:
    for before in _Switch.holders.values():
        before()
    # TensorFlow hands its options to sessions without a configuration only.
    created = flags.non_mixed_precision_session_created()
    config = _configured(config)
    _Switch.plain_init(self, target, graph, config=config)
    if config is not None and config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 == _ON:
        flags.set_non_mixed_precision_session_created(created)


def _follow() -> None:
    """Switches off what TensorFlow's own `disable_mixed_precision_graph_rewrite` was called for."""
    if _Switch.enabled and not flags.is_mixed_precision_graph_rewrite_enabled():
        disable()


def _configured(config: Any) -> Any:
    """Returns the configuration with the passes of the rewrite, unless it refuses them."""
    if not isinstance(config, tf.compat.v1.ConfigProto):
        return config
    asked = config.graph_options.rewrite_options.auto_mixed_precision
    if asked == _OFF or (asked != _ON and _Switch.dtype is None):
        return config
    dtype = _Switch.dtype if _Switch.enabled else _chosen("auto")
    changed = tf.compat.v1.ConfigProto()
    changed.CopyFrom(config)
    if dtype is not None:
        changed.graph_options.place_pruned_graph = False  # of an InteractiveSession: grappler would not be asked
    for name, on in _OPTIONS[dtype].items():
        setattr(changed.graph_options.rewrite_options, name, _ON if on else _OFF)
    return changed


def _chosen(dtype: Any) -> str | None:
    dtype = getattr(dtype, "name", dtype)
    if dtype not in ("auto", "float16", "bfloat16"):
        raise ValueError(f'dtype must be "auto", "float16" or "bfloat16", received {dtype!r}')
    native, fast, reason = _native()
    if dtype == "auto" and not fast:
        user_warnings.warn(
            f"the graph rewrite converts nothing here: {reason}. The script goes on in float32, with its loss scale."
        )
        return None
    if dtype not in ("auto", native):
        where = "GPUs of compute capability 7.0 or more" if dtype == "float16" else "CPUs, with oneDNN"
        user_warnings.warn(
            f"the graph rewrite to {dtype} converts on {where} only, and this machine has none in use: {reason}. "
            'Use dtype="auto".'
        )
    elif not fast:
        user_warnings.warn(f"the graph rewrite to {dtype} is not fast here: {reason}.")
    else:
        print(f"tfmixed: graph rewrite to {native}: {reason}", file=sys.stderr)
    return native if dtype == "auto" else str(dtype)


def _native() -> tuple[str, bool, str]:
    """Returns what the pass for this machine converts to, whether that is fast, and why."""
    device = hardware.describe().main
    if device.kind == "gpu" and "float16" in device.fast:
        return "float16", True, f"compute capability {device.compute_capability} has float16 tensor cores"
    if device.kind == "gpu":
        return "float16", False, device.reason
    if "bfloat16" in device.fast and not IsMklEnabled():
        return "bfloat16", False, "oneDNN, which would convert to bfloat16, is off (TF_ENABLE_ONEDNN_OPTS)"
    return "bfloat16", "bfloat16" in device.fast, device.reason


def _warn_of_sessions() -> None:
    sessions = [each for each in gc.get_objects() if issubclass(type(each), BaseSession)]
    # One whose constructor failed has neither a handle nor, maybe, a configuration.
    open_ones = [each for each in sessions if getattr(each, "_session", None) is not None and not each._closed]
    plain = sum(not _is_converted(each._config) for each in open_ones)
    if plain:
        user_warnings.warn(
            f"the graph rewrite reaches sessions that are made from now on; {plain} open now stay as they are. "
            "Call enable_mixed_precision_graph_rewrite() before making sessions."
        )


def _is_converted(config: Any) -> bool:
    options = config.graph_options.rewrite_options
    return _ON in (options.auto_mixed_precision, options.auto_mixed_precision_onednn_bfloat16)


def _mixed() -> str | None:
    policy = keras.config.dtype_policy()
    return policy.name if policy.compute_dtype != policy.variable_dtype else None
