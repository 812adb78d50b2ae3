"""The examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import keras
import pytest

import tfmixed

PACKAGE = Path(tfmixed.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if re.search(r"^\s+>>> (?!.*SKIP)", path.read_text(encoding="utf-8"), re.MULTILINE)
]


# Raised by the examples of the graph rewrite on a CPU without bfloat16.
@pytest.mark.filterwarnings("ignore:The graph rewrite")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    """With the output that they show."""
    module = importlib.import_module(name)
    public = {entry: getattr(tfmixed.scaling, entry) for entry in tfmixed.scaling.__all__}
    result = doctest.testmod(
        module, extraglobs={"keras": keras, "ops": keras.ops, "scaling": tfmixed.scaling, "tfmixed": tfmixed, **public}
    )
    assert result.attempted > 0
    assert result.failed == 0
