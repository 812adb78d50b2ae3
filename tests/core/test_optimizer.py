"""`LossScaleOptimizer`, on all backends."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
from backend import BACKEND, apply, compiled, modes, needs_tensorflow, tf
from keras import ops
from thorough import mostly_slow

import tfmixed
from tfmixed import LossScaleOptimizer, scaling
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import EventsLost, ScaleChange
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
slow = pytest.mark.slow


def variables():
    return [keras.Variable([1.0, 2.0], name="a"), keras.Variable([3.0, 4.0], name="b")]


def step(optimizer, weights, good, bad=np.inf, take=None):
    """Applies one gradient of 1 everywhere, scaled; `bad` replaces one entry of the second."""
    scale = float(optimizer.loss_scale)
    gradients = ops.array([scale, scale]), ops.array([scale, scale if good else bad])
    take(*gradients) if take else apply(optimizer, gradients, weights)


def run(optimizer, trace, bad=np.inf, weights=None):
    weights = weights or variables()
    scales, take = [], compiled(optimizer, weights) if len(trace) > 30 else None
    for letter in trace:
        step(optimizer, weights, letter == "T", bad, take)
        scales.append(float(optimizer.loss_scale))
    return weights, scales


def digits_like(count=512, width=6):
    x = np.random.default_rng(0).normal(size=(count, width)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def small_model(optimizer=None, **compile_arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(1)])
    if optimizer is not None:
        model.compile(optimizer, loss="mse", **compile_arguments)
    return model


def finite(model):
    return all(np.isfinite(weight).all() for weight in model.get_weights())


# The rule and the step.


@pytest.mark.parametrize(
    ("trace", "bad"), [("TTTT", np.nan), ("FFFF", -np.inf), ("TFTTFTTTTF", np.nan), ("FTTTTTTTTT", np.inf)]
)
def test_scale_follows_the_rule(trace, bad):
    """Counters and iterations follow the trace, and weights move in finite steps only."""
    rule = DynamicScale(initial_scale=8.0, growth_interval=3)
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), rule)
    weights, scales = run(optimizer, trace, bad)
    assert scales == scaling.simulate(rule, trace)
    assert int(optimizer.attempted_steps) == len(trace)
    assert int(optimizer.skipped_steps) == trace.count("F")
    assert int(optimizer.consecutive_skips) == len(trace) - len(trace.rstrip("F"))
    assert int(optimizer.iterations) == trace.count("T")
    np.testing.assert_allclose(weights[0].numpy(), np.array([1.0, 2.0]) - 0.5 * trace.count("T"))


@pytest.mark.parametrize(
    "rule",
    [
        DynamicScale(min_scale=None, max_scale=None),
        LogMaxScale(),
        *(pytest.param(rule, marks=slow) for rule in ("dynamic", 128)),
    ],
)
def test_many_overflows_break_nothing(rule):
    """200 overflows and a gradient of 0, with which Keras's own class writes NaN (K1)."""
    optimizer = LossScaleOptimizer("adam", rule)
    weights, scales = run(optimizer, "F" * 200)
    apply(optimizer, [ops.zeros(2), ops.zeros(2)], weights)
    assert all(np.isfinite(weight.numpy()).all() for weight in weights)
    assert min(scales) > 0
    assert int(optimizer.skipped_steps) == 200


def test_growth_stops_at_the_maximum():
    """The scale of Keras's own class becomes inf and stays it (K2)."""
    optimizer = LossScaleOptimizer("sgd", initial_scale=2.0**15, dynamic_growth_steps=1)
    _, scales = run(optimizer, "T" * 40)
    assert max(scales) == 2.0**24


def test_constant_scale_skips_and_counts_bad_steps():
    """The scale does not change, so there is no event."""
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), 128)
    weights, scales = run(optimizer, "TFFT")
    assert scales == [128.0] * 4
    assert int(optimizer.skipped_steps) == 2
    assert optimizer.drain_events() == []
    np.testing.assert_allclose(weights[1].numpy(), [2.0, 3.0])


def test_unchecked_constant_scale_applies_everything():
    """With skip_nonfinite=False an overflow counts as an applied step."""
    optimizer = LossScaleOptimizer("sgd", ConstantScale(2.0, skip_nonfinite=False))
    weights, _ = run(optimizer, "F")
    assert not np.isfinite(weights[1].numpy()).all()
    assert int(optimizer.skipped_steps) == 0


def test_gradient_norm_is_unscaled_and_global():
    """The norm of the last step's unscaled gradients together."""
    optimizer = LossScaleOptimizer("sgd", 1024)
    apply(optimizer, [ops.array([3.0 * 1024, 0.0]), ops.array([0.0, 4.0 * 1024])], variables())
    assert float(optimizer.gradient_norm) == 5.0


def test_logmax_scale_sees_the_unscaled_maximum():
    """A rule with `needs_amax` gets the largest unscaled gradient."""
    rule = LogMaxScale(initial_scale=4.0, max_scale=2.0**20)
    optimizer = LossScaleOptimizer("sgd", rule)
    weights = variables()
    amax = [2.0, 1.0, 4.0]
    scales = []
    for size in amax:
        scale = float(optimizer.loss_scale)
        apply(optimizer, [ops.array([size * scale, 0.0]), ops.array([-0.5 * scale, 0.0])], weights)
        scales.append(float(optimizer.loss_scale))
    np.testing.assert_allclose(scales, scaling.simulate(rule, "TTT", amax), rtol=1e-5)


