"""Sets the Keras dtype policy: the fastest one for this hardware, or any other with a warning if it is slow here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import keras

from tfmixed import hardware
from tfmixed._core import optimizer_precision
from tfmixed._islands import gradient_sums, promotion
from tfmixed._utils import user_warnings
from tfmixed.formats import HALF

BESIDE_REWRITE = (
    "The graph rewrite and a Keras policy for mixed precision cannot be combined. Use one of them: the policy also "
    "works eagerly, the rewrite needs no change to the model. Received: first {}, then {}."
)
REWRITE = "enable_mixed_precision_graph_rewrite() was called"
_warned: set[str] = set()


def set_policy(
    policy: str | keras.DTypePolicy = "auto", promote: bool = True, float32_sums: bool = True
) -> keras.DTypePolicy:
    """Sets the global Keras dtype policy and returns it.

    Under half precision, new layers promote their outputs to float32 where code outside Keras uses them: scripts and
    custom layers see float32, and added losses are float32. Keras layers compute in half precision.

    Args:
        policy: `"auto"` selects the policy that `hardware.describe()` recommends, and prints the reason on standard
            error. A name (`"mixed_float16"`, `"mixed_bfloat16"`, `"float32"`, ...) or a Keras policy is set as it is,
            with one warning if its half precision is slow on this machine, and one if it keeps variables in half
            precision, where Keras's optimizers lose constants. Defaults to `"auto"`.
        promote: Whether new layers promote their outputs to float32. Defaults to True.
        float32_sums: Whether half-precision gradients are summed in float32: those of biases, of other broadcast
            variables and of embeddings. This replaces gradient functions of the backend in this process while layers
            exist that were created under half precision. False gives the backend's own sums. Defaults to True.

    Raises:
        ValueError: If Keras does not know the policy, or if it is a mixed-precision policy while the graph rewrite of
            TensorFlow is enabled.

    Example:
    >>> set_policy("float32").compute_dtype
    'float32'
    """
    if isinstance(policy, str) and policy == "auto":
        machine = hardware.describe()
        print(f"tfmixed: policy {machine.policy}: {machine.reason}", file=sys.stderr)
        policy = _known(machine.policy)
    else:
        policy = _known(policy)
        _warn_if_slow(policy)
    _refuse_beside_rewrite(policy)
    _warn_of_half_variables(policy)
    keras.config.set_dtype_policy(policy)
    is_half = policy.compute_dtype in HALF
    promotion.switch(promote and is_half)
    gradient_sums.switch(float32_sums and is_half, float32_sums)
    return keras.config.dtype_policy()


@contextlib.contextmanager
def policy_scope(
    policy: str | keras.DTypePolicy = "auto", promote: bool = True, float32_sums: bool = True
) -> Iterator[keras.DTypePolicy]:
    """Sets the policy like `set_policy`, and restores the previous policy on exit.

    Layers created within the scope keep their policy, and float32 sums for as long as they exist.

    Args:
        policy: The same as in `set_policy`. Defaults to `"auto"`.
        promote: The same as in `set_policy`. Defaults to True.
        float32_sums: The same as in `set_policy`. Defaults to True.

    Example:
    >>> with policy_scope("float64") as policy:
    ...     policy.name
    'float64'
    """
    before, promoted, sums = keras.config.dtype_policy(), promotion.is_on(), gradient_sums.state()
    try:
        yield set_policy(policy, promote, float32_sums)
    finally:
        # Not by `temporary_state`: `tfmixed run` treats policies that this module sets as the choice of the script.
        keras.config.set_dtype_policy(before)
        promotion.switch(promoted)
        gradient_sums.switch(*sums)


def _known(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    try:
        return keras.dtype_policies.get(policy)
    except (ValueError, TypeError) as error:
        raise ValueError(
            '`policy` must be "auto", a name such as "mixed_float16", "mixed_bfloat16" or "float32", or a '
            f"keras.DTypePolicy. Received: policy={policy!r}"
        ) from error


def _refuse_beside_rewrite(policy: keras.DTypePolicy) -> None:
    # By the same flag as TensorFlow's own Keras; this module of TensorFlow exists once TensorFlow is imported.
    flags = sys.modules.get("tensorflow.python.training.experimental.mixed_precision_global_state")
    if policy.compute_dtype in HALF and flags and flags.is_mixed_precision_graph_rewrite_enabled():
        raise ValueError(BESIDE_REWRITE.format(REWRITE, f"set_policy({policy.name!r})"))


def _warn_if_slow(policy: keras.DTypePolicy) -> None:
    half, machine = policy.compute_dtype, hardware.describe()
    if half in HALF and half not in machine.main.fast and policy.name not in _warned:
        _warned.add(policy.name)
        user_warnings.warn(
            f"policy {policy.name!r} is slow here: {machine.reason}. Use {machine.policy!r} for speed, or keep it to "
            f"study the numerics of {half}."
        )


def _warn_of_half_variables(policy: keras.DTypePolicy) -> None:
    dtype, key = policy.variable_dtype, f"variables: {policy.name}"
    if dtype in HALF and key not in _warned:
        _warned.add(key)
        user_warnings.warn(optimizer_precision.describe_default(f"policy {policy.name!r}", dtype))
