"""`LowPrecisionOptimizer`: weights and states in few bits, updated in float32 arithmetic."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from backend import BACKEND, take_step, tf
from keras import ops
from thorough import covering, few, mostly_slow

from tfmixed import LossScaleOptimizer, LowPrecisionOptimizer, scaling

slow = pytest.mark.slow
WEIGHTS, STATES = ("stochastic", "split", "nearest"), ("float32", "bfloat16", "int8")
EXCLUDED = {
    "Optimizer",  # the base class
    "LossScaleOptimizer",  # stands outside
    "MultiOptimizer",  # its members are wrapped
}
KINDS = {
    name: kind
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer) and name not in EXCLUDED
}
# Where Keras's own code needs it to take part in an update.
ARGUMENTS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}, "Adam": {"amsgrad": True}}
# One form by default.
FORMS = mostly_slow(["stochastic-int8"], *({name: name for name in names} for names in (WEIGHTS, STATES)))
SHAPES = {"kernel": (80, 64), "bias": (64,), "embeddings": (70, 64)}


def initial(seed=0, shapes=SHAPES):
    """Returns values that bfloat16 holds exactly."""
    rng = np.random.default_rng(seed)
    return {name: exact(rng.normal(size=shape)) for name, shape in shapes.items()}


def exact(values):
    return ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(values, "bfloat16"), "float32"))


def variables(dtype="bfloat16", shapes=SHAPES, **arguments):
    return [keras.Variable(value, dtype=dtype, name=name, **arguments) for name, value in initial(0, shapes).items()]


def gradients(step, shapes=SHAPES):
    """Returns the gradients of a step, whose sizes span some decades."""
    rng = np.random.default_rng(1000 + step)
    return [exact(rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0, shape)) for shape in shapes.values()]


def train(optimizer, weights, steps, grads=gradients, dtype=None):
    """Applies gradients in a compiled step where the backend has one."""
    if not optimizer.built:
        optimizer.build(weights)
    step = tf.function(lambda *g: optimizer.apply(g, weights)) if BACKEND == "tensorflow" else None
    for number in steps if isinstance(steps, range) else range(steps):
        values = [ops.convert_to_tensor(gradient, dtype or weights[0].dtype) for gradient in grads(number)]
        step(*values) if step else take_step(optimizer, values, weights)
    return optimizer


def numbers(variables):
    """Returns values of variables as float32 or integer arrays."""
    values = [ops.convert_to_numpy(variable) for variable in variables]
    return [value.astype("float32") if value.dtype.kind not in "iu" else value for value in values]


def assert_same(ours, theirs):
    for one, two in zip(numbers(ours), numbers(theirs), strict=True):
        np.testing.assert_array_equal(one, two)


def options(kind, **arguments):
    """Returns hyperparameters of every sort."""
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.5)
    own = {"learning_rate": rate, "weight_decay": 0.01, "global_clipnorm": 5.0, "use_ema": True, "ema_momentum": 0.5}
    return kind(**ARGUMENTS.get(kind.__name__, {}), **own, **arguments)


def moved(weights):
    return [np.mean(new != old) for new, old in zip(numbers(weights), initial().values(), strict=True)]


# All inner optimizers.


@pytest.mark.parametrize(("name", "weights", "states"), covering(1, list(KINDS), WEIGHTS, STATES))
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.thorough)])
def test_every_optimizer_trains(name, weights, states, dtype):
    """With a schedule, clipping, weight decay, averages and accumulation: weights move and stay finite."""
    inner = options(KINDS[name], gradient_accumulation_steps=2, ema_overwrite_frequency=3)
    own = variables(dtype)
    optimizer = train(LowPrecisionOptimizer(inner, weights, states), own, 8)
    assert [variable.dtype for variable in own] == [dtype] * 3
    assert all(np.isfinite(value).all() for value in numbers([*own, *optimizer.variables]))
    assert min(moved(own)) > 0.001  # Adadelta's first updates are small
    assert int(optimizer.iterations) == int(ops.convert_to_numpy(inner._iterations)) // 2 == 4


@pytest.mark.parametrize("name", few(["SGD", "Adam", "Nadam", "Adafactor"], {name: name for name in KINDS}))
def test_split_weights_are_those_of_float32(name):
    """Bit for bit those of Keras's optimizer over float32 variables, and so are states and averages."""
    if name == "ScheduleFreeAdamW" and BACKEND != "jax":
        pytest.skip("Keras reads a state after it has written it, where its code for JAX has the value before")
    inner = [options(KINDS[name], gradient_accumulation_steps=2, ema_overwrite_frequency=3) for _ in range(2)]
    check_split(*inner, steps=8)


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=slow)])
def test_split_weights_are_those_of_float32_after_many_steps(steps):
    """With Adam, whose updates are small against a bfloat16 number."""
    check_split(keras.optimizers.Adam(1e-4), keras.optimizers.Adam(1e-4), steps)


