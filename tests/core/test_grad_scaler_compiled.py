"""`GradScaler` in compiled functions, on replicas, with TensorFlow 1's optimizers and in `fit`."""

from __future__ import annotations

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import mirrored
from thorough import mostly_slow

from tfmixed import GradScaler, records, scaling
from tfmixed.callbacks import LossScaleLogger
from tfmixed.records import ScaleChange
from tfmixed.scaling import DynamicScale, LogMaxScale

RULE = DynamicScale(initial_scale=8.0, growth_interval=2)
TRACE = "TTFTFFTTT"
slow = pytest.mark.slow


class Loop:
    """An iteration in parts. The gradient is 1, or infinite in one place if the step is bad."""

    def __init__(self, rule=RULE, optimizer=None, weight=None):
        self.scaler = GradScaler(rule=rule)
        self.optimizer, self.second = optimizer or keras.optimizers.Adam(0.1), keras.optimizers.SGD()
        self.weight = keras.Variable([1.0, 2.0], name="w") if weight is None else weight

    def scaled(self, bad):
        x = tf.convert_to_tensor([1.0, 1.0])
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = self.scaler.scale(tf.reduce_sum(x) * tf.where(bad, np.inf, 1.0))
        return tape.gradient(loss, [x])

    def unscale(self, grads):
        return [tf.clip_by_value(gradient, -1.0, 1.0) for gradient in self.scaler.unscale(self.optimizer, grads)]

    def step(self, grads):
        return self.scaler.step(self.optimizer, zip(grads, [self.weight], strict=True))

    def update(self):
        self.scaler.update()

    def run(self, iteration, trace=TRACE):
        scales = []
        for letter in trace:
            assert bool(iteration(tf.constant(letter == "F"))) is (letter == "T")
            scales.append(self.scaler.get_scale())
        return scales


def eager(function):
    return function


def jit(function):
    return tf.function(function, jit_compile=True)


# How scale to step (with unscale or not), its parts, update, and the whole iteration are compiled.
PATTERNS = {
    "eager": (eager, eager, eager, eager, eager),
    "whole": (eager, eager, eager, eager, tf.function),
    "whole jit": (eager, eager, eager, eager, jit),
    "step": (eager, eager, tf.function, eager, eager),
    "gradients": (tf.function, eager, eager, eager, eager),
    "unscale": (eager, tf.function, eager, eager, eager),
    "unscale jit, step": (eager, jit, tf.function, eager, eager),
    "unscale, update": (eager, tf.function, eager, tf.function, eager),
    "update": (eager, eager, eager, tf.function, eager),
    "update jit": (eager, eager, eager, jit, eager),
    "parts": (tf.function,) * 4 + (eager,),
    "parts, nested": (tf.function,) * 5,
}
UNSCALES = {"step only": False, "unscale": True}


@pytest.mark.parametrize(
    ("pattern", "unscales"),
    mostly_slow({"whole-unscale", "parts-unscale"}, PATTERNS, UNSCALES),
)
def test_any_part_may_be_compiled(pattern, unscales):
    """Scale, counters, events and weights are those of the eager loop, without a false error."""
    loop, (of_gradients, of_unscale, of_step, of_update, of_all) = Loop(), pattern
    gradients, step, update = of_gradients(loop.scaled), of_step(loop.step), of_update(loop.update)
    unscale = of_unscale(loop.unscale) if unscales else eager

    def iteration(bad):
        stepped = step(unscale(gradients(bad)))
        update()
        return stepped

    assert loop.run(of_all(iteration)) == scaling.simulate(RULE, TRACE)
    assert (int(loop.scaler.attempted_steps), int(loop.scaler.skipped_steps)) == (9, 3)
    np.testing.assert_allclose(loop.weight.numpy(), [0.4, 1.4], rtol=1e-4)
    overflows = [event for event in loop.scaler.drain_events() if event.reason == "overflow"]
    assert [(event.step, event.variable) for event in overflows] == [(2, "w"), (4, "w"), (5, "w")]


RULES = {"constant": 128, "logmax": LogMaxScale(max_scale=2.0**20), "deepspeed": scaling.like("deepspeed")}


