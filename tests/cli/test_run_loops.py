"""`tfmixed run` and training steps that a script writes itself, those of TensorFlow 1 among them: TensorFlow alone."""

from __future__ import annotations

import re

import numpy as np
from test_run import BEGIN, line_of, run

from tfmixed import records

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

TAPE = (
    BEGIN
    + STEP
    + """
rate = keras.optimizers.SGD(1e4, global_clipnorm=0.05)
weights = [trained(keras.Model, rate).get_weights()]
for eager in (False, True):
    model = trained(Own, keras.optimizers.SGD(1e4), run_eagerly=eager)
    weights.append(model.get_weights())
print([max(float(abs(a - b).max()) for a, b in zip(weights[0], other)) for other in weights[1:]])
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


def test_a_tape_is_scaled_and_a_loop_that_would_not_be_is_refused(tmp_path):
    """A `train_step` takes the steps of Keras's own, with gradients that float16 alone would lose; a bare loop none."""
    done, said = run(tmp_path, TAPE, "--policy", "mixed_float16", "--scale", "dynamic:initial_scale=2^20")
    assert done.returncode == 2, done.stderr
    differences, steps = done.stdout.splitlines()
    assert max(eval(differences)) < 1e-6
    assert steps == "12"
    where = f"train.py:{line_of(TAPE, '# refused')}"
    assert said[-2].startswith(f"{where} takes a step of its own with Adam: under float16 its gradients would be those")
    assert said[-1].startswith("3 runs, 36 steps, 0 skipped")


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
        with tf.GradientTape() as another:
            loss = 1e-6 * tf.reduce_mean(tf.cast(self(x), tf.float32))
        grads.append(another.gradient(loss, self.trainable_variables, output_gradients=tf.constant(2.0)))
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
            print([float(abs(each).sum()) for each in trained(kind, "sgd", run_eagerly=eagerly).get_weights()])

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


def test_every_tape_of_a_train_step_is_scaled_or_left_to_its_script(tmp_path):
    """Several tapes and seeds, a step that reads the scale and one that scales itself: as in float32."""
    outputs = []
    for policy in ("float32", "mixed_float16"):
        done, _ = run(tmp_path, TAPES, "--policy", policy)
        assert done.returncode == 0, done.stderr
        outputs.append(np.array([eval(line) for line in done.stdout.splitlines()]))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0.01, atol=1e-3)


LOOPS = (
    BEGIN
    + STEP
    + """
import tfmixed
model = trained(keras.Model, "sgd")
optimizer, scaler = keras.optimizers.Adam(), tfmixed.GradScaler(init_scale=2.0**17)
for _ in range(4):
    with tf.GradientTape() as tape:
        loss = scaler.scale(tf.reduce_mean((model(x, training=True) - y) ** 2))
    scaler.step(optimizer, zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))
    scaler.update()

class Never(Own):
    def train_step(self, data):
        ones = [tf.ones_like(each) for each in self.trainable_variables]
        self.optimizer.apply(ones, self.trainable_variables)  # unscaled
        return {"loss": tf.zeros(())}

trained(Never, "sgd")
"""
)


PARTLY = (
    BEGIN
    + STEP
    + """
class Partly(Own):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            scaled = self.optimizer.scale_loss(loss)
        grads = [tape.gradient(each, self.trainable_variables) for each in (scaled, loss)]  # mixed
        self.optimizer.apply_gradients(zip(grads[0], self.trainable_variables))
        return {"loss": loss}

trained(Partly, "sgd")
"""
)


def test_a_train_step_that_scales_one_of_two_losses_is_refused(tmp_path):
    """One `apply` cannot tell their gradients apart."""
    done, said = run(tmp_path, PARTLY, "--policy", "mixed_float16")
    assert done.returncode == 2, done.stderr
    assert said[1].startswith(
        f"train.py:{line_of(PARTLY, '# mixed')} takes gradients of a loss that scale_loss returned"
    )