def test_scale_loss_is_float32_at_least():
    """A float16 loss times 2**24 is finite."""
    scaled = LossScaleOptimizer("sgd", 2.0**24).scale_loss(ops.cast(2.0, "float16"))
    assert keras.backend.standardize_dtype(scaled.dtype) == "float32"
    assert float(scaled) == 2.0**25


@needs_tensorflow
def test_scale_loss_traced_before_build_reads_the_variable():
    """A function traced before the first step follows later changes of the scale."""
    optimizer = LossScaleOptimizer("sgd", DynamicScale(initial_scale=8.0))
    scaled = tf.function(optimizer.scale_loss)
    assert float(scaled(tf.constant(1.0))) == 8.0
    traces = scaled.experimental_get_tracing_count()
    run(optimizer, "F")
    assert float(scaled(tf.constant(1.0))) == 4.0
    assert scaled.experimental_get_tracing_count() == traces


def test_float16_gradients_must_fit_their_variable():
    """Unscaling by a scale below 1 can exceed float16, which is an overflow and not an inf in the weights."""
    rule = DynamicScale(initial_scale=0.5, min_scale=0.25)
    optimizer = LossScaleOptimizer("sgd", rule)
    weight = keras.Variable([1.0], dtype="float16", name="half")
    apply(optimizer, [ops.array([60000.0], "float16")], [weight])
    assert int(optimizer.skipped_steps) == 1
    assert np.isfinite(weight.numpy()).all()


@needs_tensorflow
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
def test_sparse_and_missing_gradients():
    """`tf.IndexedSlices` stay sparse, and None is passed to the inner optimizer."""
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4)
    table, missing = keras.Variable(np.ones((3, 2)), name="table"), keras.Variable([1.0], name="missing")
    good = tf.IndexedSlices(tf.fill((1, 2), 4.0), tf.constant([1]), tf.constant([3, 2]))
    bad = tf.IndexedSlices(tf.fill((1, 2), np.inf), tf.constant([1]), tf.constant([3, 2]))
    apply(optimizer, [good, None], [table, missing])
    apply(optimizer, [bad, None], [table, missing])
    np.testing.assert_allclose(table.numpy(), [[1, 1], [0, 0], [1, 1]])
    assert int(optimizer.skipped_steps) == 1


def test_only_missing_gradients_are_an_error():
    """The loss does not depend on any variable (K7)."""
    with pytest.raises(ValueError, match="at least one gradient"):
        LossScaleOptimizer("sgd").apply([None, None], variables())


def test_a_step_without_variables():
    """It does nothing, for models without trainable weights."""
    optimizer = LossScaleOptimizer("sgd")
    apply(optimizer, [], [])
    assert int(optimizer.attempted_steps) == 0


def test_variables_that_hold_their_gradient_are_not_unscaled():
    """Scales of float8 layers (`overwrite_with_gradient`) take their gradient unless it is not finite."""
    optimizer = LossScaleOptimizer("sgd", 8)
    weight = keras.Variable([1.0])
    weight.overwrite_with_gradient = True
    apply(optimizer, [ops.array([5.0])], [weight])
    apply(optimizer, [ops.array([np.nan])], [weight])
    np.testing.assert_allclose(weight.numpy(), [5.0])


def test_variables_that_hold_their_gradient_check_its_range():
    """A gradient that float16 cannot hold is an overflow there too."""
    optimizer, weight = LossScaleOptimizer("sgd", 8), keras.Variable([1.0], dtype="float16")
    weight.overwrite_with_gradient = True
    apply(optimizer, [ops.array([1e5])], [weight])
    assert (int(optimizer.skipped_steps), float(weight.numpy()[0])) == (1, 1.0)


@pytest.mark.parametrize(("loss", "advice"), [(None, "learning rate.*loss itself"), (np.nan, "loss itself is nan")])
def test_an_exhausted_scale_is_an_error(loss, advice):
    """It tells scale, first step, the three variables that overflowed most often, and advice that fits the loss."""
    optimizer = LossScaleOptimizer("sgd", DynamicScale(initial_scale=4.0), max_consecutive_skips=6)
    weights = [keras.Variable([1.0], name=name) for name in "abcd"]
    for step_number in range(8):
        bad = [False, step_number % 2 == 1, step_number > 2, True]  # in steps 2 to 7: 0, 3, 5, 6 times
        optimizer.raise_if_exhausted(loss)
        gradients = [ops.full((1,), np.nan if is_bad and step_number > 1 else 1.0) for is_bad in bad]
        apply(optimizer, gradients, weights)
    with pytest.raises(LossScaleExhausted, match=advice) as raised:
        optimizer.raise_if_exhausted(loss)
    assert (raised.value.skips, raised.value.since_step, raised.value.scale) == (6, 2, 1.0)
    assert "d (6 times), c (5 times), b (3 times)" in str(raised.value)


@slow
def test_no_limit_of_consecutive_skips():
    """With max_consecutive_skips=None the scale is never exhausted."""
    optimizer = LossScaleOptimizer("sgd", DynamicScale(initial_scale=4.0), max_consecutive_skips=None)
    run(optimizer, "F" * 300)
    optimizer.raise_if_exhausted()