@pytest.mark.parametrize("rule", mostly_slow({"logmax"}, RULES))
def test_any_rule_in_a_compiled_loop(rule):
    """The scale follows `simulate`."""
    loop = Loop(rule)

    @tf.function
    def iteration(bad):
        stepped = loop.step(loop.scaled(bad))
        loop.update()
        return stepped

    np.testing.assert_allclose(loop.run(iteration), scaling.simulate(loop.scaler.rule, TRACE, [1.0] * 9), rtol=1e-5)


@slow
def test_a_compiled_loop_of_many_iterations():
    """Unrolled and in a while loop, and traced again for another shape."""
    loop = Loop()

    @tf.function
    def many(bad):
        for index in range(2):
            loop.step(loop.scaled(bad[index]))
            loop.scaler.update()
        for index in tf.range(2, tf.shape(bad)[0]):
            loop.step(loop.unscale(loop.scaled(bad[index])))
            loop.scaler.update()

    for count in (4, 9):
        many(tf.constant([letter == "F" for letter in TRACE[:count]]))
    assert loop.scaler.get_scale() == scaling.simulate(RULE, TRACE[:4] + TRACE)[-1]


def test_a_compiled_update_within_an_unrolled_loop():
    """A function that is traced once may update each time it is called, which is not reported as a missing update."""
    loop = Loop()
    update = tf.function(loop.update)

    @tf.function
    def twice(bad):
        for _ in range(2):
            loop.step(loop.unscale(loop.scaled(bad)))
            update()

    twice(tf.constant(True))
    assert (loop.scaler.get_scale(), int(loop.scaler.skipped_steps)) == (2.0, 2)


@slow
def test_an_update_compiled_before_an_optimizer_joined():
    """It counts the overflows of that optimizer too."""
    first, second = Loop(), Loop(weight=keras.Variable([1.0, 2.0], name="late"))
    second.scaler = first.scaler
    update = tf.function(first.update)
    steps = [tf.function(lambda bad, loop=loop: loop.step(loop.unscale(loop.scaled(bad)))) for loop in (first, second)]
    steps[0](tf.constant(False))
    update()
    for _ in range(2):
        assert steps[0](tf.constant(False))
        assert not steps[1](tf.constant(True))
        update()
    assert first.scaler.get_scale() == 2.0
    assert [event.variable for event in first.scaler.drain_events()] == ["late", "late"]


@slow
def test_functions_compiled_before_an_optimizer_got_more_variables():
    """They still count their overflows, and an exhausted scale names the variables of all."""
    scaler, optimizer = GradScaler(rule=DynamicScale(initial_scale=1.0)), keras.optimizers.SGD()
    weights = [keras.Variable([1.0], name=name) for name in "ab"]
    optimizer.build(weights)

    def compiled(weight):
        return tf.function(lambda: scaler.step(optimizer, [(tf.constant([np.nan]), weight)]))

    steps = [compiled(weight) for weight in weights]
    for number in (0, 1, 0, 0):
        steps[number]()
        scaler.update()
    assert scaler._overflow_counts() == {"a": 3, "b": 1}


def step_twice(loop, bad):
    loop.step(loop.scaled(bad))
    loop.step(loop.scaled(bad))


def unscale_twice(loop, bad):
    loop.unscale(loop.scaled(bad))
    loop.unscale(loop.scaled(bad))


def unscale_after_step(loop, bad):
    loop.step(loop.scaled(bad))
    loop.unscale(loop.scaled(bad))


def still_scaled(loop, bad):
    grads = loop.scaled(bad)
    loop.unscale(grads)
    loop.step(grads)


def step_after_update(loop, bad):
    grads = loop.unscale(loop.scaled(bad))
    loop.update()
    loop.step(grads)
    loop.update()


def step_after_update_and_scale(loop, bad):
    grads = loop.scaler.unscale(loop.optimizer, loop.scaled(bad))
    loop.update()
    loop.scaled(bad)
    loop.step(grads)


def update_twice(loop, bad):
    loop.step(loop.scaled(bad))
    loop.update()
    loop.update()