def check_split(inner, plain, steps):
    own, wide = variables(), variables("float32")
    optimizer = train(LowPrecisionOptimizer(inner, "split", "float32", fuse=False), own, steps)
    train(plain, wide, steps, dtype="float32")
    assert_same([view.value for view in optimizer._created.views], wide)
    assert_same(optimizer._plain_variables(), plain.variables)
    assert min(moved(wide)) > 0.1


@pytest.mark.parametrize("name", ["Adam", "Nadam"])
@pytest.mark.skipif(BACKEND != "torch", reason="Keras updates all variables at once on PyTorch only")
def test_large_models_are_updated_in_parts(name, monkeypatch):
    """A part at a time, so that few float32 values exist at once. What Nadam has for all changes once a step."""
    monkeypatch.setattr("tfmixed._core.low_precision_optimizer._CHUNK", 64)
    check_split(KINDS[name](0.01), KINDS[name](0.01), 4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA compiles an update on TensorFlow")
@pytest.mark.parametrize(("weights", "states"), FORMS)
def test_fused_updates(weights, states):
    """They are those of an update that is not, up to the order of float32 operations."""
    found = []
    for fuse in (True, False):
        own = variables()
        optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states, fuse=fuse)
        train(optimizer, own, 3)
        assert bool(optimizer.fused) == fuse
        found.append(numbers(own))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=2.0**-7, atol=1e-3)
        assert np.mean(one != two) < 0.02


# Rounding.


@pytest.mark.parametrize(("weights", "survives"), [("stochastic", True), ("nearest", False)])
@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=slow)])
def test_small_updates_survive_on_average(weights, survives, seed):
    """200 updates of 1e-5 on 1.5, where the next bfloat16 number is 0.0078 away.

    A weight goes down by one number in 0.256 of 200 updates, with a standard deviation of 0.506: the mean of 5,120
    weights has one of 5.5e-5.
    """
    own = [keras.Variable(np.full((80, 64), 1.5), dtype="bfloat16", name="kernel")]
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(1e-5), weights, seed=seed)
    train(optimizer, own, 200, lambda _: [np.ones((80, 64), "float32")])
    (value,) = numbers(own)
    assert (value == 1.5).all() != survives
    assert abs(value.mean() - (1.5 - 200e-5 * survives)) < 5 * 5.5e-5


def test_noise_depends_on_seed_variable_element_and_step():
    """And is the same in each run."""

    def run(seed):
        own = variables(shapes={"a": (80, 64), "b": (80, 64)})
        for variable in own:
            variable.assign(np.ones((80, 64)))
        optimizer, found = LowPrecisionOptimizer(keras.optimizers.SGD(1.0), seed=seed), []
        for step in range(2):
            # A third of the way to the next number, which is 2**-8 below.
            half = lambda _: [np.full((80, 64), 2.0**-8 / 3, "float32")] * 2  # noqa: E731
            for variable in own:
                variable.assign(np.ones((80, 64)))
            train(optimizer, own, range(step, step + 1), half)
            found += [value < 1 for value in numbers(own)]
        return found

    first, again, reseeded = run(0), run(0), run(4096)
    np.testing.assert_array_equal(first, again)
    drawn = [*first, *reseeded]
    for index, one in enumerate(drawn):
        assert abs(one.mean() - 1 / 3) < 5 * (2 / 9 / one.size) ** 0.5 + 2e-3  # gradients are bfloat16 too
        for two in drawn[index + 1 :]:
            assert abs(np.corrcoef(one.reshape(-1), two.reshape(-1))[0, 1]) < 5 / one.size**0.5


# Skipped steps.