def test_a_scale_above_its_minimum_has_ten_times_as_many_steps():
    """It may still decrease to where steps are finite."""
    rule = DynamicScale(initial_scale=4.0, hysteresis=1000)
    optimizer = LossScaleOptimizer("sgd", rule, max_consecutive_skips=4)
    weights, _ = run(optimizer, "F" * 39)
    optimizer.raise_if_exhausted()
    run(optimizer, "F", weights=weights)
    with pytest.raises(LossScaleExhausted, match="40 steps"):
        optimizer.raise_if_exhausted()


def test_a_finite_step_resets_the_counts_of_overflows():
    """Compiled, where a step without a change writes nothing, and with a constant scale."""
    optimizer, weights = LossScaleOptimizer("sgd", 1.0, max_consecutive_skips=2), variables()
    take = compiled(optimizer, weights)
    for letter in "FFTFF":
        step(optimizer, weights, letter == "T", take=take)
    with pytest.raises(LossScaleExhausted, match=r"b \(2 times\)"):
        optimizer.raise_if_exhausted()


# Events.


def test_events_are_the_history_of_the_variable():
    """Each change has its step, both scales, the reason and, for an overflow, the variable."""
    rule = DynamicScale(initial_scale=8.0, growth_interval=2)
    optimizer = LossScaleOptimizer("sgd", rule)
    run(optimizer, "TTFT")
    assert optimizer.drain_events() == [
        ScaleChange(1, 8.0, 16.0, "growth"),
        ScaleChange(2, 16.0, 8.0, "overflow", "b"),
    ]
    assert optimizer.drain_events() == []


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
def test_an_event_names_the_first_variable_that_overflowed():
    """Missing gradients do not shift it."""
    optimizer = LossScaleOptimizer("sgd")
    names = ["a", "b", "c", "d"]
    weights = [keras.Variable([1.0], name=name) for name in names]
    apply(optimizer, [ops.ones(1)] * 4, weights)
    apply(optimizer, [None, ops.ones(1), ops.array([np.nan]), ops.array([np.inf])], weights)
    apply(optimizer, [None, ops.ones(1), ops.ones(1), ops.ones(1)], weights)
    assert [event.variable for event in optimizer.drain_events()] == ["c"]


def test_a_full_buffer_reports_lost_events():
    """Their number, and the step after the gap."""
    optimizer = LossScaleOptimizer("sgd", event_capacity=3)
    weights, _ = run(optimizer, "F" * 5)
    lost, *kept = optimizer.drain_events()
    assert lost == EventsLost(2, before_step=2)
    assert [event.step for event in kept] == [2, 3, 4]
    run(optimizer, "F", weights=weights)
    assert [event.step for event in optimizer.drain_events()] == [5]


def test_a_step_without_a_change_keeps_a_full_buffer():
    """The place of the next change still has the oldest one."""
    optimizer = LossScaleOptimizer("sgd", event_capacity=3)
    run(optimizer, "FFFT")
    assert [event.step for event in optimizer.drain_events()] == [0, 1, 2]


def test_values_that_were_read_do_not_change():
    """A later step changes the variables, not the tensors read before."""
    optimizer = LossScaleOptimizer("sgd", DynamicScale(initial_scale=8.0))
    weights, _ = run(optimizer, "T")
    held = optimizer.loss_scale, optimizer.attempted_steps, optimizer.skipped_steps
    run(optimizer, "F", weights=weights)
    assert [float(value) for value in held] == [8.0, 1.0, 0.0]


def test_setting_the_scale_is_logged():
    """Assigning `loss_scale` is an event. A value outside of the rule's bounds is an error."""
    optimizer = LossScaleOptimizer("sgd", DynamicScale(initial_scale=8.0))
    run(optimizer, "T")
    optimizer.loss_scale = 64
    assert optimizer.drain_events() == [ScaleChange(1, 8.0, 64.0, "set")]
    with pytest.raises(ValueError, match="loss_scale"):
        optimizer.loss_scale = 1e30
    assert float(optimizer.loss_scale) == 64.0


def fit_modes(*kinds):
    """Returns modes of `compile` as parameters. All but the first are slow."""
    return [pytest.param(kind, id=str(kind), marks=slow if number else ()) for number, kind in enumerate(modes(*kinds))]


@pytest.mark.parametrize(
    "mode", fit_modes({"steps_per_execution": 16}, {}, {"jit_compile": True}, {"run_eagerly": True})
)
def test_steps_are_exact_in_every_mode_of_fit(mode):
    """Changes have their exact step and variable, whatever the number of steps between two looks."""
    x, y = digits_like()
    x[5 * 16 + 3], x[20 * 16] = np.inf, np.nan
    rule = DynamicScale(initial_scale=8.0, growth_interval=4)
    model = small_model(LossScaleOptimizer("adam", rule), **mode)
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    trace = "".join("F" if number in (5, 20) else "T" for number in range(32))
    scales = [8.0, *scaling.simulate(rule, trace)]
    expected = [(number, *scales[number : number + 2]) for number in range(32) if scales[number] != scales[number + 1]]
    events = model.optimizer.drain_events()
    assert [(event.step, event.old_scale, event.new_scale) for event in events] == expected
    overflows = [event for event in events if event.reason == "overflow"]
    assert [event.step for event in overflows] == [5, 20]
    assert {event.variable for event in overflows} == {model.layers[0].kernel.path}
    assert finite(model)