def unscale_twice_with_another_in_between(loop, bad):
    loop.unscale(loop.scaled(bad))
    loop.scaler.unscale(loop.second, loop.scaled(bad))
    loop.unscale(loop.scaled(bad))


def step_of_another_optimizer(loop, bad):
    loop.step(loop.scaler.unscale(loop.second, loop.scaled(bad)))


WRONG = {
    step_twice: "twice",
    unscale_twice: "unscaled already",
    unscale_twice_with_another_in_between: "unscaled already",
    unscale_after_step: "stepped already",
    still_scaled: "still scaled",
    step_after_update: "earlier iteration",
    step_after_update_and_scale: "another iteration",
    update_twice: "without",
    step_of_another_optimizer: "another optimizer",
}


@pytest.mark.parametrize(("calls", "message"), WRONG.items(), ids=[calls.__name__ for calls in WRONG])
def test_a_wrong_order_in_a_compiled_function_is_an_error(calls, message):
    """While the function is traced."""
    loop = Loop()
    with pytest.raises(RuntimeError, match=message):
        tf.function(lambda bad: calls(loop, bad))(tf.constant(False))


def test_a_wrong_order_of_compiled_functions_is_reported_eagerly():
    """The device knows what compiled functions did. A compiled `update` without a step does nothing."""
    loop = Loop()
    step, update = tf.function(loop.step), tf.function(loop.update)
    step(loop.scaled(tf.constant(False)))
    with pytest.raises(RuntimeError, match="twice"):
        loop.step(loop.scaled(tf.constant(False)))
    update()
    with pytest.raises(RuntimeError, match="without"):
        loop.update()
    update()
    assert (int(loop.scaler.attempted_steps), loop.scaler.state_dict()["_growth_tracker"]) == (1, 1)
    for _ in range(2):
        step(loop.scaled(tf.constant(False)))
    with pytest.raises(RuntimeError, match="in compiled functions"):
        loop.update()
    loop.scaler.update(8.0)
    step(loop.scaled(tf.constant(False)))
    loop.update()


def test_only_the_step_after_unscale_takes_unscaled_gradients():
    """A second compiled step, which cannot be an error, divides its gradients by the scale."""
    loop = Loop(optimizer=keras.optimizers.SGD(1.0))
    step = tf.function(loop.step)
    step(loop.unscale(loop.scaled(tf.constant(False))))
    step(loop.scaled(tf.constant(False)))
    np.testing.assert_array_equal(loop.weight.numpy(), [-1.0, 0.0])


def test_a_function_called_between_unscale_and_step():
    """It is not taken for an update."""
    loop, look = Loop(), tf.function(tf.linalg.global_norm)

    @tf.function
    def iteration(bad):
        grads = loop.scaler.unscale(loop.optimizer, loop.scaled(bad))
        look(grads)
        return loop.step(grads)

    for _ in range(2):
        assert iteration(tf.constant(False))
        loop.update()
    np.testing.assert_allclose(loop.weight.numpy(), [0.8, 1.8], rtol=1e-4)


def test_a_graph_for_a_session_is_an_error():
    """It would not run what `step` and `update` write."""
    for call in (lambda scaler: scaler.scale(1.0), lambda scaler: scaler.update(), lambda scaler: scaler.get_scale()):
        with tf.Graph().as_default(), pytest.raises(NotImplementedError, match="compat"):
            call(GradScaler())


def test_a_checkpoint_of_tensorflow(tmp_path):
    """Restores the list of variables."""
    scales = []
    for trace in ("TTTF", ""):
        loop = Loop()
        checkpoint = tf.train.Checkpoint(scaler=[variable.value for variable in loop.scaler.variables])
        if trace:
            loop.run(lambda bad, loop=loop: (loop.step(loop.scaled(bad)), loop.update())[0], trace)
            path = checkpoint.save(tmp_path / "checkpoint")
        else:
            checkpoint.restore(path).assert_consumed()
        scales.append((loop.scaler.state_dict(), loop.scaler.get_scale()))
    assert scales[0] == scales[1]


