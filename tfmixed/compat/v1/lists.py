"""Which operations the rewrite converts, as the headers of the installed TensorFlow say."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import tensorflow as tf

_HEADER = "tensorflow/core/grappler/optimizers/auto_mixed_precision_lists.h"
_CLASSES = {"float16": "AutoMixedPrecisionListsFp16", "bfloat16": "AutoMixedPrecisionListsMkl"}
_NAMES = ("allow", "infer", "deny", "clear")
_OLD_NAMES = {"allow": "WHITELIST", "infer": "GRAYLIST", "deny": "BLACKLIST"}
_PREFIX = "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_"


def list_of(operation: str, dtype: str) -> str:
    """Returns the list that an operation is on: `"allow"`, `"infer"`, `"deny"`, `"clear"`, or `"none"`.

    Args:
        operation: Its type, such as `"MatMul"`.
        dtype: What the rewrite converts to.

    Example:
    >>> list_of("MatMul", "bfloat16"), list_of("Softmax", "float16"), list_of("Exp", "float16")
    ('allow', 'infer', 'deny')
    """
    for name in _NAMES:
        if operation in (_lists(dtype)[name] | _from_environment(name, "ADD")) - _from_environment(name, "REMOVE"):
            return name
    return "none"


@functools.cache
def _lists(dtype: str) -> dict[str, frozenset[str]]:
    text = (Path(tf.sysconfig.get_include()) / _HEADER).read_text()
    (body,) = re.findall(rf"^class {_CLASSES[dtype]} .*?^}};", text, flags=re.DOTALL | re.MULTILINE)
    (shared,) = re.findall(r"tensor_list_ops\[\] = {(.*?)}", text, flags=re.DOTALL)
    found = {}
    for name in _NAMES:
        (method,) = re.findall(rf"{name.title()}List\(\) override {{(.*?)\n  }}\n", body, flags=re.DOTALL)
        # The names of environment variables are in capitals.
        found[name] = frozenset(re.findall(r'"(\w*[a-z]\w*)"', method + (shared if name == "clear" else "")))
    return found


def _from_environment(name: str, change: str) -> set[str]:
    spellings = (name.upper() + "LIST", _OLD_NAMES.get(name, ""))
    values = (os.environ.get(f"{_PREFIX}{spelling}_{change}", "") for spelling in spellings)
    return {operation for value in values for operation in value.split(",") if operation}