@pytest.mark.parametrize("mode", fit_modes({}, {"steps_per_execution": 4}, {"run_eagerly": True}))
def test_embeddings_and_frozen_layers(mode):
    """The gradient of an embedding is sparse, and a frozen layer has none."""
    tokens = np.random.default_rng(0).integers(5, size=(64, 3))
    targets = tokens.sum(axis=1, keepdims=True).astype("float32")
    targets[20] = np.inf
    layers = [keras.layers.Embedding(5, 4), keras.layers.Flatten(), keras.layers.Dense(6), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
    layers[2].trainable = False
    before, frozen = layers[0].get_weights()[0], layers[2].get_weights()
    model.compile(LossScaleOptimizer("adam"), loss="mse", **mode)
    model.fit(tokens, targets, batch_size=8, shuffle=False, verbose=0)
    assert (int(model.optimizer.attempted_steps), int(model.optimizer.skipped_steps)) == (8, 1)
    assert finite(model)
    assert not np.array_equal(before, layers[0].get_weights()[0])
    for now, then in zip(layers[2].get_weights(), frozen, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_with_nothing_to_train_fits():
    """Keras warns, and the optimizer takes no step."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, trainable=False)])
    model.compile(LossScaleOptimizer("adam"), loss="mse")
    model.fit(*digits_like(32), verbose=0, callbacks=[tfmixed.callbacks.LossScaleLogger(verbose=0)])
    assert int(model.optimizer.attempted_steps) == 0


@slow
def test_train_on_batch_skips_and_counts():
    """As in `fit`."""
    model = small_model(LossScaleOptimizer("adam"))
    x, y = digits_like(8)
    for bad in (False, True, False):
        model.train_on_batch(np.full_like(x, np.nan) if bad else x, y)
    assert (int(model.optimizer.attempted_steps), int(model.optimizer.skipped_steps)) == (3, 1)
    assert finite(model)


@needs_tensorflow
@pytest.mark.parametrize("compiled", [False, True])
def test_two_optimizers_in_one_loop_are_independent(compiled):
    """An overflow of one, such as a generator, does not skip the step of the other, such as a critic."""
    first, second = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4), LossScaleOptimizer(keras.optimizers.SGD(1.0), 8)
    a, b = variables()
    first.build([a])
    second.build([b])

    def step(value):
        with tf.GradientTape(persistent=True) as tape:
            of_a, of_b = first.scale_loss(ops.sum(a * value)), second.scale_loss(ops.sum(b))
        first.apply([tape.gradient(of_a, a.value)], [a])
        second.apply([tape.gradient(of_b, b.value)], [b])

    step = tf.function(step) if compiled else step
    for value in (1.0, np.inf, 1.0):
        step(tf.constant(value))
    np.testing.assert_array_equal(a.numpy(), [-1.0, 0.0])
    np.testing.assert_array_equal(b.numpy(), [0.0, 1.0])
    assert (int(first.skipped_steps), int(second.skipped_steps)) == (1, 0)


# A drop-in replacement for Keras's class.


def test_compile_does_not_wrap_it_again():
    """Under mixed_float16 Keras wraps all other optimizers."""
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = LossScaleOptimizer("sgd")
    assert small_model(optimizer).optimizer is optimizer


INNER = {
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "weight_decay": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=4),
}


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=() if name == "global_clipnorm" else slow) for name, make in INNER.items()],
)
def test_a_run_is_that_of_the_inner_optimizer(make):
    """With a power of two as scale, up to the order of multiplications. A bad batch leaves no trace."""
    x, y = digits_like(96)
    with_bad = np.insert(x, 32, np.full((16, 6), np.inf), axis=0), np.insert(y, 32, np.zeros((16, 1)), axis=0)
    bare = small_model(make())
    losses = bare.fit(x, y, batch_size=16, shuffle=False, verbose=0).history["loss"]
    results = []
    for data in ((x, y), with_bad):
        model = small_model(LossScaleOptimizer(make(), 1024))
        history = model.fit(*data, batch_size=16, shuffle=False, verbose=0).history["loss"]
        results.append((history, model.get_weights(), model.optimizer.iterations, model.optimizer.learning_rate))
    (clean_losses, clean, *numbers), (_, skipped, *with_skip) = results
    np.testing.assert_allclose(clean_losses, losses, rtol=1e-6)
    for ours, theirs in zip(clean, bare.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(clean, skipped, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    expected = [float(bare.optimizer.iterations), float(bare.optimizer.learning_rate)]
    assert [float(value) for value in numbers] == [float(value) for value in with_skip] == expected


@pytest.mark.parametrize(
    ("scale", "inner"), [(2.0**-60, {}), (1.0, {"clipvalue": 1.0}), (3.0 * 2.0**20, {"global_clipnorm": 1.0})]
)
def test_a_norm_that_float32_cannot_hold_is_an_overflow(scale, inner):
    """With any clipping. A norm just below the limit is applied. The event names the largest gradients."""
    optimizer, weights = LossScaleOptimizer(keras.optimizers.Adagrad(1.0, **inner), ConstantScale(scale)), variables()
    take = compiled(optimizer, weights)
    for step, (first, second) in enumerate([(1, 1e19), (1, 2e19), (1.2e19, 1.5e19), (1, 3e31)]):
        before = [weight.numpy() for weight in weights]
        take(*(ops.convert_to_tensor(np.array([0.0, size]) * scale, "float32") for size in (first, second)))
        assert int(optimizer.skipped_steps) == step
        assert np.isfinite(float(optimizer.gradient_norm)) == (step == 0)
        assert np.array_equal(weights[1].numpy(), before[1]) == (step > 0)
        assert step == 0 or np.array_equal(weights[0].numpy(), before[0])
    assert optimizer._overflow_counts() == {"a": 0, "b": 3}


def test_an_event_names_a_non_finite_gradient_before_a_large_one():
    """If both are overflows."""
    optimizer = LossScaleOptimizer("sgd", DynamicScale(2.0))
    apply(optimizer, [ops.array([1.0, 1e25]), ops.array([1.0, np.nan])], variables())
    assert [event.variable for event in optimizer.drain_events()] == ["b"]


@pytest.mark.parametrize(
    "name", ["adam", "muon", *(pytest.param(name, marks=slow) for name in ("adafactor", "adagrad", "ftrl"))]
)
def test_large_gradients_do_not_break_an_optimizer(name):
    """Neither its variables nor its state, and later steps still train."""
    optimizer, weights = LossScaleOptimizer(name, 1), [keras.Variable(np.ones((2, 2), "float32"))]
    for size in (1e19, 1e25, 3e38, 1.0, 1.0):
        before = weights[0].numpy()
        apply(optimizer, [ops.array([[1.0, size], [0.5, -1.0]])], weights)
    assert not np.array_equal(weights[0].numpy(), before)
    assert all(np.isfinite(variable.numpy()).all() for variable in (*weights, *optimizer.variables))
    assert int(optimizer.skipped_steps) == 2


class SquaringDescent(keras.optimizers.SGD):
    """A subclass with its own step, which is not known to be linear."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(ops.square(ops.cast(gradient, variable.dtype)), variable, learning_rate)


def namesake():
    """Returns an optimizer whose class has the name of one of Keras's."""
    return type("Lion", (keras.optimizers.Adam,), {})(1e-3)


def multi(part):
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(part))


MULTI = [
    (lambda: multi(keras.optimizers.SGD(1e-6)), 1000.0, 0),
    (lambda: multi(keras.optimizers.Adam(1e-3, clipvalue=1.0)), 1000.0, 0),
    (lambda: multi(keras.optimizers.Adam(1e-3)), 1000.0, 1),
]
MULTI = MULTI if hasattr(keras.optimizers, "MultiOptimizer") else []  # from Keras 3.15 on


@pytest.mark.parametrize(
    ("make", "size", "skipped"),
    [
        (lambda: keras.optimizers.Adam(1e-3), 1000.0, 1),
        (lambda: keras.optimizers.Adam(1e-3), 250.0, 0),
        (lambda: keras.optimizers.Adam(1e-3, clipvalue=1.0), 1000.0, 0),
        (lambda: keras.optimizers.Adam(1e-3, clipnorm=1.0), 1000.0, 0),
        (lambda: keras.optimizers.Adam(1e-3, clipnorm=500.0), 1000.0, 1),
        (lambda: keras.optimizers.SGD(1e-6), 1000.0, 0),
        (lambda: keras.optimizers.SGD(1e-6), 70000.0, 1),
        (lambda: keras.optimizers.Lion(1e-6), 1000.0, 0),
        (lambda: SquaringDescent(1e-6), 1000.0, 1),
        (namesake, 1000.0, 1),
        *MULTI,
    ],
)
@pytest.mark.filterwarnings("ignore:.* updates 1 float16 variable")  # which is what is tested
def test_float16_gradients_must_have_finite_squares(make, size, skipped):
    """Infinite second moments would make later steps NaN. Linear and clipping optimizers need no squares."""
    optimizer, weight = LossScaleOptimizer(make(), 1), keras.Variable([1.0, 1.0], dtype="float16")
    for number in (size, size, 1.0, 1.0):
        apply(optimizer, [ops.array([number, 1.0], "float32")], [weight])
    assert int(optimizer.skipped_steps) == 2 * skipped
    assert all(np.isfinite(variable.numpy()).all() for variable in (weight, *optimizer.variables))


@needs_tensorflow
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras warns if it does not know the length
@pytest.mark.parametrize("mode", fit_modes({"steps_per_execution": 3}, {}))
def test_the_end_of_a_dataset_is_not_a_step(mode):
    """If its length is not known, the last step finds no batch."""
    x, y = digits_like(64)
    x[20] = np.inf
    data = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(16)
    model = small_model(LossScaleOptimizer("adam"), **mode)
    model.fit(data, epochs=3, verbose=0, shuffle=False)
    optimizer = model.optimizer
    assert (int(optimizer.attempted_steps), int(optimizer.skipped_steps), int(optimizer.iterations)) == (12, 3, 9)
    assert [event.step for event in optimizer.drain_events()] == [1, 5, 9]


@slow
def test_an_exhausted_scale_is_an_error_in_an_except_block_too():
    """For a loop that starts a failed training again."""
    model = small_model(LossScaleOptimizer("adam", 1, max_consecutive_skips=4))
    x, y = digits_like(64)
    try:
        raise OSError
    except OSError:
        with contextlib.nullcontext() if BACKEND == "jax" else pytest.raises(LossScaleExhausted):
            model.fit(x * np.nan, y, batch_size=8, verbose=0)


def test_an_overflow_whose_scaled_square_vanishes():
    """With a tiny scale, 1e-24 squared is 0 and its unscaled value exceeds float16."""
    weights = [keras.Variable([1.0], dtype="float16"), keras.Variable([1.0])]
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1e-30)
    apply(optimizer, [ops.array([1e-24]), ops.array([2e-30])], weights)
    assert (int(optimizer.skipped_steps), float(weights[0].numpy()[0])) == (1, 1.0)


