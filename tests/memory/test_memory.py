from __future__ import annotations

import json
import sys

import keras
import pytest
from backend import BACKEND, ON_CPU

from tfmixed import memory
from tfmixed._cli.main import main
from tfmixed.memory import MemoryEstimate, Option, Sizes, estimation, process, sizes_of

GIB, MIB = 2**30, 2**20
NOTHING = Sizes(0, 0, 0, 0)
MODULE = """
import keras
import numpy as np
from tfmixed._cli.bench import networks

def tiny():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model, np.ones((40, 8), "float32"), np.ones((40, 1), "float32")

def naked():
    return tiny()[0]

def broken():
    raise RuntimeError("a reason of its own")

def weights():
    return networks.mlp(64, 2560, 6)

def activations():
    return networks.cnn(64, 32, 64, 3)

def both():
    return networks.transformer(16, 64, 384, 3, 6, 4000)
"""


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """A folder with a user's module, which is importable."""
    path = tmp_path_factory.mktemp("memory")
    (path / "memory_models.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", [str(path), *sys.path])
        yield path


def trained(optimizer, dtype="float32"):
    """A model whose optimizer is built: an embedding of 300 x 20, a dense layer of 400 x 20."""
    layers = [keras.layers.Embedding(300, 20), keras.layers.Flatten(), keras.layers.Dense(20)]
    for layer in layers:
        layer.dtype_policy = dtype
    model = keras.Sequential([keras.Input((20,), dtype="int32"), *layers])
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        (keras.optimizers.SGD(), 0),
        (keras.optimizers.SGD(momentum=0.9), 1),
        (keras.optimizers.Adam(), 2),
        (keras.optimizers.Adam(amsgrad=True), 3),
        (keras.optimizers.Adam(gradient_accumulation_steps=2), 3),
        (keras.optimizers.Adam(use_ema=True), 3),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), 2),
    ],
)
def test_variables_are_counted(optimizer, slots):
    """Each state has the bytes of the weights; steps, rates and scales are scalars."""
    sizes = sizes_of(trained(optimizer))
    assert sizes.weights == sizes.gradients == 4 * (6000 + 8000 + 20)
    assert 0 < sizes.states - slots * sizes.weights <= 64
    assert sizes.copies == 0


def test_mixed_precision_copies_the_weights():
    """Mixed policies keep float32 weights and cast them; pure ones have 2 bytes a weight."""
    mixed = sizes_of(trained("adam", "mixed_bfloat16"))
    assert (mixed.weights, mixed.copies) == (4 * 14020, 2 * 14020)


def test_frozen_weights_have_no_gradients():
    """Nor states."""
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10, trainable=False), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    assert (sizes_of(model).weights, sizes_of(model).gradients) == (4 * 121, 4 * 11)


def test_an_optimizer_that_is_not_built_is_refused():
    """The message has the call to build it."""
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="built"):
        sizes_of(model)


def test_the_largest_batch_is_the_inverse_of_the_peak():
    """It is the last batch within the budget, on each segment and beyond, also with counted bytes and parts."""
    points = ((8, 1000), (16, 1000), (64, 2000))
    for option in (Option("", points, NOTHING), Option("", points, NOTHING, -500, 4)):
        for budget in (700, 1000, 1500, 2000, 123_456):
            batch = option.largest_batch(budget)
            assert batch == 0 or option.peak(batch) <= budget
            assert option.peak(batch + 1) > budget
    assert Option("", points, NOTHING).peak(128) == 2000 + 64 * 1000 // 48
    assert Option("", ((8, 1000), (16, 990)), NOTHING).largest_batch(5000) is None


def estimate_of(budget=8 * GIB):
    """An estimate of 1,000,000 float32 weights with Adam, and a MiB a sample."""
    sizes = Sizes(4_000_000, 4_000_000, 8_000_000, 0)
    points = ((8, 100 * MIB), (16, 108 * MIB))
    options = (Option("float32", points, sizes), Option("low", points, sizes, -8_000_000))
    return MemoryEstimate("mine:train", 32, budget, 500 * MIB, 3 * MIB, options)


def test_purposes_add_up_to_the_peak():
    """The remainder is temporary values."""
    estimate = estimate_of()
    assert estimate.peak == 124 * MIB == sum(estimate.purposes().values())
    assert estimate.purposes()["activations"] == 32 * MIB
    assert estimate.purposes()["optimizer states"] == 8_000_000
    assert estimate.largest_batch == 8 * 1024 - 92