def test_a_grad_scaler_is_left_alone_and_gradients_that_nobody_scaled_are_refused(tmp_path):
    """The scaler has a log, and its optimizer is counted once; the others would be divided by a scale they lack."""
    done, said = run(tmp_path, LOOPS, "--policy", "mixed_float16")
    assert done.returncode == 2, done.stderr
    advice = "apply was given gradients of a loss that was never scaled"
    assert said[1].startswith(f"train.py:{line_of(LOOPS, '# unscaled')}: {advice}")
    assert re.match(r"2 runs, 16 steps, \d+ skipped, final scales? .*; 3 logs in runs/train/; report runs/", said[-1])
    assert len(said) == 3
    logs = [records.read_log(path) for path in sorted((tmp_path / "runs" / "train").glob("*.jsonl"))]
    assert sorted(log[-1].step for log in logs if isinstance(log[-1], records.Progress)) == [3, 11]


def test_a_loop_of_its_own_in_bfloat16_is_told_what_it_lacks(tmp_path):
    """The policy holds, nothing needs to be scaled, and what `fit` would do more is said."""
    code = TAPE.replace("print(int(model.optimizer.attempted_steps))", "").replace("epochs=3", "epochs=1")
    done, said = run(tmp_path, code, "--policy", "mixed_bfloat16")
    assert done.returncode == 0, done.stderr
    where = f"train.py:{line_of(code, '# refused')}"
    assert (
        said[1] == f"{where} trains in a loop of its own: the policy holds, float32 islands and the log are for `fit`"
    )
    assert said[-1] == "4 runs, 13 steps, no loss scale, 3 layers in float32"


OWN_OPTIMIZERS = (
    BEGIN
    + """
import tensorflow as tf

class Two(keras.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = keras.layers.Dense(1), keras.layers.Dense(1)

    def call(self, x):
        return self.left(x) + self.right(x)

    def compile(self, *optimizers):
        super().compile()
        self.optimizers = optimizers

    def train_step(self, x):
        for part, optimizer in zip((self.left, self.right), self.optimizers):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(x) ** 2)
            weights = part.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
        return {"loss": loss}

def main():
    model = Two()
    model.build((None, 4))
    model.compile(keras.optimizers.Adam(), keras.optimizers.SGD())
    model.fit(tf.data.Dataset.from_tensor_slices(x).batch(16), epochs=2, verbose=0)

main()
"""
)


def test_optimizers_that_a_train_step_brings_along_are_counted(tmp_path):
    """As those of a GAN, when the function that made them has returned."""
    done, said = run(tmp_path, OWN_OPTIMIZERS, "--policy", "mixed_bfloat16", "--no-islands")
    assert done.returncode == 0, done.stderr
    assert said[-1] == "2 runs, 16 steps, no loss scale"


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


def test_a_script_of_tensorflow_1_is_scaled(tmp_path):
    """With --tf1: the shim, the rewrite, and loss scaling for optimizers that have none; in both kinds of sessions."""
    done, said = run(tmp_path, TF1, "--tf1", "--policy", "mixed_bfloat16", backend="tensorflow")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert said[0].startswith("TensorFlow 1 shim, graph rewrite to bfloat16, a dynamic loss scale for optimizers that")
    hook = "no log: tfmixed.compat.v1.LossScaleHook writes one"
    assert said[1:] == [f"2 runs, 19 steps, 1 skipped, final scales 16384 to 32768; {hook}"]


def test_a_script_of_tensorflow_1_may_import_keras_first(tmp_path):
    """Whose import is then what imports TensorFlow."""
    code = "import keras" + TF1.replace("range(10)", "range(5)")
    done, said = run(tmp_path, code, "--tf1", backend="tensorflow")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert said[1].startswith("2 runs, 14 steps, 1 skipped")


def test_tf1_applies_nothing_to_a_script_of_keras(tmp_path):
    """And says so, as without --tf1 of one of TensorFlow 1."""
    done, said = run(tmp_path, BEGIN + "net(keras.Input((4,)))", "--tf1", backend="tensorflow")
    assert done.returncode == 0, done.stderr
    assert said == ["nothing was applied: the script took no step of TensorFlow 1 (one of Keras needs no --tf1)"]
    code = "import keras\nimport tensorflow"
    done, said = run(tmp_path, code, backend="tensorflow")
    assert said == ["nothing was applied: the script made no Keras model (one of TensorFlow 1 takes --tf1)"]


def test_tensorflow_1_needs_the_backend_tensorflow(tmp_path):
    """One line, and exit code 2."""
    done, said = run(tmp_path, TF1, "--tf1", backend="jax")
    assert done.returncode == 2
    assert len(said) == 1
    assert said[0].startswith("--tf1: ")
