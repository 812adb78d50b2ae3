"""`tfmixed.compat.v1.LossScaleOptimizer` in graphs: rules, checks, variables and control flow."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf1
from tf1 import V1
from thorough import thorough

from tfmixed import scaling
from tfmixed.compat.v1 import (
    DynamicLossScale,
    ExponentialUpdateLossScaleManager,
    FixedLossScale,
    LossScaleOptimizer,
)
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

TRACE = "TTTFTTFFTTTT"
RULE = DynamicScale(initial_scale=8.0, growth_interval=2, min_scale=2.0)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as made:
        yield made


def quadratic(start=(1.0, 2.0), name="w"):
    """Returns a placeholder for gradients, a variable, and a loss with these gradients."""
    given = V1.placeholder(tf.float32, [len(start)], name + "_gradient")
    weight = V1.get_variable(name, initializer=tf.constant(start))
    return given, weight, tf.reduce_sum(weight * given)


def steps(session, train, given, trace, *fetches):
    """Runs one step for each letter of the trace, and returns the values fetched after each step."""
    values = []
    for letter in trace:
        session.run(train, {given: [1.0, 1.0 if letter == "T" else np.inf]})
        values.append(session.run(fetches))
    return values


RULES = {
    "dynamic": RULE,
    "constant": 128.0,
    "logmax": LogMaxScale(max_scale=2.0**20),
    "deepspeed": scaling.like("deepspeed"),
}


@pytest.mark.parametrize("rule", tf1.some(["dynamic"], RULES))
def test_scale_follows_the_simulated_rule(rule):
    """Checks scale, weights and global_step after each step, and the counters at the end."""
    given, weight, loss = quadratic()
    step = V1.train.get_or_create_global_step()
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), rule)
    train = optimizer.minimize(loss, global_step=step)
    with tf1.session() as session:
        values = steps(session, train, given, TRACE, optimizer._state().read("dynamic_scale"), weight, step)
        counters = session.run([optimizer.attempted_steps, optimizer.skipped_steps, optimizer.consecutive_skips])
    scales, weights, numbers = zip(*values, strict=True)
    np.testing.assert_allclose(scales, scaling.simulate(rule, TRACE, [1.0] * len(TRACE)), rtol=1e-5)
    taken = np.cumsum([letter == "T" for letter in TRACE])
    np.testing.assert_array_equal(numbers, taken)
    np.testing.assert_array_equal(np.array(weights)[:, 0], 1.0 - taken)
    assert counters == [12, 3, 0]


@pytest.mark.slow
def test_unchecked_scale_applies_every_step():
    """`skip_nonfinite=False` only multiplies the loss."""
    given, weight, loss = quadratic()
    rule = scaling.ConstantScale(8.0, skip_nonfinite=False)
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), rule)
    train = optimizer.minimize(loss)
    with tf1.session() as session:
        steps(session, train, given, "F")
        np.testing.assert_array_equal(session.run(weight), [0.0, -np.inf])
        assert session.run(optimizer.skipped_steps) == 0


@pytest.mark.parametrize(("letter", "bound"), [("F", 0.0), pytest.param("T", np.inf, marks=pytest.mark.slow)])
def test_the_scale_reaches_neither_0_nor_inf(letter, bound):
    """200 overflows, or 200 finite steps, in a row."""
    given, _, loss = quadratic()
    optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), scaling.like("torch", growth_interval=1))
    train = optimizer.minimize(loss)
    with tf1.session() as session:
        scales = [scale for (scale,) in steps(session, train, given, letter * 200, optimizer.loss_scale)]
        assert np.isfinite(session.run(V1.trainable_variables())).all()
    assert bound not in scales
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("shape", tf1.some(["scalar"], {"scalar": [], "vector": [1], "matrix": [2, 3]}))
def test_non_finite_gradients_of_any_shape_are_skipped(shape):
    """Grappler simplifies comparisons of scalars as if NaN did not exist."""
    weight = V1.get_variable("w", shape, initializer=V1.ones_initializer())
    given = V1.placeholder(tf.float32, [])
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)
    train = optimizer.minimize(tf.reduce_sum(weight * given))
    with tf1.session() as session:
        for value in (np.nan, np.inf, -np.inf):
            session.run(train, {given: value})
        assert session.run(optimizer.skipped_steps) == 3
        np.testing.assert_array_equal(session.run(weight), np.ones(shape))


CLIPS = {
    "by value": lambda gradient: tf.clip_by_value(gradient, -1.0, 1.0),
    "zeros": lambda gradient: tf.where(tf.math.is_finite(gradient), gradient, 0.0),
    "none": lambda gradient: gradient,
}


@pytest.mark.parametrize("clip", tf1.some(["zeros"], CLIPS))
def test_clipping_does_not_hide_an_overflow(clip):
    """Gradients are checked, and their norm is measured, before the script modifies them."""
    given, weight, loss = quadratic()
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)
    pairs = [(clip(gradient), variable) for gradient, variable in optimizer.compute_gradients(loss)]
    train = optimizer.apply_gradients(pairs)
    with tf1.session() as session:
        session.run(train, {given: [1.0, np.inf]})
        np.testing.assert_array_equal(session.run(weight), [1.0, 2.0])
        assert session.run([optimizer.loss_scale, optimizer.skipped_steps]) == [4.0, 1]
        session.run(train, {given: [3.0, 4.0]})
        assert session.run(optimizer.gradient_norm) == pytest.approx(5.0)


def test_modified_gradients_are_checked():
    """A NaN that the script adds skips the step."""
    given, weight, loss = quadratic()
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)
    pairs = [(gradient / tf.zeros_like(gradient), variable) for gradient, variable in optimizer.compute_gradients(loss)]
    train = optimizer.apply_gradients(pairs)
    with tf1.session() as session:
        session.run(train, {given: [1.0, 1.0]})
        np.testing.assert_array_equal(session.run(weight), [1.0, 2.0])


def test_overflow_persists_across_session_runs():
    """Gradients are computed in one run, clipped, and applied in another run."""
    given, weight, loss = quadratic()
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)
    ((gradient, _),) = optimizer.compute_gradients(loss)
    kept = V1.get_variable("kept", initializer=tf.zeros(2), trainable=False)
    add = kept.assign_add(tf.clip_by_value(gradient, -1.0, 1.0))
    train = optimizer.apply_gradients([(kept, weight)])
    with tf1.session() as session:
        for numbers in ([1.0, np.inf], [1.0, 1.0]):
            session.run(add, {given: numbers})
        session.run(train)
        np.testing.assert_array_equal(session.run(weight), [1.0, 2.0])
        session.run(add, {given: [1.0, 1.0]})
        session.run(train)
        assert session.run(optimizer.skipped_steps) == 1


def test_a_norm_that_float32_cannot_hold_is_an_overflow():
    """The step is skipped, even with clipping."""
    given, weight, loss = quadratic()
    optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(0.5), 1.0)
    pairs = optimizer.compute_gradients(loss)
    train = optimizer.apply_gradients(
        [(tf.clip_by_value(gradient, -1.0, 1.0), variable) for gradient, variable in pairs]
    )
    with tf1.session() as session:
        session.run(train, {given: [1e30, 1.0]})
        assert session.run(optimizer.skipped_steps) == 1
        np.testing.assert_array_equal(session.run(weight), [1.0, 2.0])


@pytest.mark.slow
def test_float16_limits_apply_to_the_applied_gradients():
    """Adam can square the clipped gradients in float16, but not the unclipped ones."""
    for clip, skipped in ((lambda gradient: tf.clip_by_value(gradient, -1.0, 1.0), 0), (lambda gradient: gradient, 1)):
        with tf.Graph().as_default(), tf1.session() as session:
            weight = V1.get_variable("w", initializer=tf.constant([1.0, 2.0], tf.float16))
            optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(0.5), 1.0)
            pairs = optimizer.compute_gradients(tf.reduce_sum(1000.0 * tf.cast(weight, tf.float32)))
            train = optimizer.apply_gradients([(clip(gradient), variable) for gradient, variable in pairs])
            session.run(V1.global_variables_initializer())
            session.run(train)
            assert session.run(optimizer.skipped_steps) == skipped
            assert np.isfinite(session.run(optimizer.variables())[1]).all()


def test_sparse_gradients_stay_sparse():
    """Only the gathered rows change."""
    table = V1.get_variable("table", initializer=tf.ones((6, 2)))
    rows = V1.placeholder(tf.int32, [None])
    optimizer = LossScaleOptimizer(V1.train.MomentumOptimizer(1.0, 0.9), RULE)
    pairs = optimizer.compute_gradients(tf.reduce_sum(tf.gather(table, rows)))
    assert isinstance(pairs[0][0], tf.IndexedSlices)
    train = optimizer.apply_gradients(pairs)
    with tf1.session() as session:
        session.run(train, {rows: [1, 1, 4]})
        np.testing.assert_array_equal(session.run(table)[:, 0], [1, -1, 1, 1, 0, 1])


@pytest.mark.slow
def test_overflow_in_one_tower_skips_the_step():
    """The gradients are clipped before they are averaged."""
    given = [V1.placeholder(tf.float32, [2]) for _ in range(2)]
    weight = V1.get_variable("w", initializer=tf.constant([1.0, 2.0]))
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)
    towers = []
    for number, factor in enumerate(given):
        with V1.name_scope(f"tower_{number}"):
            towers.append(optimizer.compute_gradients(tf.reduce_sum(weight * factor)))
    mean = tf.add_n([tf.clip_by_value(tower[0][0], -1.0, 1.0) for tower in towers]) / 2.0
    train = optimizer.apply_gradients([(mean, weight)])
    with tf1.session() as session:
        for bad, skipped in ((None, 0), (0, 1), (1, 2)):
            feed = {factor: [1.0, np.inf if number == bad else 1.0] for number, factor in enumerate(given)}
            session.run(train, feed)
            assert session.run(optimizer.skipped_steps) == skipped
        np.testing.assert_array_equal(session.run(weight), [0.0, 1.0])


def test_attributes_of_the_wrapped_optimizer_are_available():
    """Slots and their names, the learning rate, and variables."""
    _, weight, loss = quadratic()
    inner = V1.train.AdamOptimizer(0.25)
    optimizer = LossScaleOptimizer(inner)
    optimizer.minimize(loss)
    assert optimizer.get_slot_names() == ["m", "v"]
    assert optimizer.get_slot(weight, "m") is inner.get_slot(weight, "m") is not None
    assert (optimizer._lr, optimizer.get_name()) == (0.25, "Adam")
    assert {variable.name for variable in inner.variables()} < {variable.name for variable in optimizer.variables()}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = optimizer.nonsense


def test_sync_replicas_is_refused_with_the_reason():
    """As the wrapped and as the wrapping optimizer. It would hang at the first skipped step."""
    _, _, loss = quadratic()
    inner, step = V1.train.GradientDescentOptimizer(1.0), V1.train.get_or_create_global_step()
    synchronous = V1.train.SyncReplicasOptimizer(LossScaleOptimizer(inner), 1)
    with pytest.raises(NotImplementedError, match="forever"):
        synchronous.minimize(loss, global_step=step)
    synchronous = V1.train.SyncReplicasOptimizer(inner, 1)
    with pytest.raises(NotImplementedError, match="forever"):
        LossScaleOptimizer(synchronous)


@pytest.mark.parametrize("limit", [0, 2.5, True])
def test_invalid_max_consecutive_skips(limit):
    """Zero, a fraction and a boolean."""
    with pytest.raises(ValueError, match="max_consecutive_skips"):
        LossScaleOptimizer(V1.train.AdamOptimizer(), max_consecutive_skips=limit)


@pytest.mark.parametrize("wrapped", [object(), tf.keras.optimizers.SGD(), LossScaleOptimizer(V1.train.AdamOptimizer())])
def test_invalid_optimizer(wrapped):
    """Not a TensorFlow 1 optimizer, or one that scales the loss itself."""
    with pytest.raises(ValueError, match="opt"):
        LossScaleOptimizer(wrapped)


class OwnScale(V1.mixed_precision.LossScale):
    def __call__(self):
        return tf.constant(1.0)

    def update(self, grads):
        return tf.no_op(), True

    def get_config(self):
        return {}


class OwnManager(ExponentialUpdateLossScaleManager):
    def update_loss_scale(self, finite_grads):
        return tf.no_op()


NO_SCALES = [
    None,
    "static",
    -1,
    OwnScale(),
    OwnManager(8.0, 100),
    DynamicLossScale,
    V1.mixed_precision.DynamicLossScale,
]


@pytest.mark.parametrize("loss_scale", NO_SCALES)
def test_invalid_loss_scale(loss_scale):
    """Includes classes, and objects with an update of their own."""
    with pytest.raises(ValueError, match="loss_scale"):
        LossScaleOptimizer(V1.train.AdamOptimizer(), loss_scale)


def test_no_gradients():
    """All gradients are None."""
    weight = V1.get_variable("w", initializer=1.0)
    with pytest.raises(ValueError, match="grads_and_vars"):
        LossScaleOptimizer(V1.train.AdamOptimizer()).apply_gradients([(None, weight)])


LOSS_SCALES = {
    "number": (64, ConstantScale(64)),
    "dynamic": ("dynamic", DynamicScale()),
    "rule": (RULE, RULE),
    "fixed": (FixedLossScale(64), ConstantScale(64)),
    "ours": (DynamicLossScale(64, 3, 4), scaling.like("tf1", initial_scale=64.0, growth_interval=3, factor=4.0)),
}


@pytest.mark.parametrize(("loss_scale", "rule"), LOSS_SCALES.values(), ids=LOSS_SCALES)
def test_loss_scale_argument(loss_scale, rule):
    """Each kind of argument becomes a rule."""
    optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), loss_scale)
    assert optimizer.rule == rule


OBJECTS = {
    "fixed": V1.mixed_precision.FixedLossScale,
    "dynamic": V1.mixed_precision.DynamicLossScale,
    "experimental": V1.train.experimental.DynamicLossScale,
}


@pytest.mark.parametrize("make", tf1.some(["dynamic"], OBJECTS))
def test_loss_scale_objects_of_tensorflow_follow_the_scale(make):
    """Scripts call the object to read the scale."""
    given, _, loss = quadratic()
    theirs = make(8.0)
    optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), theirs)
    train, scale = optimizer.minimize(loss), tf.identity(theirs())
    with tf1.session() as session:
        values = steps(session, train, given, "TFF", scale, optimizer.loss_scale)
    assert values == ([(8.0, 8.0), (4.0, 4.0), (2.0, 2.0)] if make is not OBJECTS["fixed"] else [(8.0, 8.0)] * 3)


def test_loss_scale_object_is_shared():
    """Two optimizers share the scale of one object, which can be called before they exist."""
    given, _, loss = quadratic()
    scale = DynamicLossScale(8.0)
    before = tf.identity(scale(), name="loss_scale")
    first, second = (LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), scale) for _ in range(2))
    train = first.minimize(loss)
    with tf1.session() as session:
        values = steps(session, train, given, "F", "loss_scale:0", before, first.loss_scale, second.loss_scale)
    assert values == [(4.0, 4.0, 4.0, 4.0)]


def test_scale_tensor_has_a_fixed_name():
    """The tensor holds the scale of the step in the same run."""
    given, _, loss = quadratic()
    train = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE).minimize(loss)
    with tf1.session() as session:
        scales = [session.run([train, "tfmixed/loss_scale:0"], {given: [1.0, np.inf]})[1] for _ in range(3)]
    assert scales == [8.0, 4.0, 2.0]


@pytest.mark.slow
def test_one_optimizer_serves_several_graphs():
    """Each graph has its own variables, created on first use."""
    optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), RULE)
    assert V1.global_variables() == []
    for letters in ("F", "FF"):
        with tf.Graph().as_default():
            given, _, loss = quadratic()
            train = optimizer.minimize(loss)
            with tf1.session() as session:
                steps(session, train, given, letters)
                assert session.run(optimizer.skipped_steps) == len(letters)


def test_a_loss_in_float16_is_scaled_in_float32():
    """2**15 * 4 exceeds float16."""
    weight = V1.get_variable("w", initializer=tf.constant(4.0))
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0))
    train = optimizer.minimize(tf.cast(weight, tf.float16))
    with tf1.session() as session:
        session.run(train)
        assert session.run([weight, optimizer.skipped_steps]) == [3.0, 0]


@pytest.mark.slow
def test_variables_of_half_precision_and_double():
    """Each variable gets gradients in its own dtype."""
    kinds = [tf.float16, tf.float32, tf.float64]
    weights = [V1.get_variable(kind.name, initializer=tf.constant(2.0, kind)) for kind in kinds]
    loss = tf.add_n([tf.cast(weight, tf.float32) for weight in weights])
    train = LossScaleOptimizer(V1.train.MomentumOptimizer(1.0, 0.9), 128).minimize(loss)
    with tf1.session() as session:
        session.run(train)
        assert session.run(weights) == [1.0, 1.0, 1.0]


INNER = {
    "GradientDescent": V1.train.GradientDescentOptimizer(0.1),
    "Momentum": V1.train.MomentumOptimizer(0.1, 0.9),
    "Adam": V1.train.AdamOptimizer(0.1),
    "Adagrad": V1.train.AdagradOptimizer(0.1),
    "AdagradDA": V1.train.AdagradDAOptimizer,
    "Adadelta": V1.train.AdadeltaOptimizer(1.0),
    "RMSProp": V1.train.RMSPropOptimizer(0.1, centered=True),
    "Ftrl": V1.train.FtrlOptimizer(0.1),
    "ProximalGradientDescent": V1.train.ProximalGradientDescentOptimizer(0.1),
    "ProximalAdagrad": V1.train.ProximalAdagradOptimizer(0.1),
}


@pytest.mark.parametrize("name", tf1.some(["Adam"], {name: name for name in INNER}))
def test_results_equal_those_of_the_wrapped_optimizer(name):
    """The weights, and the names of variables and operations, are those of a float32 run."""
    runs = []
    for wrap in (lambda opt: opt, lambda opt: LossScaleOptimizer(opt, 1024)):
        with tf.Graph().as_default():
            given, weight, loss = quadratic()
            step = V1.train.get_or_create_global_step()
            inner = INNER[name]
            optimizer = wrap(inner(0.1, step) if callable(inner) else inner)
            with V1.name_scope("training"):
                train = optimizer.minimize(loss, global_step=step)
            names = {variable.name for variable in V1.global_variables() if not variable.name.startswith("tfmixed")}
            with tf1.session() as session:
                runs.append((names, steps(session, train, given, "TTT", weight)))
            assert [operation.name for operation in V1.get_collection(V1.GraphKeys.TRAIN_OP)] == [
                f"training/{train_name(train)}"
            ]
    assert runs[0][0] == runs[1][0]
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-5)


def train_name(train):
    return train.name.split("/")[-1]


class OwnSlots(V1.train.Optimizer):
    """Creates variables in `apply_gradients`, with tensors as initial values."""

    def __init__(self):
        super().__init__(False, "OwnSlots")

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        updates = []
        for gradient, weight in grads_and_vars:
            drawn = tf.random.normal(weight.shape, seed=1)
            first = tf.Variable(drawn / tf.norm(drawn), trainable=False, name="first")
            second = V1.get_variable("second", initializer=drawn + tf.zeros_like(weight), trainable=False)
            updates += [weight.assign_sub(0.1 * gradient + first), second.assign(drawn)]
        return tf.group(*updates, name=name)


START_WITH_TENSORS = """
import sys
import numpy as np
import tensorflow as tf
V1 = tf.compat.v1
getattr(V1, sys.argv[1])()
import test_v1_optimizer as tests
from tfmixed.compat.v1 import LossScaleOptimizer