def test_an_estimate_prints_and_is_json():
    """Both have the same numbers."""
    result, text = json.loads(estimate_of().to_json()), str(estimate_of())
    assert result["options"][1]["saved"] == 8_000_000
    assert result["largest_batch"] == 8100
    assert "8,100" in text
    assert "8 GiB" in text
    assert "GiB" not in str(estimate_of(budget=None))


@pytest.fixture
def measured(monkeypatch):
    """Replaces processes: a MiB a sample, half of that in mixed precision."""
    calls = []

    def measure(_, policy, batch, samples, *low_precision):
        calls.append((policy, batch, samples, *low_precision))
        copies = 1 if policy == "mixed_bfloat16" else 0
        peak = 100 * MIB + batch * MIB // (1 if policy is None else 2) - 10 * MIB * len(low_precision)
        return {
            "before": 1,
            "peak": peak,
            "data": 0,
            "sizes": {**vars(NOTHING), "weights": 4_000_000, "states": 8_000_000, "copies": copies},
        }

    monkeypatch.setattr(process, "measure", measure)
    return calls


def test_the_batch_and_a_quarter_of_it_are_trained(measured, monkeypatch):
    """Or less if memory is short, and more up to a quarter of a budget."""
    estimate = memory.estimate("memory_models:tiny", 16)
    assert measured[:4] == [(None, 4, 48), (None, 16, 48), ("mixed_bfloat16", 4, 48), ("mixed_bfloat16", 16, 48)]
    assert measured[4] == ("bfloat16", 16, 48, "split", "bfloat16")
    assert estimate.peak == 116 * MIB
    saved = [estimate.peak - option.peak(16) for option in estimate.options]
    assert saved[:2] == [0, 8 * MIB]
    assert saved[2:5] == [28 * MIB] * 3
    for batch, budget, left, expected in (
        (16, 1, 8, [4, 16, 64, 256]),
        (16, None, 0.2, [4, 8]),
        (16, None, 0.1, [2, 4]),
        (1, None, 8, [1, 2]),
    ):
        measured.clear()
        monkeypatch.setattr(estimation, "_available", lambda left=left: left * GIB)
        assert memory.estimate("memory_models:tiny", batch, budget=budget, options=False).peak == (100 + batch) * MIB
        assert sorted(size for _, size, *_ in measured) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("memory_models:tiny", 0), "batch"),
        (("memory_models:tiny", 8, -1), "budget"),
        ((lambda: None,), "importable"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    """Before any process starts."""
    function, batch, budget = (*arguments, 8, None)[:3] if len(arguments) < 3 else arguments
    with pytest.raises(ValueError, match=message):
        memory.estimate(function, batch, budget=budget)


@pytest.mark.usefixtures("measured")
def test_the_command_prints_json(monkeypatch, capsys):
    """All options are passed on."""
    arguments = ["memory", "memory_models:tiny", "--batch", "16", "--budget", "1", "--json", "--no-options"]
    monkeypatch.setattr(sys, "argv", ["tfmixed", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    result = json.loads(capsys.readouterr().out)
    assert (result["batch"], result["budget"], len(result["options"])) == (16, GIB, 1)


def test_other_results_of_the_function_are_refused():
    """Without data there is no training."""
    with pytest.raises(ValueError, match="dataset"):
        process.trained("memory_models:naked", None, 8, 24)


@pytest.mark.slow
def test_a_failing_process_is_named():
    """The last line of the process is in the message."""
    with pytest.raises(ValueError, match="reason of its own"):
        memory.estimate("memory_models:broken", 8)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch" and ON_CPU, reason="malloc keeps freed memory in an unpredictable way")
@pytest.mark.parametrize(
    ("name", "policy", "batch"),
    [
        pytest.param("weights", "mixed_bfloat16", 64, marks=pytest.mark.thorough),
        pytest.param("activations", "float32", 128, marks=pytest.mark.thorough),
        ("both", "float32", 16),
    ],
)
def test_the_prediction_is_within_a_tenth(name, policy, batch):
    """Of the peak of a process that trains with more data."""
    spec = f"memory_models:{name}"
    predicted = memory.estimate(spec, batch, policy=policy, options=False).peak
    assert predicted == pytest.approx(process.measure(spec, policy, batch, 5 * batch)["peak"], rel=0.1)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND == "torch" and ON_CPU, reason="malloc keeps freed memory in an unpredictable way")
def test_the_largest_batch_fills_the_budget():
    """Training with it peaks within a tenth of the budget."""
    batch = memory.estimate("memory_models:activations", 64, budget=1.5, options=False).largest_batch
    peak = process.measure("memory_models:activations", None, batch, 5 * batch)["peak"]
    assert peak == pytest.approx(1.5 * GIB, rel=0.1)
