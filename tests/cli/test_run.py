"""What `tfmixed run` applies to unchanged Keras scripts, on the backend that the script chooses, in real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from backend import BACKEND, needs_tensorflow

from tfmixed import records

# The environment names a backend that does not exist: the script's own choice comes in time.
BEGIN = f"""
import os, sys
assert not {{"keras", "tensorflow", "jax", "torch"}} & set(sys.modules)
os.environ["KERAS_BACKEND"] = {BACKEND!r}
import keras, numpy as np
x, y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.arange(64) % 3
LOSS = "sparse_categorical_crossentropy"

def net(*first, **last):
    hidden = keras.layers.Dense(8, activation="relu", name="hidden")
    return keras.Sequential([*first, hidden, keras.layers.Dense(3, activation="softmax", name="out", **last)])
"""

MODELS = (
    "import sys; assert 'numpy' not in sys.modules"  # a script may set the number of its threads first
    + BEGIN
    + """
facts = {"default": keras.mixed_precision.global_policy().name}
model = net()  # not built yet
model.compile("sgd", LOSS, metrics=["accuracy"])
first = model.fit(x, y, epochs=2, batch_size=16, verbose=0).history
model.fit(x, y, batch_size=16, verbose=0)
facts["history"] = sorted(first)
facts["optimizer"] = type(model.optimizer).__module__
facts["probabilities"] = str(keras.backend.standardize_dtype(model(x).dtype))
model.save("model.keras")
model = net(keras.Input((4,)), dtype="float32")
inner = keras.optimizers.Adam()
for _ in range(2):
    model.compile(inner, LOSS)
    model.fit(x, y, verbose=0)
model = net(keras.Input((4,)))
model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), LOSS)
model.fit(x, y, verbose=0)
import tfmixed
model = net(keras.Input((4,)))
model.compile(tfmixed.LossScaleOptimizer("sgd", 64), LOSS)
model.fit(x, y, verbose=0, callbacks=tfmixed.callbacks.LossScaleLogger("own.jsonl", verbose=0))
import json
print(json.dumps(facts))
sys.exit(5)
"""
)


def run(folder, code, *options, arguments=(), backend="nonsense"):
    """Runs a script in a folder under `tfmixed run`, and returns the process and what we said in it."""
    (folder / "train.py").write_text(code)
    command = [sys.executable, "-m", "tfmixed", "run", *options, "train.py", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    options = {"capture_output": True, "text": True, "timeout": 240, "check": False, "cwd": folder}
    done = subprocess.run(command, env=environment, **options)
    return done, [line[9:] for line in done.stderr.splitlines() if line.startswith("tfmixed: ")]


def line_of(code, part):
    return next(number for number, line in enumerate(code.splitlines(), start=1) if part in line)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, *run(folder, MODELS, "--policy", "mixed_float16")


def test_policy_optimizer_and_islands_are_applied(models):
    """To an unchanged script, whose output, history and exit code stay its own."""
    _, done, said = models
    assert done.returncode == 5, done.stderr
    (printed,) = done.stdout.splitlines()
    assert json.loads(printed) == {
        "default": "mixed_float16",
        "history": ["accuracy", "loss"],
        "optimizer": "tfmixed.optimizer",
        "probabilities": "float32",
    }
    assert re.fullmatch(
        r"mixed_float16 \(--policy.*\), loss scale dynamic, float32 islands on, log in runs/train/", said[0]
    )


def test_what_the_script_says_itself_stays_and_is_said(models):
    """A layer's dtype, an optimizer that scales: once each, with the line."""
    _, _, said = models
    parts = 'name="out"', "keras.optimizers.LossScaleOptimizer", "tfmixed.LossScaleOptimizer"
    layer, theirs, ours = (f"train.py:{line_of(MODELS, part)}" for part in parts)
    scales, stays = "compiles with a LossScaleOptimizer", "the script's own stays"
    assert said[1:-1] == [
        f"{layer} gives a Dense the dtype float32, which it keeps; elsewhere mixed_float16 holds",
        f"{theirs} {scales}, Keras's own, which cannot be logged: {stays}",
        f"{ours} {scales}: {stays}",
    ]


