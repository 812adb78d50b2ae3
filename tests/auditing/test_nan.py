"""The decision tree of docs/nan.md: the snippets lead from a planted fault to the section that fixes it."""

from __future__ import annotations

import contextlib
import io
import re

import keras
import numpy as np
import pages
import pytest
import tensorflow as tf
from keras import layers, ops

import tfmixed
from tfmixed.errors import LossScaleExhausted

PATH = pages.ROOT / "docs" / "nan.md"
PAGE, SECTIONS = PATH.read_text(encoding="utf-8"), pages.sections(PATH)
LINE = re.compile(r"^( *)- (.*?)\[[^\]]*\]\(#([\w-]+)\)$", flags=re.MULTILINE)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* (is slow here|keeps variables in|float16 variables in)"),
    pytest.mark.filterwarnings("ignore:.* were skipped:UserWarning"),  # what is planted
    pytest.mark.filterwarnings("ignore:.*overflow encountered in cast:RuntimeWarning"),  # the fault of a layer
    pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _eagerly():
    """Tracing takes longer than these steps."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def tree():
    """Returns the list of the page as (depth, text in front of the link, anchor)."""
    text = re.sub(r"\n  \[", " [", PAGE[: PAGE.index("\n## ")])  # a line that is folded
    return [(len(spaces) // 4, lead.strip(), anchor) for spaces, lead, anchor in LINE.findall(text)]


def asked(anchor, names):
    """Runs the snippets of a section on a case, and returns what they print."""
    tf.config.run_functions_eagerly(anchor != "find-the-layer")  # audit reads graphs
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for code in SECTIONS[anchor]:
            exec(compile(code, f"docs/nan.md, {anchor}", "exec"), names)
    return out.getvalue().strip()


def end_of(symptom, names):
    """Walks the tree from a symptom, by the answers of the snippets."""
    lines = tree()
    at = next(number for number, (_, lead, _) in enumerate(lines) if symptom in lead)
    while True:
        depth, _, anchor = lines[at]
        below = []
        for number in range(at + 1, len(lines)):
            if lines[number][0] <= depth:
                break
            below += [number] if lines[number][0] == depth + 1 else []
        if not below:
            return anchor
        answer = asked(anchor, names)
        at = next(number for number in below if lines[number][1] == f"{answer}:")


def case(make, x, y, scale="dynamic", optimizer=None, policy="mixed_float16", loss="mse"):
    """Trains a model and returns the names that the page assumes."""

    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(x.shape[1:]), *make()])
        inner = optimizer() if optimizer else tfmixed.LossScaleOptimizer("adam", scale, max_consecutive_skips=12)
        model.compile(inner, loss=loss)
        return model

    tfmixed.set_policy(policy, promote=False)  # faults are planted in custom layers
    model = build()
    with contextlib.suppress(LossScaleExhausted):
        model.fit(x, y, epochs=3, batch_size=16, verbose=0, shuffle=False)
    return {"keras": keras, "np": np, "tfmixed": tfmixed, "build": build, "model": model, "x": x, "y": y}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def dense():
    return [layers.Dense(4), layers.Dense(1, dtype="float32")]


def a_nan_among_the_targets():
    y = normal(64, 1)
    y[5] = np.nan
    return case(dense, normal(64, 8), y)


def steps_that_are_too_large():
    return case(dense, normal(64, 8), normal(64, 1), optimizer=lambda: keras.optimizers.SGD(1e6))


def an_optimizer_that_applies_everything():
    x = normal(64, 8)
    x[5] = 3e5
    return case(dense, x, normal(64, 1), optimizer=lambda: keras.optimizers.SGD(1e-15), policy="float16")


def a_sum_over_12544_terms():
    def make():
        return [layers.Lambda(lambda x: ops.sum(x, axis=-1, keepdims=True)), layers.Dense(1, dtype="float32")]

    return case(make, np.full((64, 12_544), 10.0, "float32"), normal(64, 1))


def a_scale_that_is_too_large():
    return case(dense, normal(64, 8), normal(64, 1), scale=2.0**30)


def an_input_that_float16_cannot_hold():
    x = normal(64, 8)
    x[5] = 3e5
    return case(lambda: [layers.BatchNormalization(), *dense()], x, normal(64, 1))


def a_scale_that_is_found():
    return case(dense, normal(64, 8), normal(64, 1), scale=tfmixed.DynamicScale(initial_scale=2.0**20))


def gradients_below_6e8():
    def make():
        return [*(layers.Dense(16, "sigmoid") for _ in range(5)), layers.Dense(1, dtype="float32")]

    def small(y_true, y_pred):
        return 1e-6 * keras.losses.mean_squared_error(y_true, y_pred)

    return case(make, normal(64, 8), normal(64, 1), scale=None, loss=small)


def values_that_are_wrong_and_finite():
    def make():
        return [layers.UnitNormalization(), layers.Dense(1, dtype="float32")]

    return case(make, 300 + normal(64, 64), normal(64, 1))


NAN, POOR = "NaN or infinite", "stays above that of float32"
FAULTS = [
    (a_nan_among_the_targets, NAN, "clean-the-data"),
    (steps_that_are_too_large, NAN, "take-smaller-steps"),
    (an_optimizer_that_applies_everything, NAN, "wrap-the-optimizer"),
    (a_sum_over_12544_terms, NAN, "find-the-layer"),
    (a_scale_that_is_too_large, NAN, "lower-the-scale"),
    (an_input_that_float16_cannot_hold, NAN, "check-the-moving-statistics"),
    (a_scale_that_is_found, NAN, "continue-training"),
    (gradients_below_6e8, POOR, "raise-the-scale"),
    (values_that_are_wrong_and_finite, POOR, "find-the-layer"),
]
PRINTED = {  # by the snippets of the section
    a_nan_among_the_targets: r"^y: 1 values are not finite, the first at \[5, 0\]$",
    a_sum_over_12544_terms: "12,544 terms",
    a_scale_that_is_too_large: "^no scale is needed",
    an_input_that_float16_cannot_hold: r"moving_mean.*moving_variance",
    a_scale_that_is_found: r"^\d of 12 steps skipped$",
    values_that_are_wrong_and_finite: "unit_normalization",
}


FAST = [a_nan_among_the_targets, a_sum_over_12544_terms]
CASES = [pytest.param(*case, marks=() if case[0] in FAST else pytest.mark.slow, id=case[0].__name__) for case in FAULTS]


@pytest.mark.parametrize(("fault", "symptom", "end"), CASES)
def test_the_tree_leads_from_a_planted_fault_to_its_fix(fault, symptom, end):
    """The answers of the snippets lead to the right section, which prints the right fix. Then the model trains."""
    names = fault()
    before = np.isfinite(names["model"].evaluate(names["x"], names["y"], verbose=0))
    assert end_of(symptom, names) == end
    assert re.search(PRINTED.get(fault, ""), asked(end, names), flags=re.DOTALL | re.MULTILINE)
    if end == "clean-the-data":
        return
    model = names["model"]
    losses = model.fit(names["x"], names["y"], batch_size=16, verbose=0).history["loss"]
    assert np.isfinite(losses).all() or end == "wrap-the-optimizer"  # the bad batch is still among the data
    assert int(model.optimizer.skipped_steps) < int(model.optimizer.attempted_steps)
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)
    assert before or end not in ("continue-training", "lower-the-scale", "raise-the-scale")


def test_every_end_of_the_tree_has_a_fault_and_every_anchor_a_section():
    """There is neither an untested end nor a section without a link."""
    lines = tree()
    below = [number for number, (depth, _, _) in enumerate(lines[:-1]) if lines[number + 1][0] > depth]
    ends = {anchor for number, (_, _, anchor) in enumerate(lines) if number not in below}
    assert ends == {end for _, _, end in FAULTS}
    assert {anchor for _, _, anchor in lines} == SECTIONS.keys()
