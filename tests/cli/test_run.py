"""Patches of `tfmixed run`, applied in this process and undone after each test."""

from __future__ import annotations

import re
import sys
import zipfile

import keras
import numpy as np
import pytest
from backend import BACKEND, needs_tensorflow

import tfmixed
from tfmixed import records
from tfmixed._cli.run import messages
from tfmixed._cli.run.options import RunOptions
from tfmixed._cli.run.run_summary import RunSummary
from tfmixed._cli.run.startup import KerasRun
from tfmixed._cli.run.tf1 import TF1Run

if BACKEND == "tensorflow":
    import tensorflow as tf

X, Y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.arange(64) % 3
LOSS = "sparse_categorical_crossentropy"
POLICY_MODULE = sys.modules["keras.src.dtype_policies.dtype_policy"]


@pytest.fixture
def apply(monkeypatch, tmp_path):
    """Returns a function that applies the patches with the given options."""
    methods = [(keras.Model, "compile"), (keras.Model, "make_train_function"), (keras.Model, "fit")]
    methods += [(keras.optimizers.Optimizer, "apply"), (keras.optimizers.Optimizer, "build")]
    if BACKEND == "tensorflow":
        methods.append((tf.GradientTape, "gradient"))
    for kind, name in methods:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        monkeypatch.setattr(owner, name, vars(owner)[name])
    saving = sys.modules["keras.src.saving.saving_api"]
    monkeypatch.setattr(saving, "save_model", saving.save_model)
    monkeypatch.setattr(POLICY_MODULE, "dtype_policy", POLICY_MODULE.dtype_policy)
    monkeypatch.setattr(messages, "at_exit", lambda _: None)
    monkeypatch.setattr(messages, "_refused", False)
    if BACKEND == "torch":
        optimizers = sys.modules["torch.optim.optimizer"]
        monkeypatch.setattr(optimizers, "register_optimizer_step_pre_hook", lambda _: None)

    def apply(policy="mixed_float16", **options):
        run = KerasRun(RunOptions(str(tmp_path / "runs"), policy=policy, **options))
        for name, patch in {**run._functions, "keras": run._patch_classes}.items():
            patch(sys.modules[name])
        keras.config.set_dtype_policy(policy)
        POLICY_MODULE.dtype_policy()
        return run

    return apply


def net(*first, **last):
    return keras.Sequential(
        [*first, keras.layers.Dense(8, "relu"), keras.layers.Dense(3, "softmax", name="out", **last)]
    )


def lines(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("tfmixed: ")]


def test_fit_scales_logs_and_makes_islands(apply, capfd, tmp_path):
    """Of a model that `fit` builds: the policy, a scaling optimizer, a softmax in float32, a log, the last line."""
    run = apply()
    model = net()
    model.compile("sgd", LOSS)
    history = model.fit(X, Y, epochs=2, batch_size=32, verbose=0).history
    assert (list(history), isinstance(model.optimizer, tfmixed.LossScaleOptimizer)) == (["loss"], True)
    assert keras.backend.standardize_dtype(model(X).dtype) == "float32"
    for part in ("4 steps", "0 skipped", "scale 32768", "1 layer"):
        assert part in run.summary.describe()
    log = records.read_log(tmp_path / "runs" / "loss_scale.jsonl")
    assert [record.step for record in log if isinstance(record, records.Progress)] == [1, 3]
    (first,) = lines(capfd)
    assert first.startswith("tfmixed: mixed_float16 (--policy")
    assert "dynamic" in first
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert b"tfmixed" not in archive.read("config.json")


def test_train_on_batch_is_scaled_and_counted(apply):
    """Also without islands."""
    run = apply(islands=False, scale="1024")
    model = net(keras.Input((4,)))
    model.compile("sgd", LOSS)
    for _ in range(2):
        model.train_on_batch(X, Y)
    run.finish()
    assert re.search(r"2 steps.* 1024", run.summary.describe())