runs = []
for wrap in (lambda opt: opt, LossScaleOptimizer):
    with tf.Graph().as_default():
        V1.set_random_seed(1)
        given, weight, loss = tests.quadratic()
        train = wrap(tests.OwnSlots()).minimize(loss)
        own = {v.name: v for v in V1.global_variables() if not v.name.startswith("tfmixed")}
        with tests.tf1.session() as session:
            first, second = session.run([own["first:0"], own["second:0"]])
            np.testing.assert_allclose(first, second / np.linalg.norm(second), rtol=1e-5)
            session.run(train, {given: [1.0, 1.0]})
            runs.append((set(own), session.run(weight) + first))
assert runs[0][0] == runs[1][0]
np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-5)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("switch", ["disable_v2_behavior", "disable_eager_execution"])
def test_optimizer_variables_with_tensors_as_initial_values(switch):
    """Two variables with the same initial tensor are equal, and have the names of a float32 run."""
    tf1.script(START_WITH_TENSORS, switch)


@pytest.mark.slow
def test_monitored_session_resumes(tmp_path):
    """Weights, scale and counters are restored from its own checkpoints."""
    values = []
    for _ in range(2):
        with tf.Graph().as_default():
            given, weight, loss = quadratic()
            step = V1.train.get_or_create_global_step()
            optimizer = LossScaleOptimizer(V1.train.AdamOptimizer(), RULE)
            train = optimizer.minimize(loss, global_step=step)
            fetches = [weight, step, optimizer.loss_scale, optimizer.attempted_steps]
            with V1.train.MonitoredTrainingSession(checkpoint_dir=str(tmp_path), log_step_count_steps=None) as session:
                values.append(session.run(fetches))
                for letter in "TF":
                    session.run(train, {given: [1.0, 1.0 if letter == "T" else np.inf]})
                values.append(session.run(fetches))
    assert values[0][1:] == [0, 8.0, 0]
    for before, after in zip(values[1], values[2], strict=True):
        np.testing.assert_array_equal(before, after)
    assert values[3][1:] == [2, 2.0, 4]


