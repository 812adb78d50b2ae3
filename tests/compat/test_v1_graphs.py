"""State in TensorFlow 1 graphs, reference variables, and optimizers that override methods."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1

from tfmixed.compat.v1 import DynamicLossScale, FixedLossScale, LossScaleOptimizer
from tfmixed.scaling import DynamicScale

INNER = {
    "Adam": V1.train.AdamOptimizer,
    "Momentum": lambda rate: V1.train.MomentumOptimizer(rate, 0.9, use_nesterov=True, use_locking=True),
    "Ftrl": V1.train.FtrlOptimizer,
}


@pytest.fixture(params=[True, False], ids=["resources", "references"])
def resources(request):
    if not request.param:
        V1.disable_resource_variables()
    yield
    V1.enable_resource_variables()


@pytest.mark.usefixtures("resources")
@pytest.mark.parametrize("inner", tf1.some(["Adam"], INNER))
def test_reference_variables_are_trained(inner):
    """Requested for one variable or for all. TensorFlow 2 conditionals remain enabled for the script."""
    runs = []
    for wrap in (lambda opt: opt, lambda opt: LossScaleOptimizer(opt, 64)):
        with tf.Graph().as_default():
            given = V1.placeholder(tf.float32, [2])
            weight = V1.get_variable("w", initializer=tf.zeros(2), use_resource=False)
            step = V1.train.get_or_create_global_step()
            train = wrap(inner(0.5)).minimize(tf.reduce_sum(weight * given), step)
            with tf1.session() as session:
                for numbers in ([1.0, 2.0], [2.0, 1.0]):
                    session.run(train, {given: numbers})
                runs.append(session.run([weight, step]))
                if len(runs) == 2:
                    session.run(train, {given: [1.0, np.nan]})
                    np.testing.assert_array_equal(session.run(weight), runs[1][0])
    np.testing.assert_allclose(*[weight for weight, _ in runs], rtol=1e-5)
    assert [step for _, step in runs] == [2, 2]
    assert V1.control_flow_v2_enabled()


@pytest.mark.slow
def test_a_loss_scale_does_not_keep_its_graph_alive():
    """The object is used in two graphs, which are then deleted."""
    scale, graphs = DynamicLossScale(), []
    for _ in range(2):
        with tf.Graph().as_default() as graph:
            weight = V1.get_variable("w", initializer=1.0)
            LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), scale).minimize(weight * 1.0)
            graphs.append(weakref.ref(graph))
    del graph, weight
    gc.collect()
    assert [graph() for graph in graphs] == [None, None]


@pytest.mark.parametrize(
    ("before", "after", "scale"),
    [
        ("dynamic", FixedLossScale(8), 8.0),
        pytest.param("dynamic", DynamicScale(initial_scale=4.0, max_scale=16.0), 16.0, marks=pytest.mark.slow),
        pytest.param(2, DynamicScale(initial_scale=16.0, min_scale=4.0), 4.0, marks=pytest.mark.slow),
    ],
    ids=["fixed", "maximum", "minimum"],
)
def test_scale_of_a_checkpoint_is_moved_into_bounds(tmp_path, before, after, scale):
    """The nearest valid scale is used. A fixed scale does not change."""
    for loss_scale in (before, after):
        with tf.Graph().as_default():
            weight = V1.get_variable("w", initializer=1.0)
            opt = LossScaleOptimizer(V1.train.GradientDescentOptimizer(0.0), loss_scale)
            train = opt.minimize(weight * 1.0)
            saver = V1.train.Saver([opt._state().variables["dynamic_scale"].value])
            with tf1.session() as session:
                if loss_scale is before:
                    path = saver.save(session, str(tmp_path / "model.ckpt"))
                    continue
                saver.restore(session, path)
                assert [session.run([train, "tfmixed/loss_scale:0"])[1] for _ in range(2)] == [scale, scale]
                assert session.run(opt._state().read("dynamic_scale")) == scale


class OwnMinimize(V1.train.GradientDescentOptimizer):
    def minimize(self, loss, global_step=None, var_list=None, **named):
        return super().minimize(loss * 2.0, global_step, var_list, **named)


class ClippingMinimize(V1.train.GradientDescentOptimizer):
    def minimize(self, loss, global_step=None):
        pairs = [(tf.clip_by_value(gradient, -2.0, 2.0), weight) for gradient, weight in self.compute_gradients(loss)]
        return self.apply_gradients(pairs, global_step)


@pytest.mark.parametrize("kind", [pytest.param(OwnMinimize, marks=pytest.mark.slow), ClippingMinimize])
def test_optimizer_overrides_minimize(kind):
    """Its own calls scale the loss and skip steps. Afterwards the optimizer is unchanged."""
    with tf.Graph().as_default():
        weight, given = V1.get_variable("w", initializer=1.0), V1.placeholder(tf.float32, [])
        inner = kind(1.0)
        opt, step, before = LossScaleOptimizer(inner), V1.train.get_or_create_global_step(), dict(vars(inner))
        train = opt.minimize(weight * given, step)
        assert vars(inner).keys() == before.keys()
        with tf1.session() as session:
            for number in (1.0 if kind is OwnMinimize else 3.0, np.inf):
                session.run(train, {given: number})
            assert session.run([weight, step, opt.skipped_steps, opt.loss_scale]) == [-1.0, 1, 1, 2.0**14]


class Delegating(V1.train.GradientDescentOptimizer):
    def minimize(self, loss, **named):
        return V1.train.GradientDescentOptimizer(1.0).minimize(loss, **named)


def test_minimize_of_another_optimizer_warns():
    """Its gradients cannot be checked."""
    with tf.Graph().as_default():
        weight = V1.get_variable("w", initializer=1.0)
        with pytest.warns(UserWarning, match="Delegating"):
            LossScaleOptimizer(Delegating(1.0)).minimize(weight * 1.0)


class Clipping(V1.train.GradientDescentOptimizer):
    def compute_gradients(self, loss, *arguments, **named):
        pairs = super().compute_gradients(loss, *arguments, **named)
        return [(tf.clip_by_value(gradient, -1.0, 1.0), variable) for gradient, variable in pairs]


class Around(V1.train.Optimizer):
    def __init__(self, opt):
        super().__init__(False, "Around")
        self.opt = opt

    def compute_gradients(self, *arguments, **named):
        return [(2.0 * gradient, weight) for gradient, weight in self.opt.compute_gradients(*arguments, **named)]

    def apply_gradients(self, *arguments, **named):
        return self.opt.apply_gradients(*arguments, **named)


OWN = {"clips": lambda: Clipping(1.0), "wraps": lambda: Around(Clipping(0.5))}


@pytest.mark.parametrize("kind", ["wraps", pytest.param("clips", marks=pytest.mark.slow)])
def test_optimizer_clips_in_compute_gradients(kind):
    """It clips unscaled gradients and hides no overflow. TensorFlow's method is restored afterwards."""
    plain = V1.train.Optimizer.compute_gradients
    with tf.Graph().as_default():
        weight, given = V1.get_variable("w", initializer=tf.zeros(2)), V1.placeholder(tf.float32, [2])
        opt = LossScaleOptimizer(OWN[kind]())
        train = opt.minimize(tf.reduce_sum(weight * given), V1.train.get_or_create_global_step())
        with tf1.session() as session:
            for numbers in ([0.5, 3.0], [1.0, np.inf], [0.25, 3.0]):
                session.run(train, {given: numbers})
            np.testing.assert_array_equal(session.run(weight), [-0.75, -2.0])
            assert session.run([opt.skipped_steps, opt.loss_scale, V1.train.get_global_step()]) == [1, 2.0**14, 2]
    assert V1.train.Optimizer.compute_gradients is plain


