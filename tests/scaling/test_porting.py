"""What docs/porting.md says runs: the right column, in its order; and its rules are those of the left."""

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
    """Runs the right column; returns the names at the end, the weights before, and each rule with its section."""
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
            rules += [(title, number, each.rule) for each in given.values()]
    return names, before, rules


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
def test_the_right_column_runs():
    """Each row has its left side, and all of them together train the model."""
    text = PAGE.read_text()
    assert len(re.findall(r"```python\n", text)) == len(re.findall(r"```(?:py|json)\n", text)) >= 20
    names, before, _ = run()
    assert bool(names["stepped"])
    assert names["skipped"] is False
    assert names["copied"].get_scale() == 1024.0
    assert all((old != new.numpy()).any() for old, new in zip(before, names["variables"], strict=True))


# The left column as its projects document it, step by step.


def pytorch(trace, scale, interval=2000, least=2.0**-126, most=2.0**127):  # it knows no limits of its own
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


@pytest.mark.filterwarnings("ignore:policy 'mixed_.*' is slow here")
def test_each_rule_on_the_right_is_the_one_on_the_left():
    """Growth, backoff, hysteresis, and where they end: the scale after each of some thousand steps."""
    *_, rules = run()
    assert {(title, number) for title, number, _ in rules} == DOCUMENTED.keys()
    traces = ["F" * 5 + "T" * 2100 + "FTFFTFFF" + "T" * 2500 + "F" * 60, "T" * 4500 + "F", "FT" * 40 + "T" * 3001]
    for title, number, rule in rules:
        replay, arguments = DOCUMENTED[title, number]
        for trace in traces:
            expected = list(itertools.islice(replay(trace, **arguments), len(trace)))
            assert scaling.simulate(rule, trace) == expected, (title, number)


def test_contribs_rule_backs_off_at_every_second_overflow():
    """And not at each after the first two, as hysteresis does that comes back with a growth only."""
    rule = DynamicScale(initial_scale=16.0, hysteresis=2, refill="change")
    assert scaling.simulate(rule, "FFFF") == list(contrib("FFFF", 16.0)) == [16.0, 8.0, 8.0, 4.0]