def test_properties_of_a_finalized_graph(graph):
    """Reading them creates no operations."""
    given, _, loss = quadratic()
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(1.0), RULE)
    train = optimizer.minimize(loss)
    with tf1.session() as session:
        graph.finalize()
        session.run(train, {given: [1.0, np.inf]})
        names = ("loss_scale", "attempted_steps", "skipped_steps", "consecutive_skips")
        assert session.run([getattr(optimizer, name) for name in names]) == [4.0, 1, 1, 1]


def test_a_loop_within_the_graph_trains():
    """Each iteration uses the scale of the previous one."""
    weight = V1.get_variable("w", initializer=[1.0, 2.0])
    optimizer = LossScaleOptimizer(V1.train.GradientDescentOptimizer(0.5), RULE)

    def iteration(number):
        factor = tf.where(number < 2, np.float32(np.inf), 1.0)
        train = optimizer.minimize(tf.reduce_sum(weight.read_value() * factor), var_list=[weight])
        with V1.control_dependencies([train]):
            return number + 1

    loop = tf.while_loop(lambda number: number < 5, iteration, [0])
    with tf1.session() as session:
        session.run(loop)
        np.testing.assert_array_equal(session.run(weight), [-0.5, 0.5])
        assert session.run([optimizer.loss_scale, optimizer.skipped_steps]) == [4.0, 2]