@needs_tensorflow
@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_float64_gradients_beyond_float32_are_an_overflow(inner):
    """Their norm is float32."""
    optimizer, weight = LossScaleOptimizer(inner, 1), keras.Variable(np.ones(2), dtype="float64")
    for value in (1e200, 1.0):
        apply(optimizer, [tf.constant([value] * 2, tf.float64)], [weight])
    assert np.isfinite(weight.numpy()).all()
    assert int(optimizer.skipped_steps) == 1


def test_a_scale_whose_reciprocal_is_subnormal_divides():
    """Kernels take a subnormal reciprocal for 0."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 2.0**127), keras.Variable([1.0])
    take = compiled(optimizer, [weight])
    for _ in range(2):
        take(ops.array([2.0**125]))
    np.testing.assert_array_equal(weight.numpy(), [0.5])


def test_the_norm_of_float16_gradients_is_float32():
    """The square of 300 exceeds float16."""
    optimizer = LossScaleOptimizer("sgd", 1)
    apply(optimizer, [ops.array([300.0, 400.0], "float16")], [keras.Variable([1.0, 1.0], dtype="float16")])
    assert float(optimizer.gradient_norm) == pytest.approx(500.0)


@needs_tensorflow
def test_float64_gradients_keep_their_digits():
    """They are not rounded to float32."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 8), keras.Variable([0.0], dtype="float64")
    apply(optimizer, [tf.constant([8.0 + 2.0**-40], tf.float64)], [weight])
    assert float(weight.numpy()[0]) == -1.0 - 2.0**-43


