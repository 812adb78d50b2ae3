"""The last word on a script that gave half precision to code that refuses it, where nothing could promote it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

import keras

from tfmixed._cli.run.saying import place_of, say
from tfmixed._utils import user_warnings
from tfmixed.formats import HALF

# As TensorFlow, Keras, JAX and PyTorch name dtypes, and say that two differ, or that one is not supported.
_HALF = re.compile(r"\b(CPU|CUDA|DT_)?(bfloat16|float16|half)(Type|Tensor)?\b", re.IGNORECASE)
_FULL = re.compile(r"\bfloat(32)?(Type|Tensor)?\b", re.IGNORECASE)
_DIFFERENT = re.compile(r"\bbut\b|same (d|scalar )?type|be the same|match|different types|conversion requested")
_REFUSED = re.compile(
    r"(requires|must be) (tf\.)?float32|list of allowed values|[Uu]nsupported dtype|not implemented for|"
    r"dtypes not supported|find device for node|No OpKernel"
)
_LISTING = ("•", "Arguments received", "Received")


def explain(error: BaseException | None) -> None:
    """Says in one line where a script gave half precision to code that refuses it, if that is what it ended by."""
    errors = list(_chain(error))
    policy = _policy(errors)
    found = next(filter(None, (_fault(str(each)) for each in errors if _is_of_a_framework(each))), None)
    if policy is None or found is None:
        return
    what, remedy = found
    say(f"{_place(error)} {what} under the policy {policy}, which the backend refuses: {remedy}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that it followed."""
    seen: set[int] = set()
    while isinstance(error, Exception) and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _policy(errors: list[BaseException]) -> str | None:
    """Returns the half-precision policy in force, or of a layer whose code the exceptions passed; None without."""
    layers = [frame.f_locals.get("self") for each in errors for frame, _ in traceback.walk_tb(each.__traceback__)]
    policies = [getattr(layer, "dtype_policy", None) for layer in layers if isinstance(layer, keras.layers.Layer)]
    half = [each.name for each in (keras.config.dtype_policy(), *policies) if each and each.compute_dtype in HALF]
    return half[0] if half else None


def _is_of_a_framework(error: BaseException) -> bool:
    if keras.backend.backend() != "tensorflow":
        return True  # PyTorch's operators leave no frames, and JAX removes its own: the message must do.
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.partition(".")[0] in ("tensorflow", "keras") for name in (*frames, type(error).__module__))


def _fault(message: str) -> tuple[str, str] | None:
    """Returns what a message says that a script did, and the remedy; None for other messages."""
    lines = [line for line in message.splitlines() if not line.strip().startswith(_LISTING)]
    half = [line for line in lines if _HALF.search(line)]
    if any(_FULL.search(line) and _DIFFERENT.search(line) for line in half):
        return "mixes half precision and float32", "cast one of them, as in tf.cast(x, y.dtype)"
    if half and any(_REFUSED.search(line) for line in lines):
        return "calls an operation without half precision", 'cast its inputs, as in keras.ops.cast(x, "float32")'
    return None


def _place(error: BaseException | None) -> str:
    """Returns the innermost line of a traceback that belongs to no library."""
    assert error is not None
    places = [place_of(*each) for each in traceback.walk_tb(error.__traceback__) if user_warnings.is_outside(each[0])]
    return places[-1] if places else "the script"
