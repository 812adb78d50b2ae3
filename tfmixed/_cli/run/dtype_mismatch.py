"""Explanation of an exception that a script ended with because it passed half precision to code that refuses it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

import keras

from tfmixed._cli.run.messages import place_of, say
from tfmixed._utils import user_warnings
from tfmixed.formats import HALF

# Names of dtypes, and phrases for different or unsupported dtypes, in errors of TensorFlow, Keras, JAX and PyTorch.
_HALF = re.compile(r"\b(CPU|CUDA|DT_)?(bfloat16|float16|half)(Type|Tensor)?\b", re.IGNORECASE)
_FULL = re.compile(r"\bfloat(32)?(Type|Tensor)?\b", re.IGNORECASE)
_DIFFERENT = re.compile(r"\bbut\b|same (d|scalar )?type|be the same|match|different types|conversion requested")
_UNSUPPORTED = re.compile(
    r"(requires|must be) (tf\.)?float32|list of allowed values|[Uu]nsupported dtype|not implemented for|"
    r"dtypes not supported|find device for node|No OpKernel"
)
_ARGUMENT_LISTS = ("•", "Arguments received", "Received")


def explain(error: BaseException) -> None:
    """Prints the line of the script that passed half precision to code that refuses it, if that caused the error."""
    errors = list(_chain(error))
    policy = _policy(errors)
    reasons = (_reason(str(link)) for link in errors if _is_from_framework(link))
    reason = next(filter(None, reasons), None)
    if policy is not None and reason is not None:
        say(f"{_place(error)} {reason[0]} under the policy {policy}, which the backend refuses: {reason[1]}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and its causes."""
    known: set[int] = set()
    while isinstance(error, Exception) and id(error) not in known:
        known.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _policy(errors: list[BaseException]) -> str | None:
    """Returns the half-precision policy in force, or of a layer in a traceback; None without one."""
    owners = [frame.f_locals.get("self") for error in errors for frame, _ in traceback.walk_tb(error.__traceback__)]
    policies = [getattr(layer, "dtype_policy", None) for layer in owners if isinstance(layer, keras.layers.Layer)]
    candidates = [policy for policy in (keras.config.dtype_policy(), *policies) if policy is not None]
    return next((policy.name for policy in candidates if policy.compute_dtype in HALF), None)


def _is_from_framework(error: BaseException) -> bool:
    if keras.backend.backend() != "tensorflow":
        return True  # operators of PyTorch have no frames, and JAX removes its own
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.partition(".")[0] in ("tensorflow", "keras") for name in (*frames, type(error).__module__))


def _reason(message: str) -> tuple[str, str] | None:
    """Returns what the script did according to an error message, and the remedy; None for other messages."""
    lines = [line for line in message.splitlines() if not line.strip().startswith(_ARGUMENT_LISTS)]
    half = [line for line in lines if _HALF.search(line)]
    if any(_FULL.search(line) and _DIFFERENT.search(line) for line in half):
        return "mixes half precision and float32", "cast one of them, as in tf.cast(x, y.dtype)"
    if half and any(_UNSUPPORTED.search(line) for line in lines):
        return "calls an operation without half precision", 'cast its inputs, as in keras.ops.cast(x, "float32")'
    return None


def _place(error: BaseException) -> str:
    """Returns the innermost line of a traceback that belongs to no library."""
    places = [
        place_of(*entry) for entry in traceback.walk_tb(error.__traceback__) if user_warnings.is_outside(entry[0])
    ]
    return places[-1] if places else "the script"