@needs_tensorflow
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_float32_gradients_of_float64_variables(bad):
    """The limit of float64 is infinity in float32, and infinity must not be within it."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1), keras.Variable([1.0], dtype="float64")
    apply(optimizer, [tf.constant([bad], tf.float32)], [weight])
    assert (int(optimizer.skipped_steps), float(weight.numpy()[0])) == (1, 1.0)


def test_a_finite_gradient_whose_scaled_norm_overflows_is_applied():
    """The sum of squares exceeds float32 only while it is scaled."""
    optimizer, weights = LossScaleOptimizer(keras.optimizers.SGD(1e-13, global_clipnorm=1e30), 2**24), variables()
    apply(optimizer, [ops.zeros(2), ops.full((2,), 1e13 * 2**24)], weights)
    np.testing.assert_allclose(weights[1].numpy(), [2.0, 3.0], rtol=1e-6)
    assert float(optimizer.gradient_norm) == pytest.approx(np.sqrt(2) * 1e13)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [({"clipnorm": 1.0}, 0.75), ({"global_clipnorm": 1.0}, 0.75), ({"clipvalue": 1.0}, 0.5)],
    ids=str,
)
def test_float16_variables_are_clipped_as_keras_does(clip, expected):
    """The inner optimizer gets float32 gradients, since squares of float16 overflow above 255."""
    # On PyTorch a scalar does not widen a vector, and Keras's own class clips to NaN.
    wrappers = [LossScaleOptimizer] + [keras.optimizers.LossScaleOptimizer] * (BACKEND != "torch")
    for wrapper in wrappers:
        optimizer = wrapper(keras.optimizers.SGD(0.5, **clip), initial_scale=128.0)
        weight = keras.Variable(np.ones(4), dtype="float16")
        apply(optimizer, [ops.full((4,), 300.0 * 128, "float16")], [weight])
        np.testing.assert_array_equal(weight.numpy(), [expected] * 4)


def test_apply_checks_its_variables():
    """They are required if the optimizer is not built, one for each gradient."""
    with pytest.raises(ValueError, match="trainable_variables"):
        LossScaleOptimizer("sgd").apply([ops.ones(2)])
    with pytest.raises(ValueError, match="one gradient for each"):
        LossScaleOptimizer("sgd").apply([ops.ones(2)], variables())


@pytest.mark.skipif(BACKEND == "jax", reason="stateless_apply takes values, not variables")
def test_an_unknown_variable_is_an_error():
    """The error names it and the variables that the optimizer was built with."""
    optimizer = LossScaleOptimizer("sgd")
    optimizer.build(variables())
    with pytest.raises(ValueError, match=r"a, b.*stranger"):
        apply(optimizer, [ops.ones(2)], [keras.Variable([1.0, 2.0], name="stranger")])


def test_loss_scale_takes_a_tensor():
    """Such as `optimizer.loss_scale = optimizer.loss_scale / 2`."""
    optimizer = LossScaleOptimizer("sgd")
    optimizer.loss_scale = optimizer.loss_scale / 2
    assert float(optimizer.loss_scale) == 2.0**14


def test_the_loss_scale_factor_of_the_inner_optimizer_is_ignored():
    """Otherwise gradients would be unscaled twice."""
    inner = keras.optimizers.SGD(0.5, loss_scale_factor=100)
    weights, _ = run(LossScaleOptimizer(inner, 8), "T")
    np.testing.assert_allclose(weights[0].numpy(), [0.5, 1.5])


def test_properties_of_keras():
    """dynamic_scale and step_counter are variables. A rule that counts nothing has no counter."""
    optimizer = LossScaleOptimizer("sgd", initial_scale=4.0, dynamic_growth_steps=7)
    run(optimizer, "TT")
    assert (optimizer.initial_scale, optimizer.dynamic_growth_steps) == (4.0, 7)
    assert (float(optimizer.dynamic_scale.numpy()), int(optimizer.step_counter.numpy())) == (4.0, 2)
    assert LossScaleOptimizer("sgd", 4).step_counter is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "static"}, "scale"),
        ({"scale": -1}, "value"),
        ({"scale": 8, "initial_scale": 4}, "scale=8"),
        ({"dynamic": False}, "initial_scale=None"),
        ({"dynamic": False, "initial_scale": 4, "dynamic_growth_steps": 2}, "dynamic_growth_steps=2"),
        ({"initial_scale": 0}, "initial_scale"),
        ({"dynamic_growth_steps": 0}, "dynamic_growth_steps"),
        ({"dynamic": False, "initial_scale": -3}, "initial_scale"),
        ({"dynamic": "no"}, "dynamic='no'"),
        ({"dynamic": 1.0}, "dynamic=1.0"),
        ({"dynamic": 0, "initial_scale": 8}, "dynamic=0"),
        ({"event_capacity": 0}, "event_capacity"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips"),
        ({"clipnorm": 1.0}, "clipnorm"),
        ({"foo": 1}, "foo"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(arguments, message):
    """The error names the argument and the value."""
    with pytest.raises(ValueError, match=message):
        LossScaleOptimizer("sgd", **arguments)


def test_wrong_inner_optimizers_are_errors():
    """Other objects, and optimizers that scale by themselves."""
    with pytest.raises(TypeError, match="inner_optimizer"):
        LossScaleOptimizer(keras.layers.Dense(1))
    with pytest.raises(ValueError, match="inner_optimizer"):
        LossScaleOptimizer(LossScaleOptimizer("sgd"))


def test_a_constant_scale_by_its_keras_2_arguments():
    """dynamic=False and initial_scale=128 are ConstantScale(128)."""
    assert LossScaleOptimizer("sgd", dynamic=False, initial_scale=128).rule == ConstantScale(128.0)


@pytest.mark.parametrize("scale", [2.0**-4, 0.7, 2.0**27 + 15], ids=str)
def test_any_initial_scale_of_keras(scale):
    """Beyond the default bounds too, rounded to a float32 number within the bounds."""
    first = float(LossScaleOptimizer("sgd", initial_scale=scale).loss_scale)
    assert first == pytest.approx(scale, rel=2**-23)
    assert (first >= scale) is (scale < 1)


# Saving.

HOW = ["model", "weights", *(["checkpoint"] if BACKEND == "tensorflow" else [])]
RULES = {
    "keras": {"initial_scale": 4.0, "dynamic_growth_steps": 3},
    "dynamic": {"scale": DynamicScale(initial_scale=8.0, growth_interval=3, hysteresis=2)},
    "unbounded": {"scale": scaling.like("torch")},
    "constant": {"scale": 64},
    "logmax": {"scale": LogMaxScale()},
    "ring": {"event_capacity": 5},
}


@pytest.mark.parametrize("arguments", RULES.values(), ids=RULES)
def test_config_round_trips(arguments):
    """`get_config` and `from_config` restore the rule."""
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.5), name="mine", **arguments)
    config = optimizer.get_config()
    again = LossScaleOptimizer.from_config(config)
    assert again.get_config() == config
    assert (again.rule, again.event_capacity, again.name) == (optimizer.rule, optimizer.event_capacity, "mine")


SAVED = {"model-dynamic", "checkpoint-keras"}


@pytest.mark.parametrize(("how", "arguments"), mostly_slow(SAVED, {how: how for how in HOW}, RULES))
def test_saved_state_is_restored(how, arguments, tmp_path):
    """With all events, and the run continues as if it had not stopped."""
    x, y = digits_like(160)
    x[33] = np.nan
    model = small_model(LossScaleOptimizer("adam", **arguments))
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    if how == "model":
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
    else:
        again = small_model(LossScaleOptimizer("adam", **arguments))
        again.optimizer.build(again.trainable_variables)
    if how == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        again.load_weights(tmp_path / "model.weights.h5")
    if how == "checkpoint":
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "checkpoint")
        tf.train.Checkpoint(model=again, optimizer=again.optimizer).restore(path).assert_consumed()
    assert again.optimizer.rule == model.optimizer.rule
    assert int(again.optimizer.skipped_steps) == 1
    for ours, theirs in zip(again.optimizer.variables[2:], model.optimizer.variables[2:], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    for trained in (model, again):
        trained.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert float(again.optimizer.loss_scale) == float(model.optimizer.loss_scale)


def keras_trained(tmp_path):
    x, y = digits_like(64)
    model = small_model(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), 4.0, 3))
    model.fit(x, y, batch_size=16, verbose=0)
    model.save(tmp_path / "keras.keras")
    return model


def test_weights_saved_with_keras_own_class_load(tmp_path):
    """With scale, counter, iterations and moments."""
    model = keras_trained(tmp_path)
    again = small_model(LossScaleOptimizer("adam", initial_scale=4.0, dynamic_growth_steps=3))
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "keras.keras")
    ours, theirs = again.optimizer, model.optimizer
    assert (float(ours.loss_scale), int(ours.step_counter.numpy()), int(ours.iterations)) == (8.0, 1, 4)
    np.testing.assert_array_equal(ours.variables[-1].numpy(), theirs.variables[-1].numpy())


@slow
def test_a_model_saved_with_keras_own_class_continues(tmp_path):
    """`load_model` returns Keras's class, and `from_keras` takes over rule, state and inner optimizer."""
    keras_trained(tmp_path)
    loaded = keras.models.load_model(tmp_path / "keras.keras")
    optimizer = LossScaleOptimizer.from_keras(loaded.optimizer)
    assert (float(optimizer.loss_scale), int(optimizer.step_counter.numpy()), int(optimizer.iterations)) == (8.0, 1, 4)
    loaded.compile(optimizer, loss="mse")
    loaded.fit(*digits_like(64), batch_size=16, verbose=0)
    assert int(optimizer.iterations) == 8


