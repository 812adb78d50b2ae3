"""Files of earlier versions load. `tests/data/make.py` writes one of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from backend import needs_tensorflow

import tfmixed
from tfmixed import records, report

DATA = Path(__file__).parents[1] / "data"
X = np.linspace(-1, 1, 32, dtype="float32").reshape(8, 4)


@pytest.fixture(params=sorted(path.name for path in DATA.iterdir() if path.is_dir()))
def version(request):
    return DATA / request.param


@pytest.fixture
def expected(version):
    return json.loads((version / "expected.json").read_text())


def load(path):
    if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
        pytest.skip("Keras 3.15 saved these models, with arguments that earlier versions do not have")
    model = keras.models.load_model(path)
    assert isinstance(model.optimizer, tfmixed.LossScaleOptimizer)
    return model


@pytest.mark.parametrize("name", ["model", "keras2"])
def test_a_saved_model_predicts_and_continues_training(version, expected, name):
    """Layers in float32, losses and both optimizers load by name, and the optimizer has its state."""
    model = load(version / f"{name}.keras")
    outputs = expected["outputs" if name == "model" else "keras2_outputs"]
    np.testing.assert_allclose(model.predict(X, verbose=0), outputs, atol=0.02)
    if name == "model":
        assert float(model.optimizer.loss_scale) == expected["scale"]
        state, own = model.optimizer._state(), model.optimizer.variables[:2]
        found = [*own, *map(state.read, state.shapes), *model.optimizer.inner_optimizer.variables]
        for value, saved in zip(found, expected["optimizer"], strict=True):
            value = keras.ops.convert_to_numpy(value)
            np.testing.assert_array_equal(value, np.asarray(saved, value.dtype))
    steps = int(model.optimizer.attempted_steps)
    model.fit(X, np.arange(8) % 3, batch_size=4, verbose=0)
    assert int(model.optimizer.attempted_steps) == steps + 2


def test_weights_load(version, expected):
    """Into the model that saved them."""
    model = load(version / "model.keras")
    for variable in model.trainable_variables:
        variable.assign(keras.ops.zeros(variable.shape))
    model.load_weights(version / "model.weights.h5")
    np.testing.assert_allclose(model.predict(X, verbose=0), expected["outputs"], atol=0.02)


@needs_tensorflow
def test_a_checkpoint_restores_model_and_optimizer(version, expected):
    """`tf.train.Checkpoint` finds all variables by their attributes."""
    import tensorflow as tf

    model = load(version / "model.keras")
    fresh = keras.models.clone_model(model)
    fresh.compile(tfmixed.LossScaleOptimizer.from_config(model.optimizer.get_config()), model.loss)
    fresh.optimizer.build(fresh.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer)
    checkpoint.read(str(version / "checkpoint")).assert_consumed()
    np.testing.assert_allclose(fresh.predict(X, verbose=0), expected["outputs"], atol=0.02)
    assert float(fresh.optimizer.loss_scale) == expected["scale"]


@needs_tensorflow
def test_a_tensorflow_1_checkpoint_restores(version, expected):
    """Variables in graphs have the same names."""
    import tensorflow as tf

    from tfmixed.compat import v1

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.compat.v1.get_variable("weight", initializer=1.0)
        optimizer = v1.LossScaleOptimizer(tf.compat.v1.train.AdamOptimizer(0.5), v1.DynamicLossScale(64.0))
        optimizer.minimize(weight**2)
        tf.compat.v1.train.Saver().restore(session, str(version / "tf1"))
        assert session.run(weight) == np.float32(expected["tf1_weight"])


def test_the_state_of_a_scaler_loads(expected):
    """All entries of `state_dict` are restored."""
    scaler = tfmixed.GradScaler()
    scaler.load_state_dict(expected["scaler"])
    assert scaler.state_dict() == expected["scaler"]


def test_a_log_is_read_and_reported(version):
    """Each line is a record, `to_line` writes the same values, and the report has its changes and ranges."""
    lines = (version / "model.jsonl").read_text().splitlines()
    assert [json.loads(records.to_line(records.from_line(line))) for line in lines] == list(map(json.loads, lines))
    kinds = [type(record).__name__ for record in records.read_log(version / "model.jsonl")]
    assert kinds == [
        "RunRecord",
        "ScaleChange",
        "Progress",
        "ScaleChange",
        *["Progress", "ScaleChange"] * 2,
        "Progress",
    ]
    assert {type(record).__name__ for record in records.read_log(version / "model.ranges.jsonl")} == {"RangesRecord"}
    run = report.read(version / "model.jsonl")
    assert (run.steps, run.skipped, run.final_scale) == (8, 3, 2.0**123)