def scaled(step, scale, bad=None):
    grads = [gradient * scale for gradient in gradients(step)]
    if bad is not None:
        grads[0][3, 5] = bad
    return grads


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=slow)])
@pytest.mark.parametrize(("weights", "states"), [("stochastic", "int8"), ("split", "bfloat16"), ("nearest", "float32")])
def test_a_skipped_step_changes_nothing(weights, states, bad):
    """Inside a dynamic `LossScaleOptimizer`: later steps draw the noise that they would have drawn without it."""

    def run(steps):
        own, rule = variables(), scaling.DynamicScale(initial_scale=16.0)
        inner = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights, states)
        optimizer = LossScaleOptimizer(inner, rule)
        optimizer.build(own)
        apply_step = tf.function(lambda *g: optimizer.apply(g, own)) if BACKEND == "tensorflow" else None
        optimizer.scale_loss(0.0)
        for step in steps:
            values = scaled(step or 0, float(optimizer.loss_scale), bad if step is None else None)
            values = [ops.convert_to_tensor(value, "bfloat16") for value in values]
            before = numbers([*own, *inner.variables])
            apply_step(*values) if apply_step else take_step(optimizer, values, own)
            if step is None:
                for old, new in zip(before, numbers([*own, *inner.variables]), strict=True):
                    np.testing.assert_array_equal(old, new)
        assert int(optimizer.skipped_steps) == steps.count(None)
        return [*own, *inner.variables]

    assert_same(run([0, None, 1, None, None, 2]), run([0, 1, 2]))


# Attributes.


@pytest.mark.parametrize("name", ["weights", "states", "seed"])
def test_forms_are_fixed(name):
    """Variables are created for them."""
    optimizer = LowPrecisionOptimizer("adam")
    with pytest.raises(AttributeError, match=name):
        setattr(optimizer, name, getattr(optimizer, name))


@pytest.mark.parametrize("way", ["list", "names"])
def test_variables_are_excluded_from_weight_decay(way):
    """By themselves or by name, with the method of the wrapper or of the inner optimizer before."""
    own = variables("bfloat16")
    inner = keras.optimizers.SGD(0.5, weight_decay=0.5)
    optimizer = LowPrecisionOptimizer(inner, "split")
    excluded = {"var_list": [own[1]]} if way == "list" else {"var_names": ["bias"]}
    optimizer.exclude_from_weight_decay(**excluded)
    train(optimizer, own, 1, lambda _: [np.zeros(shape, "float32") for shape in SHAPES.values()])
    assert [share > 0.9 for share in moved(own)] == [True, False, True]


def test_variables_excluded_before():
    """The inner optimizer's own list, made before it was wrapped."""
    own, inner = variables("bfloat16"), keras.optimizers.SGD(0.5, weight_decay=0.5)
    inner.exclude_from_weight_decay(var_list=[own[1]])
    optimizer = LowPrecisionOptimizer(inner, "split")
    train(optimizer, own, 1, lambda _: [np.zeros(shape, "float32") for shape in SHAPES.values()])
    assert [share > 0.9 for share in moved(own)] == [True, False, True]


# Errors.


def built():
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable([1.0])])
    return optimizer


ERRORS = {
    "weights": (lambda: LowPrecisionOptimizer("sgd", weights="kahan"), ValueError, "weights"),
    "states": (lambda: LowPrecisionOptimizer("sgd", states="float8"), ValueError, "states"),
    "fuse": (lambda: LowPrecisionOptimizer("sgd", fuse="maybe"), ValueError, "fuse"),
    "built": (lambda: LowPrecisionOptimizer(built()), ValueError, "from_keras"),
    "centered": (lambda: LowPrecisionOptimizer(keras.optimizers.RMSprop(centered=True)), ValueError, "centered"),
    "not one": (lambda: LowPrecisionOptimizer(3), TypeError, "optimizer"),
    "scaling": (lambda: LowPrecisionOptimizer(LossScaleOptimizer("sgd")), ValueError, "scale"),
    "Keras's": (
        lambda: LowPrecisionOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())),
        ValueError,
        "scale",
    ),
    "twice": (lambda: LowPrecisionOptimizer(LowPrecisionOptimizer("sgd")), ValueError, "itself"),
    "arguments": (lambda: LowPrecisionOptimizer("sgd", clipnorm=1.0), TypeError, "clipnorm"),
    "seed": (lambda: LowPrecisionOptimizer("sgd", seed=0.5), ValueError, "seed"),
}


@pytest.mark.parametrize(("make", "kind", "word"), ERRORS.values(), ids=ERRORS)
def test_arguments_out_of_range_are_errors(make, kind, word):
    """They name the argument, or what to do."""
    with pytest.raises(kind, match=word):
        make()