def test_a_broken_scale_of_keras_moves_into_the_bounds():
    """Keras's own class can have a scale of 0, inf or NaN."""
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), 4.0, 3)
    theirs.build(variables())
    for broken, bounded in ((0.0, 1.0), (np.inf, 2.0**24), (np.nan, 4.0)):
        theirs.dynamic_scale.assign(broken)
        assert float(LossScaleOptimizer.from_keras(theirs).loss_scale) == bounded


@slow
def test_a_file_of_another_inner_optimizer_is_skipped_with_a_warning(tmp_path):
    """Nothing is loaded."""
    x, y = digits_like(64)
    model = small_model(LossScaleOptimizer("sgd"))
    model.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "sgd.weights.h5")
    again = small_model(LossScaleOptimizer("adam"))
    again.optimizer.build(again.trainable_variables)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        again.load_weights(tmp_path / "sgd.weights.h5")
    assert int(again.optimizer.attempted_steps) == 0


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_an_optimizer_without_the_inner_variables_of_the_file_loads_none(inner):
    """If it is not built yet, or has fewer variables. Scale and counters without moments would not be a state."""
    old, store = LossScaleOptimizer("adam"), {}
    run(old, "TTT")
    old.save_own_variables(store)
    new = LossScaleOptimizer(inner)
    if inner == "sgd":
        new.build(variables())
    new.load_own_variables(store)
    assert (int(new.attempted_steps), int(new.iterations)) == (0, 0)


