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
    "tabular": {"samples": 32, "width": 16},
}
MODULE = """
import keras
import numpy

def tiny():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.03, momentum=0.5), "mse")
    x = numpy.random.default_rng(0).normal(size=(40, 8)).astype("float32")
    return model, x, x.sum(axis=1, keepdims=True)

def weighted():
    model, x, y = tiny()
    model.compile("adam", "mse", loss_weights=[3.0], run_eagerly=True)
    return model, x, y

def naked():
    return tiny()[0]

def listed():
    return tiny()[0], "x", "y"

made = []

def same():
    made.append(tiny())
    return made[0]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The name of a function in a user's module of the current directory."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_networks.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        patch.setattr(sys, "path", [str(folder), *sys.path])
        yield "own_networks:tiny"


@pytest.fixture(scope="module")
def report(own):
    """A report of two rounds, without memory."""
    return bench.run([own], rounds=2, seconds=0.01, memory=False)


@pytest.mark.parametrize("name", networks.BATCHES)
def test_built_in_networks_have_an_output_for_each_target(name):
    """The outputs are finite, with one score for each class."""
    model, x, y = getattr(networks, name)(**SMALL[name])
    outputs = keras.ops.convert_to_numpy(model(x[:2]))
    assert np.isfinite(outputs).all()
    assert outputs.shape[:-1] == y[:2].shape
    assert outputs.shape[-1] > y.max()


@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "transformer", "depthwise", "tabular"))],
)
def test_built_in_networks_learn(name):
    """The loss falls, so that a fast but wrong result would show."""
    model, x, y = getattr(networks, name)(**SMALL[name])
    model.optimizer.learning_rate = 0.01
    losses = model.fit(x, y, batch_size=8, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]


def test_a_report_has_all_variants_of_the_same_training(own, report):
    """All variants train the same network for equally many steps. Those in half precision end with the same loss."""
    assert [row.variant for row in report.rows] == list(bench.VARIANTS)
    assert {(row.network, row.batch) for row in report.rows} == {(own, 32)}
    assert len({row.steps for row in report.rows}) == 1
    assert all(len(row.ms) == 2 and min(row.ms) > 0 and row.first_step > 0 for row in report.rows)
    float32, unscaled, keras_own, ours = report.rows
    assert keras_own.loss == pytest.approx(unscaled.loss, rel=1e-3)
    assert ours.loss == pytest.approx(unscaled.loss, rel=1e-3 if ON_CPU else 1e-2)
    assert float32.loss == pytest.approx(unscaled.loss, rel=0.2)
    assert report.ratio(ours, "keras") == keras_own.median / ours.median


@pytest.mark.slow
def test_a_built_in_network_runs():
    """The smallest one, in its own batch size."""
    report = bench.run(["tabular"], rounds=1, seconds=0.01, memory=False)
    assert {(row.network, row.batch) for row in report.rows} == {("tabular", 32)}
    assert all(np.isfinite(row.loss) for row in report.rows)


def test_a_report_prints_and_is_json(report):
    """The table and the JSON have the same numbers."""
    rows = json.loads(json.dumps(report.as_dict()))["rows"]
    assert rows[3]["ms_per_step"] == report.rows[3].median
    assert rows[3]["ratio_to_keras"] == report.ratio(report.rows[3], "keras")
    assert rows[3]["ratio_to_unscaled"] == report.rows[1].median / report.rows[3].median
    text = str(report)
    for row in report.rows:
        assert f"{row.median:.1f}" in text
        assert row.variant in text
    assert max(map(len, text.splitlines())) <= 120


def test_variants_differ_in_policy_and_optimizer(own):
    """A variant wraps a fresh copy of the model's optimizer."""
    case = bench.Case(own, "mixed_float16", 4)
    models = {variant: case.make(variant)[0] for variant in bench.VARIANTS}
    policies = {variant: model.layers[0].dtype_policy.name for variant, model in models.items()}
    assert policies == dict.fromkeys(bench.VARIANTS, "mixed_float16") | {"float32": "float32"}
    # Keras wraps every optimizer under mixed_float16.
    assert not isinstance(models["unscaled"].optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(models["float32"].optimizer, keras.optimizers.SGD)
    assert type(models["keras"].optimizer) is keras.optimizers.LossScaleOptimizer
    assert float(models["tfmixed"].optimizer.inner_optimizer.learning_rate) == pytest.approx(0.03)
    assert keras.config.dtype_policy().name == "float32"


def test_a_row_without_memory_if_its_process_fails(own, monkeypatch, capsys):
    """Standard error has the reason."""
    case, row = bench.Case(own, "mixed_bfloat16", 64), bench.Row("tiny", "tfmixed", 64, (1.0,), 1.0, 1, 0.0)
    monkeypatch.setattr(sys, "executable", "false")
    ticks = []
    assert case.with_memory(row, lambda: ticks.append(1)) == row
    assert ticks == [1]
    assert "not measured" in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.skipif(
    BACKEND == "jax" and not ON_CPU, reason="on a GPU the memory that XLA keeps is too small to compare"
)
def test_memory_grows_with_the_batch(own):
    """Measures two batch sizes in processes."""
    peaks = []
    for batch in (200_000, 400_000):
        row = bench.Row("tiny", "tfmixed", batch, (1.0,), 1.0, 1, 0.0)
        peaks.append(bench.Case(own, "mixed_bfloat16", batch).with_memory(row, lambda: None).peak)
    assert 16 * 2 < (peaks[1] - peaks[0]) / 200_000 < 1000  # the hidden layer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_networks:naked", "compiled.*Sequential"),
        ("own_networks:absent", "absent"),
        ("no_such_module:tiny", "no_such_module"),
        ("resnet", "resnet"),
        ("own_networks:listed", "arrays"),
        ("own_networks:same", "new model"),
    ],
)
@pytest.mark.usefixtures("own")
def test_other_cases_are_refused(spec, message):
    """The error names the case or the function."""
    with pytest.raises(ValueError, match=message):
        bench.run([spec], rounds=1, seconds=0.01, memory=False)


