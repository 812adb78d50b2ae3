"""`tfmixed run` on scripts with their own training steps, also of TensorFlow 1, in processes of their own."""

from __future__ import annotations

import re

import numpy as np
import pytest
from run_process import BEGIN, line_of, run

from tfmixed import records

slow = pytest.mark.slow

STEP = """
import tensorflow as tf
y = (x[:, :1] * 0.5).astype("float32")

class Own(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        grads, _ = tf.clip_by_global_norm(tape.gradient(loss, self.trainable_variables), 0.05)
        self.optimizer.apply_gradients(zip(grads, self.trainable_variables))
        return {"loss": loss}

def trained(kind, optimizer, **named):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = kind(inputs, keras.layers.Dense(1)(keras.layers.Dense(4, activation="tanh")(inputs)))
    model.compile(optimizer, lambda y, out: 1e-6 * keras.ops.mean(keras.ops.square(out - y)), **named)
    model.fit(x, y, epochs=3, batch_size=16, shuffle=False, verbose=0)
    return model
"""

SMALL = (
    BEGIN
    + STEP.replace("epochs=3", "epochs=1")
    + """
model = net(keras.Input((4,)))
model.compile("sgd", LOSS)
model.fit(x, np.arange(64) % 3, batch_size=16, verbose=0)
expected = trained(keras.Model, keras.optimizers.SGD(1e4, global_clipnorm=0.05), run_eagerly=True).get_weights()
weights = trained(Own, keras.optimizers.SGD(1e4), run_eagerly=True).get_weights()
print(max(float(abs(ours - keras_weights).max()) for ours, keras_weights in zip(weights, expected)))
"""
)


def test_a_keras_script_trains_in_float16(tmp_path):
    """The command as users start it: `fit`, and a `train_step` whose gradients are too small for float16 alone."""
    done, messages = run(tmp_path, SMALL, "--policy", "mixed_float16", "--scale", "dynamic:initial_scale=2^20")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6
    assert re.match(r"3 runs, 12 steps, \d skipped", messages[-1])
    logs = [records.read_log(path) for path in sorted((tmp_path / "runs" / "train").glob("*.jsonl"))]
    steps = [max(record.step for record in log if isinstance(record, records.Progress)) for log in logs]
    assert steps == [3, 3, 3]


TAPE = (
    BEGIN
    + STEP
    + """
rate = keras.optimizers.SGD(1e4, global_clipnorm=0.05)
weights = [trained(keras.Model, rate).get_weights()]
for eager in (False, True):
    model = trained(Own, keras.optimizers.SGD(1e4), run_eagerly=eager)
    weights.append(model.get_weights())
print([max(float(abs(a - b).max()) for a, b in zip(weights[0], own)) for own in weights[1:]])
print(int(model.optimizer.attempted_steps))
optimizer = keras.optimizers.Adam()

@tf.function
def step(x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))

try:
    step(x, y)  # refused
except Exception:
    print("swallowed")
"""
)


@slow
def test_tape_is_scaled_and_a_bare_loop_is_refused(tmp_path):
    """A custom `train_step` trains as Keras's own, with gradients that are too small for float16 alone."""
    done, messages = run(tmp_path, TAPE, "--policy", "mixed_float16", "--scale", "dynamic:initial_scale=2^20")
    assert done.returncode == 2, done.stderr
    differences, steps = done.stdout.splitlines()
    assert max(eval(differences)) < 1e-6
    assert steps == "12"
    where = f"train.py:{line_of(TAPE, '# refused')}"
    assert re.match(f"{re.escape(where)} .*Adam.* custom loop", messages[-2])
    assert messages[-1].startswith("3 runs, 36 steps, 0 skipped")