def test_a_compiled_update_takes_the_nearest_scale_within_bounds():
    """A tensor cannot be checked there. NaN changes nothing."""
    loop = Loop()
    update = tf.function(loop.scaler.update)
    for value, wanted in ((64.0, 64.0), (np.inf, 2.0**24), (0.0, 1.0), (np.nan, 1.0)):
        before = loop.scaler.get_scale()
        loop.step(loop.scaled(tf.constant(False)))
        update(tf.constant(value))
        assert loop.scaler.get_scale() == wanted
        events = [(event.old_scale, event.new_scale, event.reason) for event in loop.scaler.drain_events()]
        assert events == ([] if wanted == before else [(before, wanted, "set")])


def test_get_scale_in_a_graph():
    """A tensor of the present scale, not a constant."""
    loop, scale = Loop(), tf.function(lambda: loop.scaler.get_scale())
    assert float(scale()) == 8.0
    loop.step(loop.scaled(tf.constant(True)))
    loop.update()
    assert float(scale()) == 4.0


def test_another_rule_cannot_be_loaded_after_compiling():
    """The old rule is part of the compiled functions."""
    loop = Loop()
    saved, default = GradScaler(rule=RULE).state_dict(), GradScaler().state_dict()
    loop.scaler.scale(1.0)
    loop.scaler.load_state_dict(default)
    assert loop.scaler.get_scale() == 65536.0
    tf.function(loop.scaler.scale)(1.0)
    with pytest.raises(RuntimeError, match="state_dict"):
        loop.scaler.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="growth_factor"):
        loop.scaler.set_growth_factor(4.0)
    assert loop.scaler.get_scale() == 65536.0


def test_a_dataset_that_ends_within_a_step():
    """Counts no step and no skip, and the next epoch is unaffected."""
    loop = Loop()

    @tf.function
    def iteration(iterator):
        grads = loop.scaled(next(iterator))
        loop.step(loop.unscale(grads))
        loop.scaler.update()

    data = tf.data.Dataset.from_tensor_slices([False, True]).repeat(1)
    for _ in range(2):
        iterator = iter(data)
        for _ in range(2):
            iteration(iterator)
        with pytest.raises(tf.errors.OutOfRangeError):
            iteration(iterator)
    assert loop.step(loop.scaled(tf.constant(False)))
    loop.update()
    assert (int(loop.scaler.attempted_steps), int(loop.scaler.skipped_steps)) == (5, 2)


MODES = {"eager": eager, "function": tf.function}
TF1 = {
    "adam": lambda: tf.compat.v1.train.AdamOptimizer(0.1),
    "momentum": lambda: tf.compat.v1.train.MomentumOptimizer(0.1, 0.9),
    "descent": lambda: tf.compat.v1.train.GradientDescentOptimizer(0.1),
}
VARIABLES = {"tf variable": tf.Variable, "keras variable": keras.Variable}