def test_optimizers_of_the_script_stay(apply, capfd):
    """Keras's and tfmixed's scaling optimizers, and any with `auto_scale_loss=False`."""
    apply()
    for optimizer, named in (
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), {}),
        (tfmixed.LossScaleOptimizer("sgd", 64), {}),
        (keras.optimizers.SGD(), {"auto_scale_loss": False}),
    ):
        model = net(keras.Input((4,)))
        model.compile(optimizer, LOSS, **named)
        assert model.optimizer is optimizer
    assert len(lines(capfd)) == 4


def test_weights_and_states_in_few_bits(apply, capfd, tmp_path):
    """The script's own optimizer is wrapped, with a scale inside one that scales; files need no tfmixed."""
    for scale, kinds in ((None, ["LowPrecisionOptimizer"]), ("64", ["RunOptimizer", "LowPrecisionOptimizer"])):
        apply("bfloat16", weights="stochastic", states="int8", scale=scale, islands=False)
        model, own = net(keras.Input((4,))), keras.optimizers.Adam(0.1)
        model.compile(own, LOSS)
        before = keras.ops.convert_to_numpy(keras.ops.cast(model.trainable_variables[0], "float32"))
        model.fit(X, Y, epochs=2, verbose=0)
        outer = model.optimizer
        chain = [outer, outer.inner_optimizer][: len(kinds)]
        assert [type(optimizer).__name__ for optimizer in chain] == kinds
        assert chain[-1].inner_optimizer is own
        assert np.any(before != keras.ops.convert_to_numpy(keras.ops.cast(model.trainable_variables[0], "float32")))
    model.save(tmp_path / "m.keras")
    assert b"tfmixed" not in zipfile.ZipFile(tmp_path / "m.keras").read("config.json")
    model.compile(tfmixed.LossScaleOptimizer("sgd"), LOSS)
    assert any("no effect" in line for line in lines(capfd))


def test_dtypes_of_the_script_are_reported(apply, capfd):
    """A layer of its own dtype and another policy."""
    apply()
    net(keras.Input((4,)), dtype="float32").compile("sgd", LOSS)
    keras.config.set_dtype_policy("float32")
    model = net(keras.Input((4,)))
    model.compile("sgd", LOSS)
    assert not isinstance(model.optimizer, tfmixed.LossScaleOptimizer)
    _, layer, policy = lines(capfd)
    assert "'out'" in layer
    assert "uses float32" in policy


if BACKEND == "tensorflow":

    class Own(keras.Model):
        """A training step that differs from Keras's in nothing but that it clips gradients itself."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            grads, _ = tf.clip_by_global_norm(tape.gradient(loss, self.trainable_variables), 0.05)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return {"loss": loss}

    class Scales(Own):
        """A training step that scales its loss."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                scaled = self.optimizer.scale_loss(self.compute_loss(x, y, self(x, training=True)))
            self.optimizer.apply(tape.gradient(scaled, self.trainable_variables), self.trainable_variables)
            return {"loss": scaled}

    class ScalesLater(Own):
        """A training step that scales the second of two losses."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            tape.gradient(loss, self.trainable_variables)
            self.optimizer.scale_loss(loss)
            return {"loss": loss}

    class Never(Own):
        """A training step whose gradients are not of any loss."""

        def train_step(self, data):
            self.optimizer.apply([tf.ones_like(v) for v in self.trainable_variables], self.trainable_variables)
            return {"loss": tf.zeros(())}


def trained(kind, eager=True, **clip):
    """Returns the weights after two steps with a loss whose gradients are too small for float16 alone."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = kind(inputs, keras.layers.Dense(1)(keras.layers.Dense(4, activation="tanh")(inputs)))
    loss = lambda y, out: 1e-6 * keras.ops.mean(keras.ops.square(out - y))  # noqa: E731  # Keras takes its name
    model.compile(keras.optimizers.SGD(1e4, **clip), loss, run_eagerly=eager)
    model.fit(X, X[:, :1], batch_size=32, shuffle=False, verbose=0)
    return model.get_weights()


