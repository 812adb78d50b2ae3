"""`keras.distribution`: an overflow on one device is skipped by all. Only JAX distributes, on logical CPUs here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import run_process
from backend import BACKEND, ON_CPU, apply, made_up
from keras import ops
from thorough import covering

from tfmixed import GradScaler, LossScaleOptimizer, LowPrecisionOptimizer, measure_gradients, records, scaling
from tfmixed.callbacks import LossScaleLogger
from tfmixed.scaling import DynamicScale, LogMaxScale

if BACKEND == "jax":
    import jax

pytestmark = [pytest.mark.filterwarnings("ignore:.* were skipped:UserWarning")]
needs_jax = pytest.mark.skipif(BACKEND != "jax" or not ON_CPU, reason="needs logical CPUs of JAX")
slow = pytest.mark.slow

RULE = DynamicScale(initial_scale=2.0**10, growth_interval=5)
DEVICES = [f"cpu:{index}" for index in range(4)]
TOTAL, BATCH, FEATURES = 20, 16, 4
BAD_STEPS = (0, 6, 10, 11, 12)


def data_parallel():
    return keras.distribution.DataParallel(devices=DEVICES)


def model_parallel(**patterns):
    """Returns two pairs of devices, each with half a batch, and half a weight on each device of a pair."""
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), DEVICES)
    layouts = keras.distribution.LayoutMap(mesh)
    halves = {".*first/kernel": (None, "model"), ".*first/bias": ("model",), ".*second/kernel": ("model", None)}
    for pattern, axes in (patterns or halves).items():
        layouts[pattern] = axes
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


KINDS = {"data": data_parallel, "model": model_parallel}
INNER = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "low_precision": lambda: LowPrecisionOptimizer(keras.optimizers.Adam(0.01)),
    "split": lambda: LowPrecisionOptimizer(keras.optimizers.Adam(0.01), weights="split"),
}


def network(optimizer, width=8):
    """Returns a compiled model under the present distribution, the same each time."""
    keras.utils.set_random_seed(1)
    hidden = keras.layers.Dense(width, "relu", name="first")
    layers = [keras.Input((FEATURES,)), hidden, keras.layers.Dense(FEATURES, name="second")]
    model = keras.Sequential(layers, name="net")
    model.compile(optimizer, loss="mse", auto_scale_loss=False)
    optimizer.build(model.trainable_variables)
    return model


def batches(row=None, value=np.nan, drop=False):
    """Returns inputs and targets, with a value in one row of the bad batches, or without these batches."""
    x = np.random.default_rng(0).normal(size=(TOTAL, BATCH, FEATURES)).astype("float32")
    y = x[..., ::-1].copy()
    if row is not None:
        x[list(BAD_STEPS), row, 0] = value
    kept = [step for step in range(TOTAL) if not drop or step not in BAD_STEPS]
    return x[kept], y[kept]


def state_of(model):
    """Returns the model's state as its compiled steps take it, and its shardings."""
    optimizer = model.optimizer
    parts = [model.trainable_variables, model.non_trainable_variables, optimizer.variables, model.metrics_variables]
    values = tuple([variable.value for variable in part] for part in parts)
    return values, tuple([value.sharding for value in part] for part in values)


def compiled_step(model):
    """Returns the compiled training step of the present distribution, without the buffers of `fit`."""
    model._symbolic_build(data_batch=(np.ones((BATCH, FEATURES)), np.ones((BATCH, FEATURES))))
    values, shardings = state_of(model)
    layout = keras.distribution.distribution().get_data_layout((BATCH, FEATURES))
    batch = tuple(keras.distribution.distribute_tensor(np.ones((BATCH, FEATURES), "float32"), layout) for _ in "xy")
    step = jax.jit(lambda state, batch: model.train_step(state, batch), out_shardings=(None, shardings))
    return step.lower(values, (*batch, None)).compile().as_text()