OLD_BEHAVIOR = """
import sys
import numpy as np
import tensorflow as tf
V1 = tf.compat.v1
getattr(V1, sys.argv[1])()
import tf1
from tfmixed.compat.v1 import LossScaleOptimizer

names, losses = [], []
for wrap in (lambda opt: opt, LossScaleOptimizer):
    with tf.Graph().as_default():
        x, y, loss = tf1.network()
        step = V1.train.get_or_create_global_step()
        optimizer = wrap(V1.train.AdamOptimizer(0.05))
        with V1.name_scope("training"):
            train = optimizer.minimize(loss, global_step=step)
        names.append({variable.name for variable in V1.global_variables() if "tfmixed" not in variable.name})
        with tf1.session() as session:
            for _ in range(30):
                session.run(train, {x: tf1.X, y: tf1.Y})
            losses.append(session.run(loss, {x: tf1.X, y: tf1.Y}))
            if wrap is LossScaleOptimizer:
                session.run(train, {x: tf1.X * np.inf, y: tf1.Y})
                print(session.run([step, optimizer.skipped_steps, optimizer.loss_scale]))
assert names[0] == names[1], names
np.testing.assert_allclose(*losses, rtol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["disable_v2_behavior", pytest.param("disable_eager_execution", marks=thorough)])
def test_under_the_behavior_of_tensorflow_1(switch):
    """Reference variables and TensorFlow 1 conditionals: same training, same names as in float32."""
    numbers = tf1.script(OLD_BEHAVIOR, switch)
    assert "30" in numbers
    assert "16384.0" in numbers