TAPES = (
    BEGIN
    + STEP
    + """
class Looks(Own):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        grads = tape.gradient(loss, self.trainable_variables)
        scale = getattr(self.optimizer, "loss_scale", None)
        self.optimizer.apply_gradients(zip(grads, self.trainable_variables))
        return {"loss": loss}

class Several(Own):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            out = self(x, training=True)
            losses = self.compute_loss(x, y, out), 1e-6 * tf.reduce_mean(tf.cast(out, tf.float32))
        grads = [tape.gradient(loss, self.trainable_variables) for loss in losses]
        with tf.GradientTape() as second:
            loss = 1e-6 * tf.reduce_mean(tf.cast(self(x), tf.float32))
        grads.append(second.gradient(loss, self.trainable_variables, output_gradients=tf.constant(2.0)))
        total = [tf.clip_by_norm(sum(parts), 1.0) for parts in zip(*grads)]
        self.optimizer.apply_gradients(zip(total, self.trainable_variables))
        return {"loss": loss}

class Scales(Own):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            scaled = loss = self.compute_loss(x, y, self(x, training=True))
            if hasattr(self.optimizer, "scale_loss"):
                scaled = self.optimizer.scale_loss(loss)
        self.optimizer.apply_gradients(zip(tape.gradient(scaled, self.trainable_variables), self.trainable_variables))
        return {"loss": loss}

class PassesOn(Own):
    def train_step(self, data):
        x, y = data
        first, last = self.layers[-2:]
        with tf.GradientTape() as one:
            hidden = first(x)
        with tf.GradientTape(persistent=True) as two:
            two.watch(hidden)
            loss = self.compute_loss(x, y, last(hidden))
        above = two.gradient(loss, last.trainable_variables)
        below = one.gradient(hidden, first.trainable_variables, output_gradients=two.gradient(loss, hidden))
        self.optimizer.apply_gradients(zip([*below, *above], self.trainable_variables))
        return {"loss": loss}

def main():
    for kind in (Looks, Several, Scales, PassesOn):
        for eagerly in (False, True):
            print([float(abs(weight).sum()) for weight in trained(kind, "sgd", run_eagerly=eagerly).get_weights()])

def trained(kind, optimizer, **named):  # longer steps: what float16 loses shows
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = kind(inputs, keras.layers.Dense(1)(keras.layers.Dense(4, activation="tanh")(inputs)))
    model.compile(keras.optimizers.SGD(1e4), lambda y, out: 1e-6 * keras.ops.mean(keras.ops.square(out - y)), **named)
    model.fit(x, y, epochs=1, batch_size=16, shuffle=False, verbose=0)
    return model

main()
"""
)


@slow
def test_tapes_of_train_steps_give_the_weights_of_float32(tmp_path):
    """Several tapes, output gradients, a step that reads the scale, and one that scales its loss."""
    outputs = []
    for policy in ("float32", "mixed_float16"):
        done, _ = run(tmp_path, TAPES, "--policy", policy)
        assert done.returncode == 0, done.stderr
        outputs.append(np.array([eval(line) for line in done.stdout.splitlines()]))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0.01, atol=1e-3)


OUTSIDE = (
    BEGIN
    + STEP
    + """
class Halves(keras.Model):  # one tape, two losses of scale_loss, two updates
    def train_step(self, data):
        x, y = data
        first, last = self.layers[-2:]
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        with tf.GradientTape(persistent=True) as tape:
            loss = self.optimizer.scale_loss(self.compute_loss(x, y, self(x, training=True)))
        for layer in (first, last):
            variables = layer.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}

def norm(model):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((tf.cast(model(x), tf.float32) - y) ** 2)
    return tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables))

class Norms(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        norms.append(float(norm(self.model)))

norms = []
model = trained(Own, "sgd")
for eagerly in (False, True):
    model.compile("sgd", "mse", run_eagerly=eagerly)
    norms.append(float(norm(model)))
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[Norms()])
inputs = tf.constant(x[:2])
with tf.GradientTape(persistent=True) as tape:
    tape.watch(inputs)
    variable = tf.Variable(tf.constant(3.0, tf.float16))
    targets = tf.reduce_sum(model(inputs) * 100), variable * variable, tf.gather(tf.ones(3), [0]), tf.complex(1.0, 2.0)
assert np.isfinite(tape.gradient(targets[0], inputs)).all()
assert (tape.gradient(targets[1], variable) == 6.0) and tape.gradient(targets[2], variable) is None
print(all(np.isfinite(norms)), max(norms) < 100)
halves = trained(Halves, keras.optimizers.SGD(1e4))
print(*[float(abs(weight).max()) for weight in halves.get_weights()])
"""
)


