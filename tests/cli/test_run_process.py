"""`tfmixed run` on unchanged Keras scripts, in processes of their own, on the backend that the script chooses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from backend import BACKEND, needs_tensorflow
from run_process import BEGIN, line_of, run

from tfmixed import records

pytestmark = pytest.mark.slow

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
facts["optimizer"] = type(model.optimizer).__mro__[1].__name__
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, *run(folder, MODELS, "--policy", "mixed_float16")


def test_policy_optimizer_and_islands_are_applied(models):
    """Output, history and exit code stay the script's own."""
    _, done, messages = models
    assert done.returncode == 5, done.stderr
    (printed,) = done.stdout.splitlines()
    assert json.loads(printed) == {
        "default": "mixed_float16",
        "history": ["accuracy", "loss"],
        "optimizer": "LossScaleOptimizer",
        "probabilities": "float32",
    }
    assert re.fullmatch(r"mixed_float16 .*dynamic, float32 islands on, log in runs/train/", messages[0])


def test_choices_of_the_script_stay_and_are_reported(models):
    """A layer's dtype and an optimizer that scales, once each, with the line of `compile`."""
    _, _, messages = models
    layer, keras_optimizer, own_optimizer = messages[1:-1]
    assert layer.startswith(f"train.py:{line_of(MODELS, 'compile(inner')} compiles layer 'out'")
    assert keras_optimizer.startswith(f"train.py:{line_of(MODELS, 'keras.optimizers.LossScaleOptimizer')} ")
    assert own_optimizer.startswith(f"train.py:{line_of(MODELS, 'tfmixed.LossScaleOptimizer')} ")


def test_last_line_and_logs(models):
    """Steps of all optimizers, islands, logs and report."""
    folder, _, messages = models
    steps = 12 + 4 + 2
    assert re.fullmatch(
        rf"3 runs, {steps} steps, \d skipped, final scales 64 to \d+, "
        r"3 layers in float32; 2 logs in runs/train/; report runs/train/report.html",
        messages[-1],
    )
    logs = {path.name: records.read_log(path) for path in sorted((folder / "runs" / "train").glob("*.jsonl"))}
    progress = [[record.step for record in log if isinstance(record, records.Progress)] for log in logs.values()]
    assert progress == [[1, 3], [3, 7, 11]]  # loss_scale-2.jsonl before loss_scale.jsonl
    assert (folder / "runs/train/report.html").read_text().startswith("<!doctype html>")


def test_saved_models_do_not_need_tfmixed(models):
    """Plain Keras loads the model as its script made it."""
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
def make(**named):
    made.append(keras.layers.Dense(1, **named).compute_dtype)
keras.config.set_dtype_policy("mixed_float16")
make()
with tfmixed.policy_scope("float32"):
    make()
