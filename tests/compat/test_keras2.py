from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow, take_step, tf
from keras import ops
from thorough import thorough

import tfmixed
from tfmixed import LossScaleOptimizer, scaling
from tfmixed.compat import keras2 as mixed_precision
from tfmixed.scaling import ConstantScale, DynamicScale

RULE = DynamicScale(initial_scale=2.0**10, growth_interval=3)
BATCHES, BAD = 8, 4
not_on_jax = pytest.mark.skipif(BACKEND == "jax", reason="apply is TensorFlow's and PyTorch's")
slow = pytest.mark.slow
slow_here = pytest.mark.filterwarnings("ignore:policy .* is slow here")  # float16 on a CPU


def in_ci(*values):
    return pytest.param(*values, marks=slow)


def data():
    x = np.random.default_rng(0).normal(size=(BATCHES, 4, 3)).astype("float32")
    y = x.sum(axis=2, keepdims=True)
    x[BAD, 0, 0] = np.inf
    return x, y


def small_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)])


def mse(model, x, y):
    return ops.mean(ops.square(ops.cast(model(x, training=True), "float32") - y))


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(actual, expected)


def keras3_step(model, optimizer):
    """Returns a step in the style of Keras 3."""

    def step(x, y):
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(mse(model, x, y))
        optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)

    return step


def keras2_step(model, optimizer, compiled=""):
    """Returns a step in the style of Keras 2. `compiled` names the parts that are a `tf.function`."""

    def part(name, function):
        return tf.function(function) if name in compiled.split() else function

    def differentiate(x, y):
        with tf.GradientTape() as tape:
            scaled = optimizer.get_scaled_loss(mse(model, x, y))
        return tape.gradient(scaled, model.trainable_variables)

    def apply(gradients):
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    differentiate = part("gradients", differentiate)
    unscale = part("unscale", lambda gradients: optimizer.get_unscaled_gradients(gradients))
    apply = part("apply", apply)
    backward = part("backward", lambda x, y: unscale(differentiate(x, y)))
    update = part("update", lambda gradients: apply(unscale(gradients)))
    if "update" in compiled:
        return lambda x, y: update(differentiate(x, y))
    return part("whole", lambda x, y: apply(backward(x, y)))


def weights_of(make_step, inner="adam", rule=RULE, **arguments):
    """Returns the weights after each step, and the optimizer's state at the end."""
    model = small_model()
    optimizer = LossScaleOptimizer(inner() if callable(inner) else inner, rule, **arguments)
    optimizer.build(model.trainable_variables)
    step, trail = make_step(model, optimizer), []
    for x, y in zip(*data(), strict=True):
        step(tf.constant(x), tf.constant(y))
        trail += model.get_weights()
    assert (int(optimizer.attempted_steps), int(optimizer.skipped_steps)) == (BATCHES, 1)
    assert [event.step for event in optimizer.drain_events() if event.reason == "overflow"] == [BAD]
    return trail, [variable.numpy() for variable in optimizer.variables if variable.name != "gradient_norm"]


@functools.cache
def plain_weights():
    return weights_of(keras3_step)


# Training loops.

MARKS = {"": (), "whole": (), "backward apply": slow}
PARTS = ["", "whole", "gradients", "unscale", "apply", "backward", "update", "gradients update", "backward apply"]


@needs_tensorflow
@pytest.mark.parametrize(
    "compiled",
    [pytest.param(parts, marks=MARKS.get(parts, thorough)) for parts in PARTS],
)
def test_loop_equals_a_keras_3_loop(compiled):
    """Weights after each step, and the state at the end, including overflow and growth. Eagerly to the bit."""
    reference = plain_weights()
    got = weights_of(lambda model, optimizer: keras2_step(model, optimizer, compiled))
    for ours, theirs in zip(got, reference, strict=True):
        for actual, expected in zip(ours, theirs, strict=True):
            if compiled:
                np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
            else:
                same([actual], [expected])