class OwnGradients(V1.train.GradientDescentOptimizer):
    def compute_gradients(self, loss, var_list=None, **named):
        return [(tf.clip_by_value(tf.gradients(loss, [weight])[0], -1.0, 1.0), weight) for weight in var_list]


def test_optimizer_that_calls_tf_gradients_warns():
    """Its loss is not scaled, because it may modify the gradients."""
    with tf.Graph().as_default():
        weight = V1.get_variable("w", initializer=0.0)
        with pytest.warns(UserWarning, match="OwnGradients"):
            train = LossScaleOptimizer(OwnGradients(1.0)).minimize(weight * 0.5, var_list=[weight])
        with tf1.session() as session:
            session.run(train)
            assert session.run(weight) == -0.5


DTYPES = {dtype.name: dtype for dtype in (tf.float16, tf.float32, tf.float64)}


@pytest.mark.parametrize("dtype", tf1.some(["float16"], DTYPES))
def test_grad_loss(dtype):
    """In the dtype of the loss. The scaled loss may have another dtype."""
    with tf.Graph().as_default():
        weight = V1.get_variable("w", initializer=tf.zeros(2))
        opt = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), 128)
        train = opt.minimize(tf.cast(weight, dtype), grad_loss=tf.constant([1.0, 3.0], dtype))
        with tf1.session() as session:
            session.run(train)
            np.testing.assert_array_equal(session.run(weight), [-1.0, -3.0])
