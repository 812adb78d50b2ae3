"""The Keras dtype policy, chosen for the hardware or with a word about it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import keras

from tfmixed import hardware
from tfmixed._islands import promotion
from tfmixed._utils import user_warnings
from tfmixed.formats import HALF

BESIDE_REWRITE = (
    "The graph rewrite and a Keras policy for mixed precision exclude each other, received both: {} first, {} second. "
    "Use one of them; the policy works eagerly too, the rewrite needs no change to the model."
)
REWRITE = "enable_mixed_precision_graph_rewrite() was called"
_warned: set[str] = set()


def set_policy(policy: str | keras.DTypePolicy = "auto", promote: bool = True) -> keras.DTypePolicy:
    """Sets the global Keras dtype policy and returns it.

    Under half precision, layers that are made from now on promote what they give to code that is not Keras's: scripts
    and custom layers see float32, and so do losses that layers add. Keras's layers compute in half precision.

    Args:
        policy: `"auto"` takes what `hardware.describe()` recommends and says why on standard error. A name
            (`"mixed_float16"`, `"mixed_bfloat16"`, `"float32"`, ...) or a Keras policy is taken as it is; if its half
            precision is slow on this machine, a warning says so, once.
        promote: False leaves out the promotion to float32. Defaults to True.

    Raises:
        ValueError: Keras knows no such policy, or it is one for mixed precision and TensorFlow's graph rewrite is on.

    Example:
    >>> set_policy("float32").compute_dtype
    'float32'
    """
    if isinstance(policy, str) and policy == "auto":
        machine = hardware.describe()
        print(f"tfmixed: policy {machine.policy}: {machine.reason}", file=sys.stderr)
        policy = machine.policy
    else:
        policy = _known(policy)
        _warn_if_slow(policy)
    _refuse_beside_rewrite(policy)
    keras.config.set_dtype_policy(policy)
    promotion.switch(promote and _known(policy).compute_dtype in HALF)
    return keras.config.dtype_policy()


@contextlib.contextmanager
def policy_scope(policy: str | keras.DTypePolicy = "auto", promote: bool = True) -> Iterator[keras.DTypePolicy]:
    """Sets the policy as `set_policy` does, and restores the one before at the end.

    Layers that were made meanwhile stay as they are.

    Example:
    >>> with policy_scope("float64") as policy:
    ...     policy.name
    'float64'
    """
    before, promoted = keras.config.dtype_policy(), promotion.is_on()
    try:
        yield set_policy(policy, promote)
    finally:
        # Here and not in `temporary`: `tfmixed run` takes what this module sets for the script's own choice.
        keras.config.set_dtype_policy(before)
        promotion.switch(promoted)


def _known(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    try:
        return keras.dtype_policies.get(policy)
    except (ValueError, TypeError) as error:
        raise ValueError(
            'policy must be "auto", a name such as "mixed_float16", "mixed_bfloat16" or "float32", or a '
            f"keras.DTypePolicy, received {policy!r}"
        ) from error


def _refuse_beside_rewrite(policy: str | keras.DTypePolicy) -> None:
    # As TensorFlow's own Keras does, by the same flag; it is there as soon as TensorFlow is.
    flags = sys.modules.get("tensorflow.python.training.experimental.mixed_precision_global_state")
    if _known(policy).compute_dtype in HALF and flags and flags.is_mixed_precision_graph_rewrite_enabled():
        raise ValueError(BESIDE_REWRITE.format(REWRITE, f"set_policy({_known(policy).name!r})"))


def _warn_if_slow(policy: keras.DTypePolicy) -> None:
    half = policy.compute_dtype
    machine = hardware.describe()
    if half not in HALF or half in machine.main.fast or policy.name in _warned:
        return
    _warned.add(policy.name)
    user_warnings.warn(
        f"policy {policy.name!r} is slow here: {machine.reason}. Use {machine.policy!r} for speed, or go on to study "
        f"the numerics of {half}."
    )
