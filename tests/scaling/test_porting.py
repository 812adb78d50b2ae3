"""Runs the right column of docs/porting.md, and compares its rules with those of the left column."""

from __future__ import annotations

import functools
import itertools
import pickle
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfmixed
from tfmixed import scaling
from tfmixed.scaling import DynamicScale

PAGE = Path(__file__).parents[2] / "docs" / "porting.md"


@functools.cache
def run():
    """Runs the right column. Returns its names, the initial weights, and the rules by section and snippet."""
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])
    names = {
        "keras": keras,
        "pickle": pickle,
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
    rules = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)):
            title, given = section.partition("\n")[0], {}
            exec(compile(snippet, f"docs/porting.md, {title}, snippet {number}", "exec"), names)
            given = {name: names[name] for name in ("scaler", "scaled_optimizer") if f"{name} =" in snippet}
            rules += [(title, number, scaler.rule) for scaler in given.values()]
    return names, before, rules


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
def test_the_right_column_runs():
    """Every row has a left side, and together they train the model."""
    text = PAGE.read_text()
    assert len(re.findall(r"```python\n", text)) == len(re.findall(r"```(?:py|json)\n", text)) >= 20
    names, before, _ = run()
    assert bool(names["stepped"])
    assert names["skipped"] is False
    assert names["copied"].get_scale() == 1024.0
    assert all((old != new.numpy()).any() for old, new in zip(before, names["variables"], strict=True))


# The rules of the left column, as the projects document them.


def pytorch(trace, scale, interval=2000, least=2.0**-126, most=2.0**127):  # PyTorch has no limits
    tracker = 0
    for letter in trace:
        tracker = tracker + 1 if letter == "T" else 0
        scale = max(scale * 0.5, least) if letter == "F" else scale
        if tracker == interval:
            scale, tracker = min(scale * 2.0, most), 0
        yield scale


def deepspeed(trace, scale, interval=1000, hysteresis=2):
    last, left = -1, hysteresis
    for number, letter in enumerate(trace):
        if letter == "F":
            scale, left = (max(scale / 2, 1.0), left) if left == 1 else (scale, left - 1)
            last = number
        elif number - last - 1 > 0 and (number - last - 1) % interval == 0:
            scale, left = scale * 2, hysteresis
        yield scale


def contrib(trace, scale, interval=1000, every=2):
    good = bad = 0
    for letter in trace:
        good, bad = (good + 1, bad) if letter == "T" else (0, bad + 1)
        if good >= interval or bad >= every:
            scale = scale * 2 if good >= interval else max(scale * 0.5, 1.0)
            good = bad = 0
        yield scale


keras2 = jmp = functools.partial(pytorch, least=1.0)


def flax(trace, scale, interval=1000):
    good = 0
    for letter in trace:
        grows = letter == "T" and good == interval
        scale = max(scale * 0.5, 2.0**-126) if letter == "F" else scale * 2 if grows else scale
        good = good + 1 if letter == "T" and not grows else 0
        yield scale


def always(_trace, scale):
    return iter(lambda: scale, None)


DOCUMENTED = {
    ("PyTorch AMP", 0): (pytorch, {"scale": 2.0**16}),
    ("PyTorch AMP", 1): (pytorch, {"scale": 2.0**10, "interval": 500}),
    ("Apex", 0): (pytorch, {"scale": 2.0**16, "most": 2.0**24}),
    ("Apex", 2): (always, {"scale": 128.0}),
    ("DeepSpeed", 0): (deepspeed, {"scale": 2.0**16}),
    ("DeepSpeed", 1): (always, {"scale": 128.0}),
    ("Lightning", 1): (pytorch, {"scale": 2.0**10}),
    ("Keras 2", 0): (keras2, {"scale": 2.0**15, "most": 2.0**24}),
    ("Keras 2", 3): (always, {"scale": 128.0}),
    ("Keras 2", 4): (keras2, {"scale": 2.0**15, "most": 2.0**24}),
    ("Keras 2", 6): (keras2, {"scale": 2.0**15, "interval": 1000}),
    ("TensorFlow 1", 0): (contrib, {"scale": 2.0**15}),
    ("TensorFlow 1", 1): (always, {"scale": 5000.0}),
    ("JAX", 0): (jmp, {"scale": 2.0**15, "interval": 1000}),
    ("JAX", 1): (flax, {"scale": 2.0**16}),
}


SHORT = ["F" * 5 + "T" * 2003 + "FTFFTFFF" + "F" * 60]
LONG = ["F" * 5 + "T" * 2100 + "FTFFTFFF" + "T" * 2500 + "F" * 60, "T" * 4500 + "F", "FT" * 40 + "T" * 3001]


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
@pytest.mark.parametrize("traces", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_rules_of_both_columns_are_the_same(traces):
    """Compares the scales of some thousand steps, with growth, backoff, hysteresis and both bounds."""
    *_, rules = run()
    assert {(title, number) for title, number, _ in rules} == DOCUMENTED.keys()
    for title, number, rule in rules:
        replay, arguments = DOCUMENTED[title, number]
        for trace in traces:
            expected = list(itertools.islice(replay(trace, **arguments), len(trace)))
            assert scaling.simulate(rule, trace) == expected, (title, number)


def test_the_contrib_rule_backs_off_at_every_second_overflow():
    """With `refill="growth"` it would back off at every overflow after the first two."""
    rule = DynamicScale(initial_scale=16.0, hysteresis=2, refill="change")
    assert scaling.simulate(rule, "FFFF") == list(contrib("FFFF", 16.0)) == [16.0, 8.0, 8.0, 4.0]