@slow
@needs_tensorflow
def test_loop_equals_fit():
    """With the same batches."""
    model = small_model()
    model.compile(LossScaleOptimizer("adam", RULE), loss="mse")
    trail = []
    for x, y in zip(*data(), strict=True):
        model.train_on_batch(x, y)
        trail += model.get_weights()
    got, _ = weights_of(lambda model, optimizer: keras2_step(model, optimizer, "whole"))
    for ours, theirs in zip(got, trail, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


INNER = {
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
    "adamw": lambda: keras.optimizers.AdamW(0.1),
}


@needs_tensorflow
@pytest.mark.parametrize(
    "inner", [pytest.param(make, id=name, marks=() if name == "clipnorm" else slow) for name, make in INNER.items()]
)
def test_inner_optimizers(inner):
    """The scale is a power of two, so the results are equal to the bit."""
    same(weights_of(keras2_step, inner)[0], weights_of(keras3_step, inner)[0])


@slow
@needs_tensorflow
def test_fused_updates():
    """In a compiled loop. Results differ by rounding."""
    fused, _ = weights_of(lambda model, optimizer: keras2_step(model, optimizer, "whole"), fuse=True)
    for ours, theirs in zip(fused, plain_weights()[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_tensorflow
@slow_here
@pytest.mark.parametrize("compiled", [in_ci(False), True])
def test_the_custom_loop_of_the_mixed_precision_guide(compiled):
    """Under mixed_float16, with only the import changed. It learns, and skips the bad batch."""
    mixed_precision.set_global_policy("mixed_float16")
    assert mixed_precision.global_policy().compute_dtype == "float16"
    model = small_model()
    optimizer = mixed_precision.LossScaleOptimizer(keras.optimizers.RMSprop(0.02))

    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = mse(model, x, y)
            scaled_loss = optimizer.get_scaled_loss(loss)
        scaled_gradients = tape.gradient(scaled_loss, model.trainable_variables)
        gradients = optimizer.get_unscaled_gradients(scaled_gradients)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    step = tf.function(train_step) if compiled else train_step
    losses = [float(step(tf.constant(x), tf.constant(y))) for _ in range(4) for x, y in zip(*data(), strict=True)]
    assert losses[-1] < 0.5 * losses[0]
    skipped = int(optimizer.skipped_steps)  # the initial scale may also overflow float16
    assert 4 <= skipped < 10
    assert int(optimizer.iterations) == len(losses) - skipped
    assert float(optimizer.loss_scale) == 2.0 ** (15 - skipped)


@needs_tensorflow
@pytest.mark.parametrize(
    ("scale", "compiled"),
    [("dynamic", True), in_ci("dynamic", False), in_ci(128, True), in_ci(128, False)],
)
def test_loop_that_clips_by_the_global_norm(scale, compiled):
    """With the experimental name. Gradients are clipped between unscaling and applying."""
    model, twin = small_model(), small_model()
    optimizer = mixed_precision.experimental.LossScaleOptimizer(keras.optimizers.SGD(0.1), scale)
    assert isinstance(optimizer, mixed_precision.LossScaleOptimizer)

    def step(x, y):
        with tf.GradientTape() as tape:
            scaled_loss = optimizer.get_scaled_loss(mse(model, x, y))
        scaled = tape.gradient(scaled_loss, model.trainable_variables)
        gradients, _ = tf.clip_by_global_norm(optimizer.get_unscaled_gradients(scaled), 0.5)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    step = tf.function(step) if compiled else step
    plain = keras3_step(twin, LossScaleOptimizer(keras.optimizers.SGD(0.1, global_clipnorm=0.5), 1))
    for x, y in zip(*data(), strict=True):
        step(tf.constant(x), tf.constant(y))
        plain(tf.constant(x), tf.constant(y))
        for ours, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert int(optimizer.skipped_steps) == 1
    assert float(optimizer.loss_scale) == (2.0**14 if scale == "dynamic" else 128.0)


@needs_tensorflow
@pytest.mark.parametrize(
    ("compiled", "eagerly"),
    [("whole", False), in_ci("", True), in_ci("", False), in_ci("whole", True)],
)
def test_fit_after_a_loop_and_back(eagerly, compiled):
    """One optimizer alternates between both."""
    trail = []
    for alternates in (True, False):
        model = small_model()
        optimizer = LossScaleOptimizer("adam", RULE)
        model.compile(optimizer, loss="mse", run_eagerly=eagerly)
        loop = keras2_step(model, optimizer, compiled)
        for number, (x, y) in enumerate(zip(*data(), strict=True)):
            loop(tf.constant(x), tf.constant(y)) if alternates and number % 3 != 1 else model.train_on_batch(x, y)
        trail.append(model.get_weights())
    for ours, theirs in zip(*trail, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@slow
@needs_tensorflow
@pytest.mark.parametrize("bad_on", [pytest.param([], marks=thorough), [0], pytest.param([0, 1], marks=thorough)])
def test_replicas_skip_together(bad_on):
    """Under MirroredStrategy, with an overflow on no, one and all replicas."""
    from replicas import Trainer, bad_values, check, mirrored

    class Keras2Trainer(Trainer):
        def _replica_step(self, x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self.model(x, training=True) - y) ** 2) / self.replicas
                scaled = self.optimizer.get_scaled_loss(loss)
            gradients = tape.gradient(scaled, self.model.trainable_variables)
            gradients = self.optimizer.get_unscaled_gradients(gradients)
            self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))

    steps = [6] if bad_on else []
    bad = bad_values(steps, bad_on, np.inf, 2)
    outcomes = [kind(mirrored()).loop(bad) for kind in (Keras2Trainer, Trainer)]
    check(outcomes[0], steps)
    outcomes[0].assert_same_weights(outcomes[1])


@pytest.mark.skipif(BACKEND != "jax", reason="a stateless loop of JAX")
def test_a_stateless_loop_on_jax():
    """Scales and unscales in the scope of the optimizer's values, compiled as a whole."""
    import jax

    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(0.5), RULE), keras.Variable([1.0, 2.0])
    optimizer.build([weight])

    @jax.jit
    def step(state, value, factor):
        with keras.StatelessScope(list(zip(optimizer.variables, state, strict=True))):
            scaled = jax.grad(lambda value: optimizer.get_scaled_loss(ops.sum(value * factor)))(value)
            (gradient,) = optimizer.get_unscaled_gradients([scaled])
        return optimizer.stateless_apply(state, [gradient], [value])

    state, value = [variable.value for variable in optimizer.variables], weight.value
    for factor in (1.0, np.inf, 1.0, 1.0):
        (value,), state = step(state, value, factor)
    np.testing.assert_array_equal(value, [-0.5, 0.5])
    scales = dict(zip((variable.name for variable in optimizer.variables), state, strict=True))
    assert float(scales["dynamic_scale"]) == 2.0**9