@slow
def test_tapes_outside_of_training_functions_are_unchanged(tmp_path):
    """Gradients of inputs, of other variables and in callbacks, and a tape that serves two updates."""
    done, messages = run(tmp_path, OUTSIDE, "--policy", "mixed_float16")
    assert done.returncode == 0, done.stderr
    finite, *weights = done.stdout.splitlines()
    assert finite == "True True"
    assert all(float(weight) < 2 for weight in weights[0].split())
    assert "0 skipped" in messages[-1]


@slow
@pytest.mark.parametrize("place", ["self.given", "given"])
def test_the_compiled_optimizer_is_refused_by_itself(tmp_path, place):
    """It does not scale the loss: in a `train_step`, and in a loop."""
    step = STEP.replace("self.optimizer.apply_gradients", f"{place}.apply_gradients")
    code = BEGIN + step + "given = keras.optimizers.SGD(1.0)\nOwn.given = given\ntrained(Own, given)"
    done, messages = run(tmp_path, code, "--policy", "mixed_float16")
    assert done.returncode == 2
    assert "Use model.optimizer" in messages[-1]


@slow
def test_policy_applies_to_a_loop_in_bfloat16(tmp_path):
    """Nothing needs to be scaled. The line says what only `fit` does."""
    code = TAPE.replace("print(int(model.optimizer.attempted_steps))", "").replace("epochs=3", "epochs=1")
    done, messages = run(tmp_path, code, "--policy", "mixed_bfloat16")
    assert done.returncode == 0, done.stderr
    assert messages[1].startswith(f"train.py:{line_of(code, '# refused')} trains in a custom loop")
    assert "without a loss scale" in messages[-1]


TF1 = """
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_eager_execution()
X = np.random.default_rng(0).normal(size=(64, 32)).astype("f")

def network():
    x, w = tf.placeholder(tf.float32, [None, 32]), tf.get_variable("w", [32, 4])
    loss = tf.reduce_mean(tf.square(tf.matmul(x, w) - x[:, :4]))
    return x, loss, tf.train.AdamOptimizer(0.01).minimize(loss, global_step=tf.train.get_or_create_global_step())

with tf.Graph().as_default():
    x, loss, train = network()
    with tf.train.MonitoredTrainingSession(hooks=[tf.train.StopAtStepHook(9)]) as session:
        while not session.should_stop():
            session.run(train, {x: X})
x, loss, train = network()
session = tf.Session()  # never closed
session.run(tf.global_variables_initializer())
for step in range(10):
    session.run(train, {x: X * (1e30 if step == 3 else 1)})
print(np.isfinite(session.run(loss, {x: X})))
"""


@slow
def test_tf1_script_is_scaled(tmp_path):
    """The shim, the rewrite and loss scaling for optimizers that have none, in both kinds of sessions."""
    done, messages = run(tmp_path, TF1, "--tf1", "--policy", "mixed_bfloat16", backend="tensorflow")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    first, last = messages
    assert re.match("TensorFlow 1 .*bfloat16.* dynamic", first)
    assert re.match("2 runs, 19 steps, 1 skipped.* 16384 to 32768", last)


@slow
def test_tf1_script_may_import_keras_first(tmp_path):
    """Keras then imports TensorFlow."""
    code = "import keras" + TF1.replace("range(10)", "range(5)")
    done, messages = run(tmp_path, code, "--tf1", backend="tensorflow")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert messages[1].startswith("2 runs, 14 steps, 1 skipped")


@slow
def test_last_line_names_the_right_option(tmp_path):
    """For a Keras script with --tf1, and for one of TensorFlow 1 without it."""
    done, messages = run(tmp_path, BEGIN + "net(keras.Input((4,)))", "--tf1", backend="tensorflow")
    assert done.returncode == 0, done.stderr
    assert ["took no step" in line for line in messages] == [True]
    code = "import keras\nimport tensorflow"
    done, messages = run(tmp_path, code, backend="tensorflow")
    assert ["no Keras layer" in line for line in messages] == [True]


@slow
def test_tf1_needs_the_tensorflow_backend(tmp_path):
    """Otherwise one line, and exit code 2."""
    done, messages = run(tmp_path, TF1, "--tf1", backend="jax")
    assert done.returncode == 2
    assert len(messages) == 1
    assert messages[0].startswith("--tf1: ")