def test_the_last_line_tells_how_it_ended(models):
    """Steps, skips and scales of all optimizers, each of which has a log, islands, and where logs and report are."""
    folder, _, said = models
    steps = 12 + 4 + 2 + 2
    assert re.fullmatch(
        rf"4 runs, {steps} steps, \d skipped, those of Keras's own scaler not counted, final scales 64 to \d+, "
        r"3 layers in float32; 3 logs in \./, runs/train/; report runs/train/report.html",
        said[-1],
    )
    logs = {path.name: records.read_log(path) for path in sorted((folder / "runs" / "train").glob("*.jsonl"))}
    progress = [[each.step for each in log if isinstance(each, records.Progress)] for log in logs.values()]
    assert progress == [[1, 3], [3, 7, 11]]  # loss_scale-2.jsonl before loss_scale.jsonl
    assert (folder / "runs/train/report.html").read_text().startswith("<!doctype html>")


def test_what_a_run_saves_needs_no_tfmixed(models):
    """Plain Keras loads the model, as its script made it."""
    folder, _, _ = models
    code = (
        "import keras, sys\nlast = keras.models.load_model('model.keras').layers[-1]\n"
        "print(last.activation.__name__, type(last) is keras.layers.Dense, 'tfmixed' in sys.modules)"
    )
    environment = {**os.environ, "KERAS_BACKEND": BACKEND}
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False, "cwd": folder}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, **options)
    assert loaded.stdout.split() == ["softmax", "True", "False"], loaded.stderr


POLICIES = (
    BEGIN
    + """
import threading
import tfmixed
made = []
make = lambda **named: made.append(keras.layers.Dense(1, **named).compute_dtype)
keras.config.set_dtype_policy("mixed_float16")
make()
with tfmixed.policy_scope("float32"):
    make()
make()
tfmixed.layers.Float32(keras.layers.Dense(1))  # sets a policy for a moment, which is nobody's wish
keras.backend.clear_session()
make()
thread = threading.Thread(target=make)
thread.start()
thread.join()
print(*made)
"""
)


def test_a_policy_of_the_scripts_own_wins_and_is_said(tmp_path):
    """With its line; where Keras forgets the policy, the one of the command is there again."""
    done, said = run(tmp_path, POLICIES, "--policy", "mixed_bfloat16", "--no-islands")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["float16", "float32", "float16", "bfloat16", "bfloat16"]
    first, scope = line_of(POLICIES, "set_dtype_policy"), line_of(POLICIES, "policy_scope")
    won = "which wins over mixed_bfloat16"
    applied = "loss scale dynamic, float32 islands off, log in runs/train/"
    assert said == [
        f"train.py:{first} sets mixed_float16, {won} (--policy); {applied}",
        f"train.py:{scope} sets float32, {won}; from here on no loss scale",
        f"train.py:{scope} sets mixed_float16, {won}; from here on {applied}",
        "no training step was seen",
    ]


STOPPED = (
    BEGIN
    + """
class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1 and self.epoch == 1:
            raise KeyboardInterrupt

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

if sys.argv[1] == "begin":
    model = net(keras.Input((4,)))
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    saved = keras.callbacks.ModelCheckpoint("model.keras", save_freq="epoch")
    model.fit(x, y, epochs=3, batch_size=16, verbose=0, callbacks=[saved, Stop()])
else:
    model = keras.models.load_model("model.keras")
    model.fit(x, y, epochs=1, batch_size=16, verbose=0)
    print(int(model.optimizer.attempted_steps))
"""
)