# get_scaled_loss and get_unscaled_gradients.


@pytest.mark.parametrize("scale", ["dynamic", 128])
@pytest.mark.parametrize("kind", [float, int, "float16", "float32", "int32"])
def test_scaled_losses_are_at_least_float32(kind, scale):
    """Numbers and tensors of any dtype. In float16, 2**15 * 5 would be infinite."""
    optimizer = LossScaleOptimizer("sgd", scale)
    loss = ops.cast(5, kind) if isinstance(kind, str) else kind(5)
    scaled = optimizer.get_scaled_loss(loss)
    assert float(scaled) == 5 * float(optimizer.loss_scale)
    assert keras.backend.standardize_dtype(scaled.dtype) == "float32"


def test_callable_and_nested_losses():
    """A callable loss is scaled by the scale at the time of its call."""
    optimizer = LossScaleOptimizer("sgd", RULE)
    of_callable = optimizer.get_scaled_loss(lambda: 2.0)
    optimizer.loss_scale = 16.0
    assert float(of_callable()) == 32.0
    nested = optimizer.get_scaled_loss({"a": [1.0, ops.array(2.0)], "b": 3.0})
    assert keras.tree.map_structure(float, nested) == {"a": [16.0, 32.0], "b": 48.0}


@pytest.mark.parametrize("scale", [RULE, 1024])
def test_gradients_are_unscaled_in_float32(scale):
    """None stays None, the smallest float16 gradient does not vanish, and nested structures are kept."""
    optimizer = LossScaleOptimizer("sgd", scale)
    optimizer.get_scaled_loss(1.0)
    tiny = ops.array([2.0**-24], "float16")
    one, none, nested = optimizer.get_unscaled_gradients([ops.array([4.0]), None, {"a": (tiny, None)}])
    assert (float(one[0]), none, nested["a"][1]) == (2.0**-8, None, None)
    assert float(nested["a"][0][0]) == 2.0**-34