def collectives(text):
    """Returns the shapes of collective operations in each step of a compiled function, and those in its branches."""
    pattern = r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    return tuple(re.findall(pattern, part) for part in reversed(text.split("\nENTRY ")))


def assert_equal_copies(variables):
    """Checks that values are finite, and the same on all devices that hold the same part."""
    for variable in variables:
        parts = {}
        for shard in variable.value.addressable_shards:
            values = np.asarray(shard.data).astype("float32")
            assert np.isfinite(values).all(), variable.path
            np.testing.assert_array_equal(values, parts.setdefault(str(shard.index), values))


def numbers(variables):
    return [ops.convert_to_numpy(ops.cast(variable.value, "float32")) for variable in variables]


def assert_follows_rule(optimizer):
    """Checks counters, scale and events of a run with the bad batches."""
    trace = "".join("F" if step in BAD_STEPS else "T" for step in range(TOTAL))
    scales = [RULE.start().scale, *scaling.simulate(RULE, trace)]
    changes = [step for step in range(TOTAL) if scales[step] != scales[step + 1]]
    assert (int(optimizer.attempted_steps), int(optimizer.skipped_steps)) == (TOTAL, len(BAD_STEPS))
    assert (int(optimizer.iterations), float(optimizer.loss_scale)) == (TOTAL - len(BAD_STEPS), scales[-1])
    assert [event.step for event in optimizer._buffered_events()] == changes


def column_layout(kind):
    """Returns the layout of a matrix under the present distribution: in columns, or whole."""
    axes = (None, "model") if kind == "model" else (None, None)
    return keras.distribution.TensorLayout(axes, keras.distribution.distribution().device_mesh)


class Layer:
    """A dense layer whose training step is compiled on 4 devices, without a model."""

    def __init__(self, kind, optimizer):
        with KINDS[kind]().scope():
            self.layout = keras.distribution.distribution().get_data_layout((BATCH, FEATURES))
            kernel = np.full((FEATURES, 8), 1 / 8, "float32")
            self.weights = [keras.Variable(kernel, layout=column_layout(kind), name="kernel")]
            self.weights.append(keras.Variable(np.zeros(8), name="bias"))
            self.optimizer = optimizer
            optimizer.build(self.weights)
        (self._scale,) = (i for i, v in enumerate(optimizer.variables) if v is optimizer.dynamic_scale)
        self.compiled = jax.jit(self._step)

    def _step(self, state, weights, x):
        def loss(weights):
            return state[self._scale] * ((x @ weights[0] + weights[1] - x.sum(axis=1, keepdims=True)) ** 2).mean()

        return self.optimizer.stateless_apply(state, jax.grad(loss)(weights), weights)

    def arguments(self, x):
        values = ([variable.value for variable in part] for part in (self.optimizer.variables, self.weights))
        return (*values, keras.distribution.distribute_tensor(x, self.layout))

    def train(self, x):
        for batch in x:
            weights, state = self.compiled(*self.arguments(batch))
            for variable, value in zip([*self.weights, *self.optimizer.variables], [*weights, *state], strict=True):
                variable.assign(value)
        return numbers(self.weights)


@functools.cache
def layer(kind):
    return Layer(kind, LossScaleOptimizer(keras.optimizers.Adam(0.01), RULE))


@functools.cache
def start(kind):
    return numbers([*layer(kind).weights, *layer(kind).optimizer.variables])


def train_layer(kind, **bad):
    trained = layer(kind)
    for variable, value in zip([*trained.weights, *trained.optimizer.variables], start(kind), strict=True):
        variable.assign(value)
    return trained.train(batches(**bad)[0])