@needs_tensorflow
@pytest.mark.parametrize("eager", [True, False])
def test_tape_of_a_train_step_is_scaled(apply, eager):
    """The weights are those of Keras's own training step."""
    run = apply(scale="2^20", islands=False)
    expected = trained(keras.Model, eager, global_clipnorm=0.05)
    for value, wanted in zip(trained(Own, eager), expected, strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-6)
    for part in ("2 runs", "4 steps", "0 skipped", "1.04858e+06"):
        assert part in run.summary.describe()


@needs_tensorflow
def test_train_step_that_scales_its_loss_is_left_alone(apply):
    """The weights are those of Keras's own training step."""
    apply(islands=False)
    for value, wanted in zip(trained(Scales), trained(keras.Model), strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-6)


@needs_tensorflow
@pytest.mark.parametrize(("name", "word"), [("ScalesLater", "not scaled"), ("Never", "not scaled")])
def test_train_steps_that_cannot_be_scaled_are_refused(apply, capfd, name, word):
    """With exit code 2 and the line."""
    apply(islands=False)
    with pytest.raises(SystemExit) as end:
        trained(globals()[name])
    assert end.value.code == 2
    line = lines(capfd)[-1]
    assert "test_run.py:" in line
    assert word in line


def test_gradients_without_a_scale_are_refused(apply, capfd):
    """On all backends, such as in a `train_step` of JAX that does not call `scale_loss`."""
    apply()
    model = net(keras.Input((4,)))
    model.compile("sgd", LOSS)
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(SystemExit):
        model.optimizer.stateless_apply(model.optimizer.variables, model.trainable_variables, model.trainable_variables)
    assert "not scaled" in lines(capfd)[-1]


@needs_tensorflow
@pytest.mark.parametrize("scaler", [None, "GradScaler", "LossScaleOptimizer"])
def test_custom_loops_under_float16_must_scale(apply, capfd, scaler):
    """A bare optimizer is refused. What scales is left alone."""
    apply()
    model, optimizer = net(keras.Input((4,))), keras.optimizers.SGD()
    grads = [tf.ones_like(variable) for variable in model.trainable_variables]
    if scaler == "GradScaler":
        tfmixed.GradScaler().step(optimizer, zip(grads, model.trainable_variables, strict=True))
    elif scaler == "LossScaleOptimizer":
        optimizer = tfmixed.LossScaleOptimizer(optimizer)
        optimizer.scale_loss(1.0)
        optimizer.apply(grads, model.trainable_variables)
    else:
        with pytest.raises(SystemExit):
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        assert "custom loop" in lines(capfd)[-1]


@needs_tensorflow
def test_custom_loops_under_bfloat16_are_told_what_they_lack(apply, capfd):
    """Once."""
    run = apply("mixed_bfloat16")
    model, optimizer = net(keras.Input((4,))), keras.optimizers.SGD()
    for _ in range(2):
        optimizer.apply([tf.ones_like(variable) for variable in model.trainable_variables], model.trainable_variables)
    assert len(lines(capfd)) == 2
    assert "no training step" in run.summary.describe()


class Counters:
    """An optimizer that has taken some steps."""

    loss_scale = 8.0

    def __init__(self, attempted, skipped=0):
        self.attempted_steps, self.skipped_steps = attempted, skipped


def test_steps_of_a_file_are_not_counted(tmp_path):
    """Neither those of a restored optimizer, nor those that it loads between two trainings."""
    summary, optimizer = RunSummary(RunOptions(str(tmp_path))), Counters(10, 5)
    for attempted, skipped in ((13, 6), (4, 1)):
        summary.begin(optimizer)
        optimizer.attempted_steps, optimizer.skipped_steps = attempted, skipped
        summary.end(optimizer)
        optimizer.attempted_steps, optimizer.skipped_steps = 2, 0
    summary.begin(Counters(0))  # never trains
    assert re.search(r"5 steps.* 2 skipped.* 8", summary.close())