make()
tfmixed.layers.Float32(keras.layers.Dense(1))  # sets a policy while it is made
keras.backend.clear_session()
make()
thread = threading.Thread(target=make)
thread.start()
thread.join()
print(*made)
"""
)


def test_policy_of_the_script_takes_precedence(tmp_path):
    """Keras forgets it in a new thread and after `clear_session`: the requested policy is then the default again."""
    done, messages = run(tmp_path, POLICIES, "--policy", "mixed_bfloat16", "--no-islands")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["float16", "float32", "float16", "bfloat16", "bfloat16"]
    assert messages[0].startswith(f"train.py:{line_of(POLICIES, 'made.append')} uses mixed_float16")
    assert messages[1:] == ["no training step was recorded"]


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


def test_interrupted_run_is_continued(tmp_path):
    """The process ends by the signal. With --log-dir the log of a restored run is continued."""
    options = "--policy", "mixed_float16", "--scale", "1024", "--log-dir", "here"
    done, messages = run(tmp_path, STOPPED, *options, arguments=["begin"])
    assert done.returncode == -2  # SIGINT, as Python ends
    assert "KeyboardInterrupt" in done.stderr
    steps = "(6|at least 4)" if BACKEND == "jax" else "6"  # an interrupted step of JAX has deleted the variables
    assert messages[0].endswith("loss scale constant 1024, float32 islands on, log in here/")
    assert re.match(rf"{steps} steps, 0 skipped, final scale 1024, 1 layer in float32; log here/", messages[-1])
    done, messages = run(tmp_path, STOPPED, *options, arguments=["again"])
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert messages[-1].startswith("4 steps, ")
    assert messages[-1].endswith("log here/loss_scale.jsonl; report here/report-2.html")
    log = records.read_log(tmp_path / "here" / "loss_scale.jsonl")
    assert [(record.event, record.step) for record in log] == [("run", 0), ("progress", 3), ("run", 4), ("progress", 7)]


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


def test_full_disk_ends_the_log_but_not_the_script(tmp_path):
    """A limit on the size of files stands for it. Another `fit` continues the log."""
    done, messages = run(tmp_path, NO_ROOM, "--policy", "mixed_float16", "--scale", "1024", "--log-dir", "here")
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr
    assert sum("the log ends here: " in line for line in messages) == 1
    log = records.read_log(tmp_path / "here" / "loss_scale.jsonl")
    events = [(record.event, record.step) for record in log]
    assert (events[:2], events[-2:]) == ([("run", 0), ("progress", 3)], [("run", 16), ("progress", 19)])


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


@pytest.mark.parametrize("place", ["early", "in fit"])
def test_last_line_after_an_exception(tmp_path, place):
    """Without known steps it names the exception that ended the script, if any."""
    done, messages = run(tmp_path, BROKEN_OFF, "--policy", "float32", arguments=[place])
    assert done.returncode == (place == "early")
    assert messages[-1] == ("the script ended with ValueError" if place == "early" else "trained without a loss scale")


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


def test_steps_are_those_of_this_run(tmp_path):
    """Also those of a model that the script has dropped, but not those of a file."""
    done, messages = run(tmp_path, COUNTED, "--policy", "mixed_float16")
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
    steps = 3 + (4 + 8 + 4) + 2
    assert messages[-1].startswith(
        f"3 runs, {steps} steps, 0 skipped, final scale 32768, 3 layers in float32; log runs/train/loss_scale.jsonl"
    )
    log = records.read_log(tmp_path / "runs/train/loss_scale.jsonl")
    assert (log[0].step, log[-1].step, log[0].optimizer) == (0, 7, "Adam")


HANDED_ON = (
    BEGIN
    + """
models = [net(keras.Input((4,))) for _ in range(2)]
for model in models:
    model.compile("adam", LOSS)
    model.optimizer.build(model.trainable_variables)
models[0].fit(x, y, batch_size=16, verbose=0)
for target, variable in zip(models[1].optimizer.variables, models[0].optimizer.variables):
    target.assign(variable)
models[1].fit(x, y, batch_size=16, verbose=0)
print(int(model.optimizer.iterations))
"""
)


def test_steps_of_a_restored_optimizer_are_counted_once(tmp_path):
    """Its variables are assigned, as checkpoints of TensorFlow do it."""
    done, messages = run(tmp_path, HANDED_ON, "--policy", "mixed_float16")
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert messages[-1].startswith("2 runs, 8 steps, 0 skipped, ")


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
def test_end_of_a_dataset_is_not_a_step(tmp_path):
    """Of unknown size, with several steps per execution, and with several optimizers of one model."""
    done, messages = run(tmp_path, UNKNOWN_SIZE, "--policy", "mixed_float16")
    assert done.returncode == 0, done.stderr
    assert messages[-1].startswith("3 runs, 28 steps, 0 skipped")


SKIPPED = (
    BEGIN
    + """
model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
model.fit(np.full_like(x, np.inf), y, batch_size=8, verbose=0)
"""
)


def test_skipped_steps_are_warned_of(tmp_path):
    """At the line of `fit`."""
    done, messages = run(tmp_path, SKIPPED, "--policy", "mixed_float16")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"train.py:{line_of(SKIPPED, 'model.fit')}: UserWarning: 8 of the 8 steps" in done.stderr
    assert messages[-1].startswith("8 steps, 8 skipped")


FLOAT32 = (
    BEGIN
    + """
model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
model.fit(x, y, verbose=0)
print(type(model.optimizer).__name__)
"""
)


def test_without_a_loss_scale_nothing_is_logged(tmp_path):
    """The optimizer stays, and no folder is made."""
    done, messages = run(tmp_path, FLOAT32, "--policy", "float32")
    assert done.stdout == "SGD\n", done.stderr
    assert messages == ["float32 (--policy), no loss scale", "trained without a loss scale"]
    assert sorted(os.listdir(tmp_path)) == ["train.py"]
