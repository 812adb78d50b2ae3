"""Warnings point at the line of the user's file, regardless of how deep the cause lies."""

from __future__ import annotations

import threading
import warnings

import keras
import numpy as np
import pytest
from backend import needs_tensorflow

import tfmixed
from tfmixed._utils import user_warnings


def subclassed():
    """Returns a built model with unknown inputs."""

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x, y):
            return self.dense(x + y)

    model = Two()
    model(np.ones((2, 2), "float32"), np.ones((2, 2), "float32"))
    return model


def in_a_replica():
    thread = threading.Thread(target=user_warnings.warn, args=["in a thread of a framework"])
    thread.start()
    thread.join()


def in_a_structure():
    keras.tree.map_structure(user_warnings.warn, ["for a leaf"])


def unscaled():
    optimizer = tfmixed.LossScaleOptimizer(keras.optimizers.SGD(), 8)
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    optimizer.apply([keras.ops.ones([1])], [variable])


def policy():
    from tfmixed.compat import experimental

    experimental.Policy("mixed_bfloat16", loss_scale=8)
    experimental.set_policy("float32")


FORCED = pytest.param(lambda: tfmixed.force_float32(subclassed()), marks=needs_tensorflow, id="force_float32")


@pytest.mark.parametrize("warns", [FORCED, in_a_replica, in_a_structure, unscaled, policy])
def test_warnings_point_at_the_users_file(warns):
    """Also from threads and from code that a framework calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warns()
    files = [warning.filename for warning in caught if warning.category is UserWarning]
    assert files
    assert set(files) == {__file__}


def test_warnings_of_callbacks_point_at_the_call_of_fit(tmp_path):
    """Although Keras calls them."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    logger = tfmixed.callbacks.LossScaleLogger(tmp_path / "log.jsonl")
    with pytest.warns(UserWarning, match="logs nothing") as caught:
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[logger])
    assert caught[0].filename == __file__
