from __future__ import annotations

import doctest
import importlib

import keras
import pytest

import tfmixed

MODULES = [
    "auditing.findings",
    "auditing.reading",
    "by_hand",
    "callbacks.ranges",
    "callbacks.scale",
    "compat.experimental",
    "compat.keras2",
    "compat.v1",
    "compat.v1.checkpoints",
    "compat.v1.conversion",
    "compat.v1.enabling",
    "compat.v1.hooks",
    "compat.v1.installing",
    "compat.v1.lists",
    "compat.v1.optimizer",
    "compat.v1.scales",
    "config",
    "doctor",
    "formats",
    "grad_scaler",
    "inplace",
    "islands",
    "hardware",
    "layers.attention",
    "layers.float32",
    "layers.normalization",
    "layers.pooling",
    "layers.reductions",
    "layers.softmax",
    "losses",
    "optimizer",
    "plotting.heatmap",
    "plotting.histogram",
    "plotting.scale",
    "plotting.timeline",
    "policy",
    "probing",
    "ranges.answers",
    "report",
    "scaling",
    "scaling.history",
    "scaling.logmax",
    "scaling.peers",
    "scaling.replay",
    "scaling.rules",
    "widths",
]


# What the examples of the graph rewrite say on a CPU without bfloat16.
@pytest.mark.filterwarnings("ignore:the graph rewrite (converts nothing here|is switched off already)")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    """Each example gives what it says."""
    module = importlib.import_module(f"tfmixed.{name}")
    public = {entry: getattr(tfmixed.scaling, entry) for entry in tfmixed.scaling.__all__}
    result = doctest.testmod(
        module, extraglobs={"keras": keras, "ops": keras.ops, "scaling": tfmixed.scaling, "tfmixed": tfmixed, **public}
    )
    assert result.attempted > 0
    assert result.failed == 0