def test_unreadable_counters_are_reported(tmp_path):
    """An interrupted step of JAX has deleted the variables."""
    summary, optimizer = RunSummary(RunOptions(str(tmp_path))), Counters(0)
    summary.begin(optimizer)
    optimizer.attempted_steps = None
    assert re.search(r"at least 0 steps.* unknown", summary.close())


def test_constants_that_round_away_are_reported_before_the_first_step(apply, capfd):
    """Once for each optimizer, with and without a loss scale, in `fit` and in custom loops."""
    apply("bfloat16", islands=False)
    model = net(keras.Input((4,)))
    model.compile("adam", LOSS)
    model.optimizer.build(model.trainable_variables)
    keras.optimizers.Nadam().build(model.trainable_variables)
    keras.optimizers.SGD().build(model.trainable_variables)
    keras.config.set_dtype_policy("float16")
    model = net(keras.Input((4,)))
    model.compile("adam", LOSS)
    assert isinstance(model.optimizer, tfmixed.LossScaleOptimizer)
    model.train_on_batch(X, Y)
    adam, nadam, scaled = [line for line in lines(capfd) if "becomes" in line]
    for line, words in ((adam, "Adam updates 4 bfloat16"), (nadam, "Nadam"), (scaled, "Adam updates 4 float16")):
        assert re.search(rf"test_run\.py:\d+ trains, but {words}", line)


@pytest.mark.parametrize("count", [1, 5])
def test_last_line_names_logs_and_report(tmp_path, count):
    """A report compares a few logs at most. Existing files are kept."""
    summary = RunSummary(RunOptions(str(tmp_path)))
    (tmp_path / "loss_scale.jsonl").touch()
    for _ in range(count):
        optimizer = Counters(0)
        summary.begin(optimizer)
        summary.log_path(optimizer)
        optimizer.attempted_steps = 3
    line = summary.close()
    assert line.startswith(("3 steps", "5 runs, 15 steps"))
    assert f"log {tmp_path}/loss_scale-2.jsonl; report" in line or f"5 logs in {tmp_path}/; no report" in line


@needs_tensorflow
def test_tf1_scripts_are_scaled_and_counted(monkeypatch, capfd, tmp_path):
    """The rewrite begins with the first session, and counters are read when a session closes."""
    from tensorflow.python.client.session import BaseSession

    from tfmixed.compat import v1

    monkeypatch.setattr(v1.LossScaleOptimizer, "apply_gradients", v1.LossScaleOptimizer.apply_gradients)
    for kind, name in ((BaseSession, "__init__"), (BaseSession, "close"), (tf.compat.v1.InteractiveSession, "close")):
        monkeypatch.setattr(kind, name, getattr(kind, name))
    monkeypatch.setattr(tf.compat.v1.InteractiveSession, "__init__", tf.compat.v1.InteractiveSession.__init__)
    monkeypatch.setenv("TF_ENABLE_AUTO_MIXED_PRECISION_LOSS_SCALING", "")
    run = TF1Run(RunOptions(str(tmp_path), policy="mixed_bfloat16", tf1=True))
    run._install_after_keras(keras)
    try:
        with tf.Graph().as_default():
            w = tf.compat.v1.get_variable("w", [2])
            step = tf.compat.v1.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(w**2))
            with tf.compat.v1.Session() as session:
                session.run(tf.compat.v1.global_variables_initializer())
                session.run(step)
        run.finish()
    finally:
        v1.disable_mixed_precision_graph_rewrite()
        v1.uninstall()
    first, last = lines(capfd)
    assert "graph rewrite to bfloat16" in first
    assert "1 steps, 0 skipped, final scale 32768" in last