def test_centered_rmsprop_needs_float32_states():
    """And has them on request."""
    own = variables()
    train(LowPrecisionOptimizer(keras.optimizers.RMSprop(centered=True), states="float32"), own, 3)
    assert all(np.isfinite(value).all() for value in numbers(own))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_float16_variables_are_rounded_to_nearest_only(weights):
    """The error names the variable."""
    own = [keras.Variable(np.ones((80, 64)), dtype="float16", name="kernel")]
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights)
    if weights != "nearest":
        with pytest.raises(ValueError, match="kernel"):
            optimizer.build(own)
        return
    train(optimizer, own, 2, lambda _: [np.ones((80, 64), "float32")])
    np.testing.assert_allclose(numbers(own)[0], 0.98, atol=1e-3)


def test_wrong_calls_are_errors():
    """Before anything is changed."""
    own, optimizer = variables(), LowPrecisionOptimizer("adam")
    with pytest.raises(ValueError, match="trainable_variables"):
        optimizer.apply([ops.ones((64,))])
    with pytest.raises(ValueError, match="built"):
        optimizer.set_weights([])
    optimizer.build(own)
    with pytest.raises(ValueError, match="gradient"):
        optimizer.apply([None] * 3, own)
    with pytest.raises(ValueError, match="each variable"):
        optimizer.apply([ops.ones((64,))], own)
    with pytest.raises(ValueError, match="among"):
        optimizer.apply([ops.ones((64,))], [keras.Variable(np.ones(64), dtype="bfloat16", name="stranger")])
    with pytest.raises(ValueError, match="same shape"):
        optimizer.set_weights([value[:-1] for value in numbers(optimizer.variables)[2:]])
    assert int(optimizer.iterations) == 0
    assert max(moved(own)) == 0


# Memory.


@pytest.mark.parametrize(
    ("dtype", "weights", "states", "wanted"),
    [
        ("float32", "stochastic", "float32", 16),
        ("float32", "stochastic", "bfloat16", 12),
        ("bfloat16", "stochastic", "bfloat16", 8),
        ("bfloat16", "stochastic", "int8", 6 + 2 * 4 / 256),
        ("bfloat16", "split", "bfloat16", 10),
        ("bfloat16", "split", "float32", 14),
    ],
)
def test_bytes_of_a_parameter(dtype, weights, states, wanted):
    """Counted from all live variables, with a gradient in the dtype of its weight."""
    own = [keras.Variable(np.ones((256, 256)), dtype=dtype, name="kernel")]
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(), weights, states)
    train(optimizer, own, 1, lambda _: [np.ones((256, 256), "float32")])
    found = [ops.convert_to_numpy(variable).nbytes for variable in [*own, *optimizer.variables] if len(variable.shape)]
    assert (sum(found) + ops.convert_to_numpy(own[0]).nbytes) / 2**16 == pytest.approx(wanted)


def test_small_variables_and_embeddings_keep_float32_states():
    """Below 4,096 elements, and by the variable's path instead of 8-bit states."""
    own = variables()
    optimizer = LowPrecisionOptimizer(keras.optimizers.Adam(), states="int8")
    optimizer.build(own)
    dtypes = {variable.path.rpartition("/")[2]: variable.dtype for variable in optimizer.variables[2:]}
    assert {name: dtype for name, dtype in dtypes.items() if "kernel" not in name} == {
        f"{name}_{state}": "float32" for name in ("bias", "embeddings") for state in ("momentum", "velocity")
    }
    assert sorted(dtype for name, dtype in dtypes.items() if "kernel" in name) == ["float32"] * 2 + ["uint8"] * 2
    halves = LowPrecisionOptimizer(keras.optimizers.Adam(), states="bfloat16")
    halves.build(own)
    assert [variable.dtype for variable in halves.variables if "embeddings" in variable.path] == ["bfloat16"] * 2


def test_copies_of_weights_are_float32():
    """Such as the second sequence of ScheduleFreeAdamW, whose errors would be those of the weights."""
    optimizer = LowPrecisionOptimizer(keras.optimizers.ScheduleFreeAdamW(), states="int8")
    optimizer.build(variables(shapes={"kernel": (80, 64)}))
    found = {variable.path.rpartition("kernel_")[2]: variable.dtype for variable in optimizer.variables[2:]}
    assert found == {"momentum": "float32", "velocity_codes": "uint8", "velocity_scales": "float32"}
