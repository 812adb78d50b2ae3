"""The last word on a script that mixed half precision and float32 where nothing could promote it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

import keras

from tfmixed import outside
from tfmixed.running.saying import place_of, say

_HALF = re.compile(r"\b(bfloat16|float16|half)\b", re.IGNORECASE)
_FULL = re.compile(r"\bfloat(32|64)?\b", re.IGNORECASE)
_LISTING = ("•", "Arguments received", "Received")


def explain(error: BaseException | None) -> None:
    """Says in one line where a script mixed the dtypes, if that is what it ended by."""
    for each in _chain(error):
        lines = [line.strip() for line in str(each).splitlines()]
        if any(_HALF.search(line) and _FULL.search(line) and not line.startswith(_LISTING) for line in lines):
            policy = keras.config.dtype_policy().name
            what = f"{_place(error)} mixes half precision and float32 under the policy {policy}"
            say(f"{what}, which the backend refuses: cast one of them, as in tf.cast(x, y.dtype)")
            return


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that it followed."""
    seen: set[int] = set()
    while isinstance(error, Exception) and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _place(error: BaseException | None) -> str:
    """Returns the innermost line of a traceback that belongs to no library."""
    assert error is not None
    places = [place_of(*each) for each in traceback.walk_tb(error.__traceback__) if outside.is_outside(each[0])]
    return places[-1] if places else "the script"