def test_an_interrupted_run_says_where_it_stands_and_is_taken_up_again(tmp_path):
    """The traceback is the script's and Keras's; with --log-dir the log of what was restored goes on."""
    options = "--policy", "mixed_float16", "--scale", "1024", "--log-dir", "here"
    done, said = run(tmp_path, STOPPED, *options, arguments=["begin"])
    assert done.returncode == -2  # SIGINT, as Python ends
    assert "KeyboardInterrupt" in done.stderr
    assert os.path.join("tfmixed", "running") not in done.stderr
    steps = 6 if BACKEND != "jax" else 4  # of a step that was broken off, JAX has taken the variables
    assert said[0].endswith("loss scale constant 1024, float32 islands on, log in here/")
    assert re.match(rf"({steps}|6) steps, 0 skipped, final scale 1024, 1 layer in float32; log here/", said[-1])
    done, said = run(tmp_path, STOPPED, *options, arguments=["again"])
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert said[-1].endswith("log here/loss_scale.jsonl; report here/report-2.html")
    log = records.read_log(tmp_path / "here" / "loss_scale.jsonl")
    assert [(each.event, each.step) for each in log] == [("run", 0), ("progress", 3), ("run", 4), ("progress", 7)]


NO_ROOM = (
    BEGIN
    + """
import resource
class Full(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if epoch == 1 else 10**9, -1))

model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[Full()])
model.fit(x, y, batch_size=16, verbose=0)
print(int(model.optimizer.iterations))
"""
)


def test_a_full_disk_ends_the_log_and_not_the_script(tmp_path):
    """A limit on the size of files stands for it; another `fit` goes on in the log."""
    done, said = run(tmp_path, NO_ROOM, "--policy", "mixed_float16", "--scale", "1024", "--log-dir", "here")
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr
    assert sum("the log ends here: " in line for line in said) == 1
    log = records.read_log(tmp_path / "here" / "loss_scale.jsonl")
    assert [(each.event, each.step) for each in log] == [("run", 0), ("progress", 3), ("run", 16), ("progress", 19)]


BROKEN_OFF = (
    BEGIN
    + """
class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise ValueError

model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
if sys.argv[1] == "early":
    raise ValueError
try:
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[Stop()])
except ValueError:
    pass
"""
)


@pytest.mark.parametrize("where", ["early", "in fit"])
def test_the_last_line_says_no_more_than_is_known(tmp_path, where):
    """After an exception before the first step; or in `fit`, where JAX may have taken the variables."""
    done, said = run(tmp_path, BROKEN_OFF, "--policy", "float32", arguments=[where])
    trained = ["2 steps, no loss scale", *(["the number of steps is not known"] if BACKEND == "jax" else [])]
    assert done.returncode == (where == "early")
    assert said[-1] in (["the script ended with ValueError"] if where == "early" else trained)


COUNTED = (
    BEGIN
    + """
import gc

def compiled():
    model = net(keras.Input((4,)))
    model.compile("adam", LOSS)
    return model

def dropped():
    model = compiled()
    for _ in range(3):
        model.train_on_batch(x, y)

dropped()
gc.collect()
model = compiled()
model.fit(x, y, batch_size=16, verbose=0)
model.save("model.keras")
model.save_weights("model.weights.h5")
model.fit(x, y, batch_size=8, verbose=0)
model.load_weights("model.weights.h5")
model.fit(x, y, batch_size=16, verbose=0)
keras.models.load_model("model.keras").evaluate(x, y, verbose=0)
model = keras.models.load_model("model.keras")
for _ in range(2):
    model.train_on_batch(x, y)
print(int(model.optimizer.iterations))
"""
)