@needs_tensorflow
def test_sparse_gradients_stay_sparse():
    """`tf.IndexedSlices` are unscaled and applied."""
    optimizer, table = LossScaleOptimizer(keras.optimizers.SGD(1.0), 4), keras.Variable(np.ones((3, 2)))
    optimizer.get_scaled_loss(1.0)
    slices = tf.IndexedSlices(tf.fill((1, 2), 4.0), tf.constant([1]), tf.constant([3, 2]))
    (unscaled,) = optimizer.get_unscaled_gradients([slices])
    assert isinstance(unscaled, tf.IndexedSlices)
    optimizer.apply_gradients([(unscaled, table)])
    np.testing.assert_array_equal(table.numpy(), [[1, 1], [0, 0], [1, 1]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unscaled_gradients_are_applied_or_skipped(bad):
    """On every backend."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(0.5), 1024), keras.Variable([1.0, 2.0])
    for value in (1.0, bad, 1.0):
        optimizer.get_scaled_loss(1.0)
        take_step(optimizer, optimizer.get_unscaled_gradients([ops.array([1024.0, 1024.0 * value])]), [weight])
    np.testing.assert_array_equal(weight.numpy(), [0.0, 1.0])
    assert int(optimizer.skipped_steps) == 1
    assert float(optimizer.gradient_norm) == pytest.approx(2**0.5)


@needs_tensorflow
@pytest.mark.parametrize("compiled", ["", in_ci("whole")])
def test_loop_resumes_from_a_checkpoint(compiled, tmp_path):
    """The restored scale scales and unscales."""
    x, y = (tf.constant(batches[0]) for batches in data())
    model = small_model()
    optimizer = LossScaleOptimizer("adam", RULE)
    step = keras2_step(model, optimizer, compiled)
    for _ in range(4):
        step(x, y)
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).save(tmp_path / "checkpoint")
    restored, optimizer = small_model(), LossScaleOptimizer("adam", RULE)
    optimizer.build(restored.trainable_variables)
    resumed = keras2_step(restored, optimizer, compiled)
    tf.train.Checkpoint(model=restored, optimizer=optimizer).restore(path).assert_consumed()
    assert float(optimizer.get_scaled_loss(1.0)) == 2.0**11
    step(x, y)
    resumed(x, y)
    same(restored.get_weights(), model.get_weights())


# Explicit calls decide how `apply` unscales. A loss that was never scaled causes one warning.


def loop(*calls, scale=1024.0, steps=3):
    """Makes the named calls in this order, three times. Returns the warnings, and the applied gradient."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), scale), keras.Variable([0.0])
    gradients = [ops.array([1024.0])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for call in calls:
                if call == "apply":
                    take_step(optimizer, gradients, [weight])
                elif call == "get_unscaled_gradients":
                    gradients = optimizer.get_unscaled_gradients([ops.array([1024.0])])
                else:
                    getattr(optimizer, call)(1.0)
    return [str(warning.message) for warning in caught], -float(weight.numpy()[0]) / steps


@pytest.mark.parametrize("calls", [["get_unscaled_gradients", "apply"], ["apply"]], ids=str)
def test_loss_that_was_never_scaled_warns_once(calls):
    """In three steps. Gradients are unscaled according to the calls."""
    messages, applied = loop(*calls)
    assert (len(messages), applied) == (1, 1.0)
    assert "never scaled" in messages[0]


@pytest.mark.parametrize(
    "calls",
    [
        ["scale_loss", "apply"],
        ["get_scaled_loss", "apply"],
        ["get_scaled_loss", "get_unscaled_gradients", "apply"],
        ["scale_loss", "get_unscaled_gradients", "apply"],
    ],
    ids=str,
)
def test_consistent_calls_do_not_warn(calls):
    """Each applies the true gradient."""
    assert loop(*calls) == ([], 1.0)


@pytest.mark.parametrize("calls", [["apply"], ["get_unscaled_gradients", "apply"], ["get_scaled_loss", "apply"]])
def test_scale_of_1_never_warns(calls):
    """As with bfloat16."""
    assert loop(*calls, scale=1) == ([], 1024.0)


@not_on_jax
@pytest.mark.parametrize("name", ["loss_scale", "dynamic", "gradient_norm", "attempted_steps", "fused"])
def test_properties_have_no_side_effects(name):
    """Reading one changes neither warnings nor updates."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1024.0), keras.Variable([0.0])
    optimizer.build([weight])
    getattr(optimizer, name)
    with pytest.warns(UserWarning, match="never scaled"):
        take_step(optimizer, [ops.array([1024.0])], [weight])
    optimizer.get_scaled_loss(1.0)
    gradients = optimizer.get_unscaled_gradients([ops.array([1024.0])])
    getattr(optimizer, name)
    take_step(optimizer, [ops.clip(gradients[0], -2.0, 2.0)], [weight])
    assert float(weight.numpy()[0]) == -2.0


def once(optimizer, weight, *calls):
    """Makes the named calls for a loss with the true gradient 1, and returns the applied gradient."""
    before, grads = weight.numpy()[0], [ops.array([1.0])]
    for call in calls:
        if call in ("scale_loss", "get_scaled_loss"):
            getattr(optimizer, call)(1.0)
            grads = [grad * 1024.0 for grad in grads]
        elif call == "look":
            optimizer.get_unscaled_gradients(iter(grads))
        elif call == "clip":
            grads = [ops.clip(grad, -1e9, 1e9) for grad in grads]
        elif call == "apply":
            optimizer.apply(grads, [weight])
        else:
            grads = optimizer.get_unscaled_gradients(grads)
    return before - weight.numpy()[0]


@not_on_jax
@pytest.mark.parametrize("method", ["apply", "apply_gradients"])
def test_warning_points_at_the_line_of_the_loop(method):
    """Not at a line of Keras or of this package."""
    optimizer, weight = LossScaleOptimizer("sgd", 1024.0), keras.Variable([0.0])
    given = [ops.array([1.0])], [weight]
    with pytest.warns(UserWarning, match="never scaled") as caught:
        optimizer.apply(*given) if method == "apply" else optimizer.apply_gradients(zip(*given, strict=True))
    assert caught[0].filename == __file__


KERAS2, KERAS3 = ("get_scaled_loss", "get_unscaled_gradients", "apply"), ("scale_loss", "apply")


@not_on_jax
@pytest.mark.parametrize(
    "calls",
    [
        KERAS2,
        KERAS3,
        ("get_scaled_loss", "get_unscaled_gradients", "clip", "apply"),
        ("get_scaled_loss", "clip", "apply"),
        ("scale_loss", "look", "apply"),
        ("get_scaled_loss", "look", "apply"),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [KERAS2, in_ci(KERAS3)])
def test_styles_can_alternate(before, calls):
    """Step by step in an eager loop. Scaled gradients stay scaled if they are only unscaled for inspection."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1024), keras.Variable([0.0])
    assert once(optimizer, weight, *before) == 1.0
    assert [once(optimizer, weight, *calls) for _ in range(3)] == [1.0] * 3


@pytest.mark.parametrize("first", ["scale_loss", "get_scaled_loss"])
def test_a_loss_or_gradients_are_scaled_and_unscaled_once(first):
    """The second time is an error."""
    optimizer = LossScaleOptimizer("sgd", 1024)
    loss = getattr(optimizer, first)(1.0)
    with pytest.raises(RuntimeError, match="scaled already"):
        optimizer.get_scaled_loss({"loss": loss})
    gradients = optimizer.get_unscaled_gradients([ops.array([1.0])])
    with pytest.raises(RuntimeError, match="already"):
        optimizer.get_unscaled_gradients(gradients)


@needs_tensorflow
@pytest.mark.parametrize("calls", [("scale_loss", "look", "apply"), KERAS2, KERAS3])
def test_compiled_step_distinguishes_scaled_and_unscaled_gradients(calls):
    """Symbolic tensors of both styles."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1024), keras.Variable([0.0])
    optimizer.build([weight])

    @tf.function
    def step():
        grads = [tf.ones(1) * 1024.0]
        getattr(optimizer, calls[0])(1.0)
        unscaled = grads if calls[1] == "apply" else optimizer.get_unscaled_gradients(grads)
        optimizer.apply(unscaled if calls[1] == "get_unscaled_gradients" else grads, [weight])

    for _ in range(2):
        step()
    assert weight.numpy()[0] == -2.0


@not_on_jax
def test_gradients_of_one_loss_applied_in_two_calls():
    """In both styles, with clipping in one of them."""
    optimizer, weights = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1024), [keras.Variable([0.0]) for _ in "ab"]
    optimizer.build(weights)
    for calls in (("get_scaled_loss", "get_unscaled_gradients"), ("scale_loss",)) * 2:
        grads = [ops.array([1024.0]), ops.array([1024.0])]
        getattr(optimizer, calls[0])(1.0)
        if len(calls) > 1:
            grads = [ops.clip(grad, -2.0, 2.0) for grad in optimizer.get_unscaled_gradients(grads)]
        for grad, weight in zip(grads, weights, strict=True):
            optimizer.apply([grad], [weight])
    np.testing.assert_array_equal([weight.numpy()[0] for weight in weights], [-4.0, -4.0])


@needs_tensorflow
@pytest.mark.parametrize("eagerly", [False, in_ci(True)])
def test_loop_that_never_scales_warns_after_fit(eagerly):
    """`fit` only scales its own loss."""
    model = small_model()
    optimizer = LossScaleOptimizer("sgd", RULE)
    model.compile(optimizer, loss="mse", run_eagerly=eagerly)
    x, y = data()
    model.fit(x[0], y[0], verbose=0)
    with tf.GradientTape() as tape:
        loss = mse(model, x[0], y[0])
    with pytest.warns(UserWarning, match="never scaled"):
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


def trial(run, grads=1024.0):
    """Returns the update of a weight with the true gradient 1, or None for an error."""
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(1.0), 1024), keras.Variable([0.0])
    optimizer.build([weight])
    with contextlib.suppress(RuntimeError):
        run(optimizer, weight, [tf.constant([grads])])
        return -float(weight.numpy()[0])
    return None


def nested(optimizer, weight, grads):
    """Unscales in a nested function."""
    unscale = tf.function(
        lambda grads: [tf.clip_by_norm(grad, 9.0) for grad in optimizer.get_unscaled_gradients(grads)]
    )

    @tf.function
    def step():
        optimizer.scale_loss(1.0)
        optimizer.apply(unscale(grads), [weight])

    step()


def warmed_up(optimizer, weight, grads):
    """Takes one eager step in the style of Keras 2, then a compiled one that does not unscale."""
    optimizer.get_scaled_loss(1.0)
    optimizer.apply(optimizer.get_unscaled_gradients([0.0 * grads[0]]), [weight])

    @tf.function
    def step():
        optimizer.get_scaled_loss(1.0)
        optimizer.apply(grads, [weight])

    step()


def compiled_apply(first, second):
    """Returns a run with one compiled `apply` for both styles."""

    def run(optimizer, weight, grads):
        apply = tf.function(lambda grads: optimizer.apply(grads, [weight]))
        for style, factor in ((first, 0.0), (second, 1.0)):
            getattr(optimizer, "scale_loss" if style == 3 else "get_scaled_loss")(1.0)
            given = [factor * grad for grad in grads]
            apply([1.0 * grad for grad in (given if style == 3 else optimizer.get_unscaled_gradients(given))])

    return run


def in_parts(optimizer, weight, grads):
    """Unscales in a compiled function that does not apply, next to a step that scales."""
    optimizer.get_scaled_loss(1.0)
    tf.function(optimizer.get_unscaled_gradients)(grads)
    optimizer.scale_loss(1.0)
    optimizer.apply(grads, [weight])


@needs_tensorflow
@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (nested, None),
        (warmed_up, 1.0),
        (compiled_apply(3, 2), None),
        (compiled_apply(2, 3), None),
        (compiled_apply(2, 2), 1.0),
        (compiled_apply(3, 3), 1.0),
        (in_parts, None),
    ],
)
def test_step_is_correct_or_an_error(run, moved):
    """Calls inside compiled functions never cause a wrong step silently."""
    assert trial(run) == moved


@needs_tensorflow
def test_train_step_that_never_scales_warns():
    """In a subclassed model, whose gradients could underflow."""

    class Forgetful(keras.Model):
        def train_step(self, batch):
            x, y, _ = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    inputs = keras.Input((3,))
    model = Forgetful(inputs, keras.layers.Dense(1)(inputs))
    model.compile(LossScaleOptimizer("sgd"), loss="mse")
    with pytest.warns(UserWarning, match="never scaled"):
        model.train_on_batch(*(batches[0] for batches in data()))


# Names of Keras 2.


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda opt: mixed_precision.LossScaleOptimizer(opt), DynamicScale()),
        (lambda opt: mixed_precision.LossScaleOptimizer(opt, True), DynamicScale()),
        (lambda opt: mixed_precision.LossScaleOptimizer(opt, False, 128), ConstantScale(128.0)),
        (lambda opt: mixed_precision.LossScaleOptimizer(opt, dynamic=False, initial_scale=128), ConstantScale(128.0)),
        (
            lambda opt: mixed_precision.LossScaleOptimizer(opt, True, 64, 5),
            DynamicScale(initial_scale=64.0, growth_interval=5),
        ),
        (lambda opt: mixed_precision.experimental.LossScaleOptimizer(opt, "dynamic"), DynamicScale()),
        (lambda opt: mixed_precision.experimental.LossScaleOptimizer(opt, loss_scale=128), ConstantScale(128.0)),
        (lambda opt: mixed_precision.experimental.LossScaleOptimizer(opt, RULE), RULE),
    ],
)
def test_constructors(make, rule):
    """Positional and keyword arguments of both APIs, and the attributes."""
    optimizer = make(keras.optimizers.SGD())
    dynamic = isinstance(rule, DynamicScale)
    assert (optimizer.rule, optimizer.dynamic) == (rule, dynamic)
    assert optimizer.initial_scale == float(optimizer.loss_scale) == rule.start().scale
    assert optimizer.dynamic_growth_steps == (rule.growth_interval if dynamic else None)


def test_a_constant_scale_needs_a_number():
    """With positional and keyword arguments."""
    with pytest.raises(ValueError, match="initial_scale"):
        mixed_precision.LossScaleOptimizer("sgd", False)
    with pytest.raises(ValueError, match="dynamic"):
        mixed_precision.LossScaleOptimizer("sgd", True, dynamic=False)


@needs_tensorflow
def test_loss_scale_objects_of_tensorflow():
    """They become the same rule, including its lower bound."""
    wrap, scales = mixed_precision.experimental.LossScaleOptimizer, tf.compat.v1.mixed_precision
    assert wrap("sgd", scales.FixedLossScale(64)).rule == ConstantScale(64.0)
    dynamic = scales.DynamicLossScale(initial_loss_scale=8, increment_period=7, multiplier=4)
    expected = scaling.like("tf1", initial_scale=8.0, growth_interval=7, factor=4.0)
    assert wrap("sgd", dynamic).rule == expected
    ours = mixed_precision.experimental
    assert ours.FixedLossScale(64) == wrap("sgd", scales.FixedLossScale(64)).rule
    assert ours.DynamicLossScale(8, 7, multiplier=4) == expected
    assert ours.DynamicLossScale() == wrap("sgd", scales.DynamicLossScale()).rule
    with pytest.raises(ValueError, match="fixed"):
        wrap("sgd", "fixed")


def test_experimental_optimizer_is_saved_as_the_plain_class(tmp_path):
    """The optimizer of a loaded model is of the plain class."""
    assert keras.saving.get_registered_object("tfmixed>LossScaleOptimizer") is LossScaleOptimizer
    model = small_model()
    model.compile(mixed_precision.experimental.LossScaleOptimizer("sgd", 64), loss="mse")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is LossScaleOptimizer
    assert again.optimizer.rule == ConstantScale(64.0)


@slow
@pytest.mark.parametrize("imported", [pytest.param("tfmixed", marks=thorough), "tfmixed.compat.keras2"])
def test_model_with_an_experimental_optimizer_loads_in_another_process(imported, tmp_path):
    """Even if it only imports the package."""
    model = small_model()
    model.compile(mixed_precision.experimental.LossScaleOptimizer("sgd", 64), loss="mse")
    model.save(tmp_path / "model.keras")
    code = f"import {imported}, keras; print(keras.models.load_model({str(tmp_path / 'model.keras')!r}).optimizer.rule)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == repr(ConstantScale(64.0))


@slow_here
def test_policies_have_the_old_names():
    """Names of all three APIs."""
    policy = mixed_precision.Policy("mixed_float16")
    assert (policy.name, policy.compute_dtype, policy.variable_dtype) == ("mixed_float16", "float16", "float32")
    mixed_precision.set_global_policy(policy)
    assert mixed_precision.global_policy() is policy
    mixed_precision.set_policy("float32")
    assert mixed_precision.experimental.global_policy().name == "float32"


@slow_here
def test_experimental_policies_carry_a_loss_scale(tmp_path):
    """Dynamic for mixed_float16, and None otherwise. Layers of such a policy are saved as usual."""
    experimental = mixed_precision.experimental
    assert experimental.Policy("mixed_bfloat16").loss_scale is None
    experimental.set_policy("mixed_float16")
    assert experimental.global_policy().loss_scale == "dynamic"
    model = small_model()
    assert model.layers[0].dtype_policy == keras.DTypePolicy("mixed_float16")
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").layers[0].compute_dtype == "float16"


@pytest.mark.parametrize(("name", "loss_scale"), [("mixed_float16", 128), ("mixed_float16", None), ("float32", 8)])
def test_policy_loss_scale_that_compile_ignores_warns(name, loss_scale):
    """The warning names the alternative."""
    with pytest.warns(UserWarning, match="compile"):
        policy = mixed_precision.experimental.Policy(name, loss_scale=loss_scale)
    assert policy.loss_scale == loss_scale


def test_module_is_an_attribute_of_the_package():
    """`tfmixed.compat.keras2` needs no import of its own."""
    assert tfmixed.compat.keras2 is mixed_precision
