"""What docs/porting.md says runs: the right column, in its order."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfmixed

PAGE = Path(__file__).parent.parent / "docs" / "porting.md"


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
def test_the_right_column_runs():
    """Each row has its left side, and all of them together train the model."""
    text = PAGE.read_text()
    after = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(after) == len(re.findall(r"```(?:py|json)\n", text)) >= 15
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])
    names = {
        "keras": keras,
        "tf": tf,
        "tfmixed": tfmixed,
        "model": model,
        "variables": model.trainable_variables,
        "optimizer": keras.optimizers.Adam(),
        "x": tf.constant(np.random.default_rng(0).normal(size=(16, 8)).astype("float32")),
        "y": tf.constant(np.arange(16) % 3),
        "loss_function": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    before = [variable.numpy() for variable in model.trainable_variables]
    for number, snippet in enumerate(after):
        exec(compile(snippet, f"docs/porting.md, snippet {number}", "exec"), names)
    assert bool(names["stepped"])
    assert names["skipped"] is False
    assert all((old != new.numpy()).any() for old, new in zip(before, model.trainable_variables, strict=True))