@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
def test_the_steps_are_those_of_this_run(tmp_path, policy):
    """Those of a model that the script dropped too, and none that a file brought along, whatever it takes back."""
    done, said = run(tmp_path, COUNTED, "--policy", policy)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
    steps = 3 + (4 + 8 + 4) + 2
    if policy == "float32":
        assert said[-1] == f"3 runs, {steps} steps, no loss scale"
        return
    assert said[-1].startswith(f"3 runs, {steps} steps, 0 skipped, final scale 32768, 3 layers in float32; 3 logs in ")
    logs = [records.read_log(path) for path in (tmp_path / "runs" / "train").glob("*.jsonl")]
    assert sorted((log[0].step, log[-1].step) for log in logs) == [(0, 2), (0, 7), (4, 5)]
    assert {log[0].optimizer for log in logs} == {"Adam"}


HANDED_ON = (
    BEGIN
    + """
models = [net(keras.Input((4,))) for _ in range(2)]
for model in models:
    model.compile("adam", LOSS)
    model.optimizer.build(model.trainable_variables)
models[0].fit(x, y, batch_size=16, verbose=0)
for other, variable in zip(models[1].optimizer.variables, models[0].optimizer.variables):
    other.assign(variable)
models[1].fit(x, y, batch_size=16, verbose=0)
print(int(model.optimizer.iterations))
"""
)


def test_steps_that_one_optimizer_hands_on_to_another_count_once(tmp_path):
    """By its variables, as checkpoints of TensorFlow do it."""
    done, said = run(tmp_path, HANDED_ON, "--policy", "mixed_float16")
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert said[-1].startswith("2 runs, 8 steps, 0 skipped, ")


UNKNOWN_SIZE = (
    BEGIN
    + """
import tensorflow as tf
data = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(16)  # 4 batches
for steps in (1, 3):
    model = net(keras.Input((4,)))
    model.compile("sgd", LOSS, steps_per_execution=steps)
    model.fit(data, epochs=2, verbose=0)
    model.fit(data, verbose=0)
model = net(keras.Input((4,)))
parts = keras.optimizers.SGD(gradient_accumulation_steps=2), keras.optimizers.Adam()
model.compile(keras.optimizers.MultiOptimizer(lambda variable: parts["bias" in variable.path]), LOSS)
model.fit(data, verbose=0, steps_per_epoch=5)
"""
)


@needs_tensorflow
@pytest.mark.parametrize(("policy", "rest"), [("float32", "no loss scale"), ("mixed_float16", "0 skipped")])
def test_the_end_of_a_dataset_of_unknown_size_is_no_step(tmp_path, policy, rest):
    """Keras's `iterations` counts it, unless a step checks gradients. Parts count with their optimizer."""
    done, said = run(tmp_path, UNKNOWN_SIZE, "--policy", policy)
    assert done.returncode == 0, done.stderr
    assert said[-1].startswith(f"3 runs, 28 steps, {rest}")


SKIPPED = (
    BEGIN
    + """
model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
model.fit(np.full_like(x, np.inf), y, batch_size=8, verbose=0)
"""
)


def test_a_run_that_mostly_skipped_says_so_at_its_end(tmp_path):
    """With the steps, the variable and a remedy; `fit` warns too."""
    done, said = run(tmp_path, SKIPPED, "--policy", "mixed_float16")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    warned = "8 of the 8 steps since step 0 had gradients that are not finite"
    assert f"train.py:{line_of(SKIPPED, 'model.fit')}: UserWarning: {warned}" in done.stderr
    assert re.fullmatch(rf"{warned}.*kernel.*learning rate.*", said[-2])
    assert said[-1].startswith("8 steps, 8 skipped")


FLOAT32 = (
    BEGIN
    + """
model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
model.fit(x, y, verbose=0)
print(type(model.optimizer).__name__)
"""
)


def test_without_a_loss_scale_there_is_nothing_to_log(tmp_path):
    """The optimizer stays as it is, and no folder is made."""
    done, said = run(tmp_path, FLOAT32, "--policy", "float32")
    assert done.stdout == "SGD\n", done.stderr
    assert said == ["float32 (--policy), no loss scale", "2 steps, no loss scale"]
    assert sorted(os.listdir(tmp_path)) == ["train.py"]