def test_a_buffer_of_another_capacity_is_not_restored():
    """Its events are lost. Counters and scale are restored."""
    old, store = LossScaleOptimizer("sgd", event_capacity=4), {}
    run(old, "FFF")
    old.save_own_variables(store)
    new = LossScaleOptimizer("sgd", event_capacity=8)
    new.build(variables())
    new.load_own_variables(store)
    assert new.drain_events() == []
    assert (float(new.loss_scale), int(new.skipped_steps)) == (2.0**12, 3)
    weights = variables()
    new = LossScaleOptimizer("sgd", event_capacity=8)
    new.build(weights)
    new.load_own_variables(store)
    step(new, weights, good=False)
    assert [event.step for event in new.drain_events()] == [3]


def test_a_file_of_another_rule():
    """Counters and inner state are restored. The scale is the old one within the new rule's bounds."""
    old, new = LossScaleOptimizer("sgd", DynamicScale(initial_scale=8.0)), LossScaleOptimizer("sgd", 128)
    run(old, "TFT")
    store = {}
    old.save_own_variables(store)
    new.build(variables())
    new.load_own_variables({key: np.asarray(value) for key, value in store.items()})
    assert (float(new.loss_scale), int(new.skipped_steps), int(new.iterations)) == (128.0, 1, 2)


def test_old_config_with_base_arguments_loads():
    """Files of older Keras versions carry the base optimizer's defaults."""
    config = {
        **LossScaleOptimizer("sgd").get_config(),
        "weight_decay": None,
        "use_ema": False,
        "ema_momentum": 0.99,
        "gradient_accumulation_steps": None,
    }
    assert LossScaleOptimizer.from_config(config).rule == DynamicScale()


@needs_tensorflow
def test_a_variable_with_two_gradients():
    """Keras applies both, and both are checked."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1), keras.Variable([0.0])
    for first in (np.nan, 1.0):
        apply(optimizer, [ops.array([first]), ops.array([2.0])], [weight, weight])
    assert (float(weight.numpy()[0]), int(optimizer.skipped_steps)) == (-3.0, 1)
    assert float(optimizer.gradient_norm) == pytest.approx(5**0.5)


def test_reading_creates_no_variables():
    """If the optimizer is not built."""
    optimizer = LossScaleOptimizer("sgd")
    before = len(optimizer.variables)
    numbers = (optimizer.loss_scale, optimizer.attempted_steps, optimizer.gradient_norm)
    assert [float(number) for number in numbers] == [2.0**15, 0.0, 0.0]
    assert (optimizer.dynamic_scale, optimizer.step_counter, optimizer.dynamic_counter) == (None, None, None)
    assert len(optimizer.variables) == before


@pytest.mark.parametrize("name", ["rule", "initial_scale", "dynamic_growth_steps"])
def test_arguments_of_the_state_cannot_be_set_later(name):
    """It would have no effect."""
    with pytest.raises(AttributeError, match=name):
        setattr(LossScaleOptimizer("sgd"), name, 4)


def test_an_inner_optimizer_that_overrides_apply_gradients_is_a_warning():
    """It would not be called."""

    class Tripled(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            return super().apply_gradients([(3 * gradient, variable) for gradient, variable in grads_and_vars])

    with pytest.warns(UserWarning, match="Tripled"):
        LossScaleOptimizer(Tripled())