@needs_jax
@made_up
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_on_one_device_is_skipped_by_all(kind, value):
    """Weights and scale are the same on all devices, and those of a run without the bad batches, bit for bit."""
    start(kind)
    weights = train_layer(kind, row=BATCH - 1, value=value)
    trained = layer(kind)
    assert_equal_copies([*trained.weights, *trained.optimizer.variables])
    assert_follows_rule(trained.optimizer)
    for ours, theirs in zip(weights, train_layer(kind, row=0, drop=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def layer_collectives(trained):
    return collectives(trained.compiled.lower(*trained.arguments(batches()[0][0])).compile().as_text())


def only_scalars(shapes):
    return all(not re.search(r"\[\d", shape) for shape in shapes)


@needs_jax
@pytest.mark.parametrize("kind", KINDS)
def test_the_check_adds_at_most_one_reduction(kind):
    """None where each device has whole weights, and one of scalars where it has parts, as in Keras's own class."""
    per_step, in_branches = layer_collectives(layer(kind))
    keras_own = Layer(kind, keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    assert len(per_step) == len(layer_collectives(keras_own)[0]) == (1 if kind == "data" else 2)
    assert only_scalars(per_step[1:])
    # Taken only if the sums of squares do not show that all values are finite.
    assert len(in_branches) <= (0 if kind == "data" else 2)
    assert only_scalars(in_branches)


@needs_jax
@pytest.mark.parametrize(
    "make", [lambda: LossScaleOptimizer("sgd", 4), lambda: GradScaler()], ids=["optimizer", "scaler"]
)
def test_counters_are_whole_on_each_device(make):
    """Whatever patterns a `LayoutMap` has for weights that are named alike."""
    with model_parallel(**{".*(scale|steps?|count|counts|causes|event_.*)": ("model", "batch")}).scope():
        scaler = make()
        weight = keras.Variable(np.ones((4, 4)), name="kernel")
        if isinstance(scaler, GradScaler):
            assert float(scaler.scale(ops.ones(()))) == 65536.0
            variables = [*scaler._state().variables.values(), *scaler._step_tracker.variables.values()]
        else:
            scaler.build([weight])
            variables = list(scaler._state().variables.values())
    assert len(variables) > 5
    for variable in variables:
        assert variable.value.sharding.is_fully_replicated
        assert len(variable.value.sharding.device_set) == len(DEVICES)


@needs_jax
def test_stored_forms_have_the_layout_of_their_weight():
    """Also where a pattern for the weight matches the name of its state. 8-bit states of parts are refused."""
    layouts = {".*kernel.*": (None, "model"), ".*bias.*": ("model",)}
    with model_parallel(**layouts).scope():
        make = functools.partial(keras.Variable, dtype="bfloat16")
        kernel, bias = make(np.ones((64, 64)), name="kernel"), make(np.ones(8), name="bias")
        optimizer = LowPrecisionOptimizer("adam", "split")
        optimizer.build([kernel, bias])
        for variable in optimizer.variables[2:]:
            assert (
                variable.value.sharding.spec == (kernel if variable.shape == kernel.shape else bias).value.sharding.spec
            )
        with pytest.raises(NotImplementedError, match="int8"):
            LowPrecisionOptimizer("adam", states="int8").build([kernel])
        whole = make(np.ones((64, 64)), name="kernel", layout=column_layout("data"))
        optimizer = LowPrecisionOptimizer("adam", states="int8")
        optimizer.build([whole])
        assert all(variable.value.sharding.is_fully_replicated for variable in optimizer.variables)


@needs_jax
@made_up
@slow
def test_low_precision_rounds_parts_as_the_whole():
    """The same random bits for each element, so that weights and states are those of one device, bit for bit."""
    results = []
    for scope in (model_parallel().scope, contextlib.nullcontext):
        with scope():
            layout = column_layout("model") if keras.distribution.distribution() else None
            weight = keras.Variable(np.ones((64, 64)), dtype="bfloat16", layout=layout, name="kernel")
            optimizer = LossScaleOptimizer(LowPrecisionOptimizer("adam"), RULE)
            optimizer.build([weight])
        step = jax.jit(optimizer.stateless_apply)
        weights, state = [weight.value], [variable.value for variable in optimizer.variables]
        for gradient in np.random.default_rng(0).normal(size=(3, 64, 64)).astype("float32"):
            weights, state = step(state, [jax.device_put(gradient, weight.value.sharding)], weights)
        stored = [*weights, *state[-len(optimizer.inner_optimizer.variables) :]]
        results.append([np.asarray(value).astype("float32") for value in stored])
    for parts, whole in zip(*results, strict=True):
        np.testing.assert_array_equal(parts, whole)


@needs_jax
@pytest.mark.parametrize("kind", [pytest.param("data", marks=slow), "model"])
def test_a_grad_scaler_skips_eagerly(kind):
    """On JAX, `GradScaler` works eagerly."""
    with KINDS[kind]().scope():
        weight = keras.Variable(np.ones((4, 4)), name="kernel", layout=column_layout(kind))
        optimizer, scaler = keras.optimizers.SGD(1.0), GradScaler(init_scale=8.0)
        for corner in (np.inf, 8.0):
            gradient = np.full((4, 4), 8.0, "float32")
            gradient[-1, -1] = corner
            scaler.step(optimizer, [(jax.device_put(gradient, weight.value.sharding), weight)])
            scaler.update()
    assert (int(scaler.skipped_steps), scaler.get_scale(), int(optimizer.iterations)) == (1, 4.0, 1)
    assert_equal_copies([weight, *scaler.variables])
    np.testing.assert_array_equal(ops.convert_to_numpy(weight), np.full((4, 4), -1.0))


class Trainer:
    """A model on the devices of a distribution, or on one for None, that is trained by `fit`."""

    def __init__(self, kind, inner="adam", policy="float32", width=8):
        self.scope = KINDS[kind]().scope if kind else contextlib.nullcontext
        keras.config.set_dtype_policy(policy)
        with self.scope():
            self.model = network(LossScaleOptimizer(INNER[inner](), RULE), width)
        self.optimizer = self.model.optimizer
        self.variables = [*self.model.variables, *self.optimizer.variables]
        self.start = [ops.copy(variable.value) for variable in self.variables]

    def fit(self, *callbacks, **bad):
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(ops.copy(value))  # `fit` donates the buffers
        x, y = (values.reshape(-1, FEATURES) for values in batches(**bad))
        with self.scope():
            self.model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=list(callbacks))
        return numbers(self.model.trainable_variables)


RUNS = covering(1, list(KINDS), {"first": 0, "last": BATCH - 1}, ["adam", "global_clipnorm", "low_precision", "split"])


@needs_jax
@slow
@pytest.mark.parametrize(("kind", "row", "inner"), RUNS)
def test_fit_skips_on_all_devices(kind, row, inner, tmp_path):
    """The log has the changes of the scale. On one device the sums of a batch are rounded in another order."""
    is_low = inner in ("low_precision", "split")
    policy, width = ("bfloat16", 1024) if is_low else ("float32", 8)  # states of large weights are bfloat16
    trainer = Trainer(kind, inner, policy, width)
    log = tmp_path / "log.jsonl"
    weights = trainer.fit(LossScaleLogger(log, verbose=0), row=row)
    assert_equal_copies(trainer.variables)
    assert_follows_rule(trainer.optimizer)
    logged = [dataclasses.replace(change, epoch=None) for change in records.read_changes(log)]
    assert logged == trainer.optimizer._buffered_events()
    without = trainer.fit(row=row, drop=True)
    single = Trainer(None, inner, policy, width).fit(row=row)
    for ours, dropped, alone in zip(weights, without, single, strict=True):
        np.testing.assert_array_equal(ours, dropped)
        assert np.linalg.norm(ours - alone) <= (0.1 if is_low else 1e-6) * np.linalg.norm(alone)


@needs_jax
@slow
@pytest.mark.parametrize("inner", ["adam", "low_precision"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_adds_at_most_one_reduction(kind, inner):
    """None with `DataParallel`."""
    keras.config.set_dtype_policy("bfloat16" if inner == "low_precision" else "mixed_float16")
    found = []
    for wrap in (lambda inner: inner, keras.optimizers.LossScaleOptimizer, LossScaleOptimizer):
        with KINDS[kind]().scope():
            found.append(collectives(compiled_step(network(wrap(INNER[inner]()), width=1024))))
    (bare, _), (keras_own, _), (ours, in_branches) = found
    assert len(ours) <= len(keras_own)
    assert len(ours) - len(bare) <= (0 if kind == "data" else 1)
    assert len(in_branches) <= (0 if kind == "data" else 2)
    assert only_scalars(in_branches)


@needs_jax
@made_up
@slow
def test_the_largest_value_takes_one_more_reduction():
    """A rule that needs it cannot get it from a sum."""
    counts = []
    for rule in (RULE, LogMaxScale()):
        per_step, _ = layer_collectives(Layer("model", LossScaleOptimizer(keras.optimizers.Adam(0.01), rule)))
        assert only_scalars(per_step[1:])
        counts.append(len(per_step))
    assert counts == [2, 3]


@needs_jax
@slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_do_not_depend_on_the_devices(kind, tmp_path):
    """A model that was saved on 4 devices continues on one, and the other way round."""
    trainers = {name: Trainer(name) for name in (kind, None)}
    for source, target in ((kind, None), (None, kind)):
        trainers[source].fit(row=3)
        trainers[source].model.save(tmp_path / "model.keras")
        with trainers[target].scope():
            loaded = keras.models.load_model(tmp_path / "model.keras")
            for ours, theirs in zip(
                [*loaded.trainable_variables, *loaded.optimizer.variables],
                [*trainers[source].model.trainable_variables, *trainers[source].optimizer.variables],
                strict=True,
            ):
                np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))
            loaded.fit(*(values[1] for values in batches()), batch_size=BATCH, verbose=0)
        assert (int(loaded.optimizer.attempted_steps), int(loaded.optimizer.skipped_steps)) == (TOTAL + 1, 5)
        assert_equal_copies([*loaded.variables, *loaded.optimizer.variables])


@needs_jax
@slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_measured_on_all_devices(kind):
    """The counts are those of one device, and nothing changes."""
    tables = []
    for name in (kind, None):
        trainer = Trainer(name, policy="mixed_float16")
        with trainer.scope():
            x, y = (values[:2].reshape(-1, FEATURES) for values in batches())
            tables.append(measure_gradients(trainer.model, (x, y), steps=2, batch_size=BATCH))
        for variable, value in zip(trainer.variables, trainer.start, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), ops.convert_to_numpy(value))
    ours, theirs = ([(one.name, one.kind, one.zeros, one.nonzeros) for one in table] for table in tables)
    assert ours == theirs


@needs_jax
@slow
@pytest.mark.parametrize("kind", KINDS)
def test_scripts_run_on_several_devices(kind, tmp_path):
    """`tfmixed run` of a script that sets a distribution, under a half-precision policy."""
    code = f"""
import jax
jax.config.update("jax_num_cpu_devices", 4)
devices = {DEVICES}
if {kind!r} == "data":
    distribution = keras.distribution.DataParallel(devices=devices)
else:
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
keras.distribution.set_distribution(distribution)
model = net()
model.compile("adam", LOSS)
model.fit(x, y, batch_size=16, verbose=0)
print(len(model.layers[0].kernel.value.sharding.device_set), int(model.optimizer.attempted_steps))
"""
    done, _ = run_process.run(tmp_path, run_process.BEGIN + code, "--policy", "mixed_float16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["4", "4"]


@made_up
@pytest.mark.skipif(BACKEND == "jax", reason="JAX distributes")
@pytest.mark.skipif(keras.__version__ < "3.15" and BACKEND == "tensorflow", reason="Keras 3.14 cannot set it there")
@pytest.mark.parametrize("kind", KINDS)
def test_other_backends_train_on_one_device(kind):
    """Keras 3.15 accepts a distribution there and ignores it, and so do the optimizers."""
    with KINDS[kind]().scope():
        weight = keras.Variable(np.ones((64, 64)), dtype="bfloat16", name="kernel")
        optimizer = LossScaleOptimizer(LowPrecisionOptimizer("sgd", "nearest"), DynamicScale(initial_scale=8.0))
        optimizer.learning_rate = 1.0
        for value in (np.inf, 8.0):
            apply(optimizer, [ops.full((64, 64), value, "bfloat16")], [weight])
    assert (int(optimizer.skipped_steps), float(optimizer.loss_scale)) == (1, 4.0)
    np.testing.assert_array_equal(numbers([weight])[0], np.full((64, 64), -1.0))


# Keras's guide to several GPUs with PyTorch: a process for each, whose gradients `DistributedDataParallel` averages.
DDP = """
import sys, keras, numpy as np, torch
import tfmixed
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
trained = torch.nn.parallel.DistributedDataParallel(model)
weights = model.trainable_variables
optimizer, scaler = keras.optimizers.Adam(0.01), tfmixed.GradScaler(init_scale=1024.0, growth_interval=5)
if sys.argv[3] == "optimizer":
    rule = tfmixed.scaling.DynamicScale(initial_scale=1024.0, growth_interval=5)
    optimizer = scaler = tfmixed.LossScaleOptimizer(optimizer, rule)
x = np.random.default_rng(0).normal(size=(20, 2, 8, 4)).astype("float32")
y = x.sum(axis=-1, keepdims=True)
for step in (0, 6, 10, 11, 12):
    x[step, 1, -1, 0] = np.inf  # on the second process only
kept = [step for step in range(20) if sys.argv[4] == "all" or step not in (0, 6, 10, 11, 12)]
for step in kept:
    model.zero_grad()
    loss = ((trained(torch.tensor(x[step, rank])) - torch.tensor(y[step, rank])) ** 2).mean()
    (optimizer.scale_loss(loss) if scaler is optimizer else scaler.scale(loss)).backward()
    grads = [weight.value.grad for weight in weights]
    with torch.no_grad():
        if scaler is optimizer:
            optimizer.apply(grads, weights)
        else:
            scaler.step(optimizer, zip(grads, weights))
            scaler.update()
numbers = [float(scaler.loss_scale), int(scaler.attempted_steps), int(scaler.skipped_steps)]
np.savez(f"{folder}/{rank}.npz", *[weight.numpy() for weight in weights], numbers)
torch.distributed.destroy_process_group()
"""


def train_in_two_processes(folder, *arguments):
    """Returns the weights and counters of each process."""
    folder.mkdir()
    commands = [[sys.executable, "-c", DDP, str(rank), str(folder), *arguments] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    return [list(np.load(folder / f"{rank}.npz").values()) for rank in range(2)]


@pytest.mark.skipif(BACKEND != "torch", reason="needs PyTorch")
@slow
@pytest.mark.parametrize("scaler", ["optimizer", "scaler"])
def test_processes_of_pytorch_skip_together(scaler, tmp_path):
    """The check sees averaged gradients, which are the same in all processes, and communicates nothing."""
    first, second = train_in_two_processes(tmp_path / "all", scaler, "all")
    without, _ = train_in_two_processes(tmp_path / "kept", scaler, "kept")
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(first[:-1], without[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    trace = "".join("F" if step in BAD_STEPS else "T" for step in range(TOTAL))
    assert first[-1].tolist() == [scaling.simulate(RULE, trace)[-1], TOTAL, len(BAD_STEPS)]