def test_networks_are_unique():
    """A network is the name of its rows."""
    with pytest.raises(ValueError, match="unique"):
        bench.run(["mlp", "mlp"])


@pytest.mark.usefixtures("own")
def test_other_arguments_of_compile_are_kept():
    """Only the optimizer is replaced, without the wrapper of `mixed_float16`."""
    model, _, _ = bench.Case("own_networks:weighted", "mixed_float16", 4).make("unscaled")
    assert model.run_eagerly
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.get_compile_config()["loss_weights"] == [3.0]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width):
    """Numbers are not truncated."""
    row = bench.Row("mlp", "float32", 512, (236.5, 219.6, 248.5), 11.24, 48, 0.0711, 2**30)
    rows = tuple(dataclasses.replace(row, variant=variant) for variant in bench.VARIANTS)
    report = bench.Report("mixed_bfloat16", "AMD EPYC", {"keras": "3.15.1"}, rows)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    lines = [line.split() for line in console.export_text().splitlines() if line.split()[:1] == ["tfmixed"]]
    assert lines == [["tfmixed", "236.5", "220-248", "1.00", "1.00", "1.00", "11.2", "0.0711", "1,024"]]


def test_the_plot_shows_medians_relative_to_the_first_variant():
    """The bars of a network are in units of its first variant."""
    times = {"mlp": {"float32": [10.0, 12.0, 11.0], "tfmixed": [5.5]}, "cnn": {"float32": [100.0], "tfmixed": [25.0]}}
    figure = plotting.plot_times(times)
    (axes,) = figure.axes
    heights = [[round(float(bar.get_height()), 3) for bar in bars] for bars in axes.containers if len(bars) == 2]
    assert [1.0, 1.0] in heights
    assert [0.5, 0.25] in heights
    assert [text.get_text() for text in axes.get_xticklabels()] == ["mlp\n11.0 ms", "cnn\n100.0 ms"]


def test_a_batch_larger_than_the_data_repeats_it():
    """The samples repeat in order."""
    np.testing.assert_array_equal(repeated(np.arange(3), 7), [0, 1, 2, 0, 1, 2, 0])
