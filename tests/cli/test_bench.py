from __future__ import annotations

import dataclasses
import io
import json
import os
import sys

import keras
import numpy as np
import pytest
from backend import BACKEND, ON_CPU
from rich.console import Console

from tfmixed import plotting
from tfmixed._cli import bench
from tfmixed._cli.bench import networks
from tfmixed._cli.bench.cases import repeated

SMALL = {
    "mlp": {"samples": 32, "width": 16, "depth": 2},
    "cnn": {"samples": 16, "side": 8, "channels": 4, "depth": 1},
    "depthwise": {"samples": 16, "side": 8, "channels": 4, "depth": 1},
    "transformer": {"samples": 8, "tokens": 6, "width": 8, "depth": 1, "heads": 2, "vocabulary": 20},
}
MODULE = """
import keras
import numpy

def tiny():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.03, momentum=0.5), "mse")
    x = numpy.random.default_rng(0).normal(size=(40, 8)).astype("float32")
    return model, x, x.sum(axis=1, keepdims=True)

def naked():
    return tiny()[0]

def listed():
    return tiny()[0], "x", "y"

made = []

def same():
    made.append(tiny())
    return made[0]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "own_networks:tiny"


@pytest.mark.parametrize("name", networks.BATCHES)
def test_built_in_networks_learn(name):
    """A benchmark whose loss says nothing would not show a fast wrong answer."""
    model, x, y = getattr(networks, name)(**SMALL[name])
    model.optimizer.learning_rate = 0.01
    losses = model.fit(x, y, batch_size=8, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]


def test_a_report_has_all_variants_of_the_same_training(own):
    """Side by side: same network, steps and data; the half-precision ones end with the same loss."""
    report = bench.run([own], rounds=2, seconds=0.01, memory=None)
    assert [row.variant for row in report.rows] == list(bench.VARIANTS)
    assert len({(row.network, row.batch, row.steps) for row in report.rows}) == 1
    assert all(len(row.ms) == 2 and min(row.ms) > 0 and row.first_step > 0 for row in report.rows)
    float32, unscaled, keras_own, ours = report.rows
    assert keras_own.loss == pytest.approx(unscaled.loss, rel=1e-3)
    assert ours.loss == pytest.approx(unscaled.loss, rel=1e-3 if ON_CPU else 1e-2)
    assert float32.loss == pytest.approx(unscaled.loss, rel=0.2)
    assert report.ratio(ours, "keras") == keras_own.median / ours.median


def test_a_report_prints_and_is_json(own):
    """The table and the JSON hold the same numbers."""
    report = bench.run([own], rounds=1, seconds=0.01, memory=None)
    rows = json.loads(json.dumps(report.as_dict()))["rows"]
    assert rows[3]["ms_per_step"] == report.rows[3].median
    assert rows[3]["ratio_to_keras"] == report.ratio(report.rows[3], "keras")
    text = str(report)
    for row in report.rows:
        assert f"{row.median:.1f}" in text
        assert row.variant in text
    assert max(map(len, text.splitlines())) <= 120


def test_variants_train_what_they_say():
    """The optimizer that the model was compiled with, in the wrapper and the policy of the variant."""
    made = {variant: bench.Case("mlp", "mixed_float16", 4) for variant in bench.VARIANTS}
    models = {variant: case.made(variant)[0] for variant, case in made.items()}
    assert {variant: model.layers[0].dtype_policy.name for variant, model in models.items()} == {
        "float32": "float32",
        "unscaled": "mixed_float16",
        "keras": "mixed_float16",
        "tfmixed": "mixed_float16",
    }
    # Keras wraps any optimizer under mixed_float16 by itself.
    assert not isinstance(models["unscaled"].optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(models["float32"].optimizer, keras.optimizers.Adam)
    assert type(models["keras"].optimizer) is keras.optimizers.LossScaleOptimizer
    assert float(models["tfmixed"].optimizer.inner_optimizer.learning_rate) == pytest.approx(1e-4)
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.skipif(BACKEND == "jax" and not ON_CPU, reason="on a GPU XLA keeps too little of it to tell")
def test_memory_grows_with_the_batch(own):
    """In a process of its own; the batch that fits is read off the line through two of them."""
    case = bench.Case(own, "mixed_bfloat16", 200_000)
    row = case.with_memory(bench.Row("tiny", "tfmixed", case.batch, (1.0,), 1.0, 1, 0.0), 2.0**31, lambda: None)
    assert row.peak > 200_000 * 16 * 2  # the hidden layer alone
    assert row.batch_in_memory > case.batch
    slope = (2.0**31 - row.peak) / (row.batch_in_memory - case.batch)
    assert 16 * 2 < slope < 1000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_networks:naked", "must return a compiled keras.Model, inputs and targets, received Sequential"),
        ("own_networks:absent", "absent"),
        ("no_such_module:tiny", "no_such_module"),
        ("resnet", "networks must be among mlp, cnn, transformer, depthwise, .*received 'resnet'"),
        ("own_networks:listed", "must return inputs and targets as arrays, received str"),
        ("own_networks:same", "must return a new model each time"),
    ],
)
def test_what_is_no_case_is_said(own, spec, message):
    """Before anything is trained."""
    assert own
    with pytest.raises(ValueError, match=message):
        bench.run([spec], rounds=1, seconds=0.01, memory=None)


def test_a_network_is_given_once():
    """Its name is that of its row."""
    with pytest.raises(ValueError, match="networks must be given once each, received mlp, mlp"):
        bench.run(["mlp", "mlp"])


def test_what_a_model_was_compiled_with_stays(own):
    """But for the optimizer, which is the variant's: `mixed_float16` wraps none by itself."""
    case = bench.Case(own, "mixed_float16", 4)
    made = case._function

    def weighted():
        model, x, y = made()
        model.compile("adam", "mse", loss_weights=[3.0], run_eagerly=True)
        return model, x, y

    case._function = weighted
    model, _, _ = case.made("unscaled")
    assert model.run_eagerly
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.get_compile_config()["loss_weights"] == [3.0]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width):
    """No number is cut."""
    row = bench.Row("mlp", "float32", 512, (236.5, 219.6, 248.5), 11.24, 48, 0.0711, 2**30, 58738)
    rows = tuple(dataclasses.replace(row, variant=variant) for variant in bench.VARIANTS)
    report = bench.Report("mixed_bfloat16", "AMD EPYC", {"keras": "3.15.1"}, 8 * 2**30, rows)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    lines = [line.split() for line in console.export_text().splitlines() if line.split()[:1] == ["tfmixed"]]
    assert lines == [["tfmixed", "236.5", "220-248", "1.00", "1.00", "11.2", "0.0711", "1,024", "58,738"]]


def test_the_picture_shows_medians_relative_to_the_first():
    """Each group in units of its first variant."""
    times = {"mlp": {"float32": [10.0, 12.0, 11.0], "tfmixed": [5.5]}, "cnn": {"float32": [100.0], "tfmixed": [25.0]}}
    figure = plotting.plot_times(times)
    (axes,) = figure.axes
    heights = [[round(float(bar.get_height()), 3) for bar in bars] for bars in axes.containers if len(bars) == 2]
    assert [1.0, 1.0] in heights
    assert [0.5, 0.25] in heights
    assert [text.get_text() for text in axes.get_xticklabels()] == ["mlp\n11.0 ms", "cnn\n100.0 ms"]


def test_a_batch_larger_than_the_data_repeats_it():
    """In order."""
    np.testing.assert_array_equal(repeated(np.arange(3), 7), [0, 1, 2, 0, 1, 2, 0])