@pytest.mark.parametrize(
    ("make", "variable", "mode"),
    mostly_slow({"momentum-keras variable-eager", "adam-tf variable-function"}, TF1, VARIABLES, MODES),
)
def test_optimizers_of_tensorflow_1(make, variable, mode):
    """Weights and slots are those of a run without the bad steps. Options of `apply_gradients` are passed on."""
    results = []
    for trace in ("TFTFT", "TTT"):
        count = tf.Variable(0, dtype=tf.int64)
        loop = Loop(optimizer=make(), weight=variable([1.0, 2.0]))

        def step(bad, loop=loop, count=count):
            pairs = zip(loop.scaled(bad), [loop.weight], strict=True)
            return loop.scaler.step(loop.optimizer, pairs, global_step=count)

        compiled = mode(step)

        def iteration(bad, loop=loop, compiled=compiled):
            stepped = compiled(bad)
            loop.update()
            return stepped

        loop.run(iteration, trace)
        assert count.numpy() == 3
        results += [loop.weight.numpy(), *(slot.numpy() for slot in loop.optimizer.variables())]
    half = len(results) // 2
    for ours, wanted in zip(results[:half], results[half:], strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_the_loss_scale_optimizer_of_tensorflow_1_is_an_error():
    """It scales and unscales by itself, although no method tells."""
    wrapper = tf.compat.v1.mixed_precision.MixedPrecisionLossScaleOptimizer(TF1["descent"](), "dynamic")
    loop = Loop(optimizer=wrapper)
    with pytest.raises(ValueError, match="must not scale"):
        loop.step(loop.scaled(tf.constant(False)))


def test_a_norm_that_float32_cannot_hold_is_an_overflow():
    """For each kind of optimizer, with unscale and without."""
    for make in (TF1["adam"], TF1["descent"], lambda: keras.optimizers.SGD(0.1)):
        loop = Loop(1.0, make(), tf.Variable([1.0, 2.0]) if make in TF1.values() else None)
        before = loop.weight.numpy()
        assert not loop.step([tf.constant([1e30, 1.0])])
        loop.update()
        assert not loop.step(loop.scaler.unscale(loop.optimizer, [tf.constant([1e30, 1.0])]))
        np.testing.assert_array_equal(loop.weight.numpy(), before)


@slow
def test_a_constructor_creates_no_tensor():
    """Logical devices can still be configured after it."""
    code = """
import tensorflow as tf, tfmixed
tfmixed.GradScaler()
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
print("fine")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert run.stdout.split() == ["fine"], run.stderr[-2000:]


class Trained(keras.Model):
    """A model whose `train_step` uses a scaler."""

    def __init__(self, scaler):
        super().__init__()
        self.scaler, self.dense = scaler, keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            scaled = self.scaler.scale(loss)
        grads = self.scaler.unscale(self.optimizer, tape.gradient(scaled, self.trainable_variables))
        self.scaler.step(self.optimizer, zip(grads, self.trainable_variables, strict=True))
        self.scaler.update()
        return {"loss": loss}


@pytest.mark.parametrize("steps_per_execution", [4, pytest.param(1, marks=slow)])
def test_fit_with_a_custom_train_step(tmp_path, steps_per_execution):
    """The logger logs each change with its exact step."""
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    x[5 * 4] = np.inf
    scaler, path = GradScaler(rule=DynamicScale(initial_scale=8.0, growth_interval=4)), tmp_path / "log.jsonl"
    model = Trained(scaler)
    model.compile("adam", loss="mse", steps_per_execution=steps_per_execution)
    logger = LossScaleLogger(path, verbose=0).watch(scaler)
    history = model.fit(x, x[:, :1], batch_size=4, shuffle=False, verbose=0, callbacks=[logger]).history
    rule, trace = scaler.rule, "".join("F" if number == 5 else "T" for number in range(16))
    scales = [8.0, *scaling.simulate(rule, trace)]
    changes = [number for number in range(16) if scales[number] != scales[number + 1]]
    logged = [record for record in records.read_log(path) if isinstance(record, ScaleChange)]
    assert [event.step for event in logged] == changes
    assert logged[1].variable == model.dense.kernel.path
    assert (history["loss_scale"], history["skipped_steps"]) == ([scales[-1]], [1.0])


# Replicas.


@pytest.fixture(scope="module")
def strategy():
    return mirrored()


UPDATES = {name: name for name in ("in replicas", "outside", "compiled outside")}
KINDS = {name: name for name in ("keras", "built", "tf1")}


@pytest.mark.parametrize(
    ("mode", "update", "kind", "unscales"),
    mostly_slow(
        {"function-in replicas-keras-unscale", "function-outside-tf1-step only"}, MODES, UPDATES, KINDS, UNSCALES
    ),
)
def test_replicas_step_together(strategy, mode, update, kind, unscales):
    """An overflow on the second replica alone: both skip, the scale backs off once, weights stay identical."""
    with strategy.scope():
        is_tf1 = kind == "tf1"
        weight = tf.Variable([1.0, 2.0], name="w") if is_tf1 else keras.Variable([1.0, 2.0], name="w")
        loop = Loop(optimizer=TF1["adam"]() if is_tf1 else keras.optimizers.Adam(0.1), weight=weight)
        if kind == "built":
            loop.optimizer.build([weight])

    def replica_step(bad):
        is_last = tf.distribute.get_replica_context().replica_id_in_sync_group == 1
        grads = loop.scaled(tf.logical_and(bad, is_last))
        stepped = loop.step(loop.unscale(grads) if unscales else grads)
        if update == "in replicas":
            loop.update()
        return stepped

    step = mode(lambda bad: strategy.experimental_local_results(strategy.run(replica_step, (bad,))))
    end = tf.function(loop.update) if update == "compiled outside" else loop.update

    def iteration(bad):
        stepped = step(bad)
        if update != "in replicas":
            end()
        assert len({bool(result) for result in stepped}) == 1
        return stepped[0]

    assert loop.run(iteration) == scaling.simulate(RULE, TRACE)
    assert (int(loop.scaler.attempted_steps), int(loop.scaler.skipped_steps)) == (9, 3)
    copies = [copy.numpy() for copy in strategy.experimental_local_results(weight if is_tf1 else weight.value)]
    np.testing.assert_array_equal(copies[0], copies[1])
    np.testing.assert_allclose(copies[0], [0.4, 1.4], rtol=1e-4)
    steps = [event.step for event in loop.scaler.drain_events() if event.reason == "overflow"]
    assert steps == [2, 4, 5]


@slow
def test_a_scaler_used_before_the_strategy(strategy):
    """Its variables are on one device, and one update serves all replicas."""
    loop = Loop()
    assert loop.scaler.get_scale() == 8.0
    with strategy.scope():
        loop.weight, loop.optimizer = keras.Variable([1.0, 2.0]), keras.optimizers.Adam(0.1)

    def replica_step(bad):
        loop.step(loop.scaled(bad))
        loop.update()

    for letter in TRACE:
        strategy.run(replica_step, (tf.constant(letter == "F"),))
    assert loop.scaler.get_scale() == scaling.simulate(RULE, TRACE)[-1]


def test_a_state_is_loaded_on_all_replicas(strategy):
    """Outside of `strategy.run` and of its scope."""
    loop = Loop()
    with strategy.scope():
        loop.scaler.get_scale()
    loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0})
    scales = strategy.run(loop.scaler.get_scale)
    assert [float(scale) for scale in strategy.experimental_local_results(scales)] == [2.0, 2.0]


def test_step_outside_of_run_is_an_error(strategy):
    """It has no gradient of one replica."""
    with strategy.scope():
        loop = Loop()
    with strategy.scope(), pytest.raises(RuntimeError, match="replica context"):
        loop.step([tf.ones(2)])


WRAPS = {"plain": lambda inner: inner}
if hasattr(keras.optimizers, "MultiOptimizer"):  # from Keras 3.15 on
    WRAPS["multi"] = lambda inner: keras.optimizers.MultiOptimizer(lambda _: inner)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_optimizers_that_keras_cannot_compile_on_replicas_are_errors(strategy, wrap):
    """Parts of a `MultiOptimizer` too, which may be known only when it is built."""
    with strategy.scope():
        inner = wrap(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
        loop = Loop(optimizer=inner, weight=keras.Variable([1.0]))

    @tf.function
    def step():
        strategy.run(lambda: loop.step([tf.ones(1)]))

    with pytest.raises(NotImplementedError, match="gradient_accumulation_steps"):
        step()


@pytest.mark.parametrize("compiles", [False, True])
def test_scalers_of_one_optimizer_update_their_own_variables(compiles):
    """Fused, where each scaler has another first variable."""
    weights = [keras.Variable(np.ones((256, 256), "float32")) for _ in range(2)]
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(weights)
    for count, weight in enumerate(weights):
        scaler = GradScaler(init_scale=4.0)
        step = functools.partial(
            lambda scaler, weight, gradient: scaler.step(optimizer, [(gradient, weight)]), scaler, weight
        )
        assert (tf.function(step) if compiles else step)(tf.fill((256, 256), 2.0))
        scaler.update()
        expected = [0.5] * (count + 1) + [1.0] * (1 - count)
        assert [float(np.mean(weight.numpy())) for weight in weights] == expected
