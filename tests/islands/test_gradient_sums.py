"""Float32 sums in the backward pass, on all backends."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
from backend import BACKEND, ON_CPU, breaks_on_cpus, needs_tensorflow, tf
from keras import layers, ops
from thorough import thorough

import tfmixed
from tfmixed._islands import gradient_sums
from tfmixed.doctor import backend_settings

if BACKEND == "jax":
    import jax

pytestmark = pytest.mark.filterwarnings("ignore:policy .* is slow here")
HALVES = ["mixed_bfloat16", "mixed_float16"]
TERMS = 4096


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No layer of another test keeps the sums in float32."""
    monkeypatch.setattr(gradient_sums, "_covered", weakref.WeakSet())


def gradients(layer, x, compiled=True):
    """Returns the gradients of the sum of a layer's outputs."""
    variables = layer.trainable_variables
    if BACKEND == "torch":
        ops.sum(ops.cast(layer(ops.convert_to_tensor(x)), "float32")).backward()
        grads = [variable.value.grad for variable in variables]
        for variable in variables:
            variable.value.grad = None
    elif BACKEND == "jax":

        def total(values):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return ops.sum(ops.cast(layer(x), "float32"))

        gradient = jax.grad(total)
        grads = (jax.jit(gradient) if compiled else gradient)([variable.value for variable in variables])
    else:

        def gradient(x):
            with tf.GradientTape() as tape:
                total = tf.reduce_sum(tf.cast(layer(x), "float32"))
            return [tf.convert_to_tensor(grad) for grad in tape.gradient(total, [v.value for v in variables])]

        function = tf.function(gradient, jit_compile=compiled == "xla") if compiled else gradient
        grads = function(tf.constant(x))
    return [ops.convert_to_numpy(grad).astype("float64") for grad in grads]


def errors(make, x, policy, compiled=True, **arguments):
    """Returns the relative error of the gradient of each variable against float32."""
    results = []
    for name in ("float32", policy):
        keras.utils.set_random_seed(0)
        tfmixed.set_policy(name, **arguments)
        layer = make()
        layer.build((None, *x.shape[1:]))
        results.append(gradients(layer, x, compiled))
    return [np.linalg.norm(half - full) / np.linalg.norm(full) for full, half in zip(*results, strict=True)]


ROWS, IMAGES = np.ones((TERMS, 8), "float32"), np.ones((1, 64, 64, 8), "float32")
STEPS, TOKENS = np.ones((TERMS, 2, 8), "float32"), np.zeros((8, TERMS // 8), "int32")
LAYERS = {
    "Dense": (lambda: layers.Dense(4), ROWS),
    "EinsumDense": (lambda: layers.EinsumDense("btc,cd->btd", (None, 4), bias_axes="d"), STEPS),
    "Conv1D": (lambda: layers.Conv1D(4, 1), STEPS),
    "Conv2D": (lambda: layers.Conv2D(4, 1), IMAGES),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 1), IMAGES),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(1), IMAGES),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(4, 1), IMAGES),
    "Embedding": (lambda: layers.Embedding(3, 4), TOKENS),
    "PReLU": (lambda: layers.PReLU(shared_axes=(1, 2)), -IMAGES),
    "SimpleRNN": (lambda: layers.SimpleRNN(4), STEPS),
    "LSTM": (lambda: layers.LSTM(4), STEPS),
    "GRU": (lambda: layers.GRU(4), STEPS),
}


def in_both(kinds, in_float16):
    """Returns all kinds in bfloat16, and some in float16. The rest is thorough."""
    bfloat16 = [pytest.param(kind, HALVES[0], id=f"{kind}-bfloat16") for kind in kinds]
    marks = {kind: () if kind in in_float16 else thorough for kind in kinds}
    return bfloat16 + [pytest.param(kind, HALVES[1], id=f"{kind}-float16", marks=marks[kind]) for kind in kinds]


@pytest.mark.parametrize(("kind", "policy"), in_both(LAYERS, {"Conv1D", "Embedding", "GRU", "SeparableConv2D"}))
def test_gradients_of_keras_layers_are_those_of_float32(kind, policy):
    """Kernels and biases alike."""
    assert max(errors(*LAYERS[kind], policy)) < 0.02


# At least these are wrong without the package, compiled.
WRONG = {
    "tensorflow": {
        "mixed_bfloat16": {"Dense", "EinsumDense", "Conv1D", "DepthwiseConv2D", "SimpleRNN", "LSTM", "GRU"},
        "mixed_float16": {"DepthwiseConv2D", "SeparableConv2D", "GRU"},
    },
    "jax": {"mixed_bfloat16": {"Conv2D", "DepthwiseConv2D", "Embedding"}, "mixed_float16": {"Embedding"}},
    "torch": {"mixed_bfloat16": {"Embedding"}, "mixed_float16": {"Conv1D", "Embedding"}},
}


@breaks_on_cpus
@pytest.mark.parametrize("policy", [HALVES[0], pytest.param(HALVES[1], marks=pytest.mark.slow)])
def test_the_sums_of_the_backend_are_wrong(policy):
    """With `float32_sums=False`. A backend that adds up in float32 itself makes replacements unnecessary."""
    wrong = {kind for kind in WRONG[BACKEND][policy] if max(errors(*LAYERS[kind], policy, float32_sums=False)) > 0.05}
    assert wrong == WRONG[BACKEND][policy]


class Own(layers.Layer):
    """A custom layer that uses one weight."""

    def __init__(self, shape, function):
        super().__init__()
        self.shape, self.function = shape, function

    def build(self, input_shape):
        self.weight = self.add_weight(shape=self.shape, initializer="ones")

    def call(self, x):
        return self.function(x, self.weight)


OWN = {
    "bias": ((8,), lambda x, w: x + w),
    "scale": ((8,), lambda x, w: x * w),
    "quotient": ((8,), lambda x, w: x / w),
    "broadcast axes": ((1, 8), lambda x, w: ops.add(ops.reshape(x, (4, -1, 8)), w)),
    "broadcast_to": ((8,), lambda x, w: x + ops.broadcast_to(w, ops.shape(x))),
    "tile": ((1, 8), lambda x, w: x + ops.tile(w, (TERMS, 1))),
    "take": ((3, 8), lambda x, w: ops.take(w, ops.zeros_like(x[:, 0], "int32"), axis=0)),
    "take of a product": ((3, 8), lambda x, w: ops.take(w * 2, ops.zeros_like(x[:, 0], "int32"), axis=0)),
    "take on axis 1": ((8, 3), lambda x, w: ops.take(w, ops.zeros_like(x[:, 0], "int32"), axis=1)),
    "segment_sum": ((8,), lambda x, w: ops.segment_sum(x * w, ops.zeros_like(x[:, 0], "int32"), 2)),
}


@pytest.mark.parametrize("promote", [False, pytest.param(True, marks=thorough)])
@pytest.mark.parametrize(("kind", "policy"), in_both(OWN, {"bias", "tile", "take"}))
def test_gradients_of_custom_layers_are_those_of_float32(kind, policy, promote):
    """Also if their code runs in half precision."""
    shape, function = OWN[kind]
    assert max(errors(lambda: Own(shape, function), ROWS / 2, policy, promote=promote)) < 0.02


FIRST = np.zeros(TERMS, "int32")
IN_TENSORFLOW = {
    "gather": ((3, 8), lambda _, w: tf.gather(w * 2, FIRST)),
    "gather on axis 1": ((8, 3), lambda _, w: tf.gather(w * 2, FIRST, axis=1)),
    "gather_nd": ((3, 8), lambda _, w: tf.gather_nd(w * 2, FIRST[:, None])),
    "embedding_lookup_sparse": (
        (3, 8),
        lambda _, w: tf.nn.embedding_lookup_sparse(w * 2, tf.sparse.from_dense(np.ones((1, TERMS), "int64")), None),
    ),
    "segment_mean": ((8,), lambda x, w: tf.math.segment_mean(x * w, FIRST)),
    "sparse product": (
        (1, 8),
        lambda x, w: tf.sparse.sparse_dense_matmul(tf.sparse.from_dense(tf.ones((TERMS, 1), x.dtype)), w * 2),
    ),
    "product of batches": ((8, 4), lambda x, w: tf.matmul(1.5 * x[:, None], w)),
    "cumsum": ((8,), lambda x, w: tf.cumsum(x * w) / TERMS),
    "cumprod": ((8,), lambda x, w: tf.math.cumprod(x * 2 * w) / TERMS),
    "xlogy": ((8,), lambda x, w: tf.math.xlogy(1.5 * x, w * 2)),
    "resize": ((1, 1, 1, 8), lambda _, w: tf.image.resize(w * 2, (64, 64), "nearest")),
    "dilation2d": (
        (1, 1, 8),
        lambda x, w: tf.nn.dilation2d(tf.reshape(x, (1, 64, 64, 8)), w * 2, [1] * 4, "SAME", "NHWC", [1] * 4),
    ),
}


@needs_tensorflow
@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=thorough)])
@pytest.mark.parametrize("policy", HALVES)
@pytest.mark.parametrize("kind", IN_TENSORFLOW)
def test_gradients_of_tensorflow_operations_are_those_of_float32(kind, policy, compiled):
    """In half precision, in custom layers."""
    shape, function = IN_TENSORFLOW[kind]
    assert max(errors(lambda: Own(shape, function), ROWS / 2, policy, compiled, promote=False)) < 0.02


@pytest.mark.parametrize("compiled", [False, True, "xla"])
def test_compiled_and_eager_gradients_are_right(compiled):
    """In the modes that the backend has."""
    model = LAYERS["Conv2D"][0]
    assert max(errors(lambda: keras.Sequential([model(), layers.Dense(2)]), IMAGES, HALVES[0], compiled)) < 0.02


def bias_error(layer, terms=TERMS):
    *_, bias = gradients(layer, np.ones((terms, 64, 2), "float32"))
    return abs(bias.reshape(-1, 2)[0] / (64 * terms) - 1).max()


class FirstRow(layers.Embedding):
    """Returns the first row of the table for each row of floats."""

    def call(self, x):
        return super().call(ops.zeros_like(x[..., 0], "int32"))


WRONG_LAYER = {
    "tensorflow": lambda: layers.Dense(2),
    "jax": lambda: layers.Conv1D(2, 1),
    "torch": lambda: FirstRow(3, 2),
}[BACKEND]


def built(policy=HALVES[0]):
    with tfmixed.policy_scope(policy, promote=False, float32_sums=False):
        layer = WRONG_LAYER()
    layer.build((None, 64, 2))
    return layer


def test_a_scope_ends_with_its_layers():
    """Layers of a `policy_scope` keep float32 sums after it, and the backend has its own sums once they are gone."""
    with tfmixed.policy_scope(HALVES[0], promote=False):
        layer = WRONG_LAYER()
    layer.build((None, 64, 2))
    assert bias_error(layer) < 0.02
    assert backend_settings.read().float32_sums
    del layer
    gc.collect()
    assert not backend_settings.read().float32_sums
    assert bias_error(built()) > 0.1 or not ON_CPU


def test_the_switch_is_off_for_existing_layers_too():
    """`float32_sums=False` compares with the backend's own sums."""
    tfmixed.set_policy(HALVES[0])
    layer = WRONG_LAYER()
    layer.build((None, 64, 2))
    with tfmixed.policy_scope(HALVES[0], float32_sums=False):
        assert not gradient_sums.is_on()
    assert bias_error(layer) < 0.02


def test_force_float32_gives_a_model_float32_sums():
    """A model that was built without `set_policy`, until it is deleted."""
    model = keras.Sequential([keras.Input((64, 2)), built()])
    assert not gradient_sums.is_on()
    tfmixed.force_float32(model)
    assert bias_error(model) < 0.02


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's convolutions are replaced")
def test_convolutions_take_keyword_arguments():
    """As `keras.ops.image.extract_patches` passes them, in any precision."""
    tfmixed.set_policy(HALVES[1])
    for dtype in ("float32", "float16"):
        assert ops.image.extract_patches(ops.ones((1, 4, 4, 3), dtype), (2, 2)).shape == (1, 2, 2, 12)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX caches transposed functions")
def test_functions_that_jax_has_cached_are_transposed_again():
    """A gradient that was computed before `set_policy`."""
    tokens = np.zeros(TERMS, "int32")

    def total(table):
        return jax.numpy.sum(jax.numpy.take(table.astype("bfloat16"), tokens, axis=0).astype("float32"))

    table = np.ones((2, 1), "float32")
    before = float(jax.grad(total)(table)[0, 0])
    tfmixed.set_policy(HALVES[0])
    assert before < 1000 or not ON_CPU
    assert float(jax.grad(total)(table)[0, 0]) == TERMS


@pytest.mark.filterwarnings("ignore:policy .* keeps variables in")
@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_embeddings_of_pure_policies(policy):
    """A half-precision table: only the sum is rounded."""
    assert max(errors(lambda: layers.Embedding(3, 4), TOKENS, policy)) < 0.02


@needs_tensorflow
def test_take_accepts_what_keras_accepts():
    """Tensors of unknown rank and ragged tensors."""
    tfmixed.set_policy(HALVES[0])

    @tf.function(input_signature=[tf.TensorSpec(None, "bfloat16")])
    def first_rows(x):
        return ops.take(x, [0, 0], axis=0)

    assert first_rows(tf.ones((3, 2), "bfloat16")).shape == (2, 2)
    ragged = tf.RaggedTensor.from_row_lengths(tf.ones(3, "bfloat16"), [1, 2])
    assert ops.take(ragged, [1], axis=0).shape[0] == 1


def test_files_do_not_change():
    """Keras alone loads them."""
    configs = []
    for float32_sums in (True, False):
        tfmixed.set_policy(HALVES[0], float32_sums=float32_sums)
        model = keras.Sequential([keras.Input((4,), name="x"), layers.Dense(2, name="dense")], name="model")
        configs.append(model.to_json())
    assert configs[0] == configs[1]


@needs_tensorflow
def test_embeddings_gather_float32_rows():
    """The table is not cast, and its gradient stays sparse."""
    tfmixed.set_policy(HALVES[0])
    embed = layers.Embedding(1000, 4)
    embed.build()

    @tf.function
    def gradient(tokens):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(tf.cast(embed(tokens), "float32"))
        return tape.gradient(total, embed.embeddings.value)

    assert isinstance(gradient(tf.constant(TOKENS)), tf.IndexedSlices)
    graph = gradient.get_concrete_function(tf.constant(TOKENS)).graph
    assert not [op for op in graph.get_operations() if op.type == "Cast" and 1000 in (op.inputs[0].shape or ())]
    assert embed(TOKENS).dtype == "float32"  # for the script; bfloat16 for Keras layers


@needs_tensorflow
@pytest.mark.slow
def test_replicas_sum_in_float32():
    """Their gradient functions run in threads."""
    from replicas import mirrored

    strategy = mirrored()
    tfmixed.set_policy(HALVES[0])
    with strategy.scope():
        model = keras.Sequential([keras.Input((64, 2)), layers.Dense(2)])
        model.compile(tfmixed.LossScaleOptimizer(keras.optimizers.SGD(1.0)), lambda _, pred: ops.sum(pred) / TERMS)
    before = model.layers[0].bias.numpy()
    model.fit(np.ones((TERMS, 64, 2)), np.zeros(TERMS), batch_size=TERMS, verbose=0)
    np.testing.assert_allclose(before - model.layers[0].bias.numpy(), 64, rtol=0.02)


@needs_tensorflow
@pytest.mark.slow
def test_force_float32_after_fit_traces_again():
    """A compiled step would keep the sums that it was traced with."""
    with tfmixed.policy_scope(HALVES[0], float32_sums=False):
        model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    model.compile(keras.optimizers.SGD(1.0), lambda _, predicted: ops.mean(predicted), jit_compile=False)
    moved = []
    for force in (lambda _: None, tfmixed.force_float32):
        force(model)
        before = model.layers[0].bias.numpy()
        model.fit(ROWS, np.zeros(TERMS), batch_size=TERMS, verbose=0)
        moved.append((before - model.layers[0].bias.numpy()).sum())
    assert moved[0] < 0.5
    assert moved[1] == pytest.approx(1, rel=0.01)


SCRIPT = """
import keras, numpy as np
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
model.compile(keras.optimizers.SGD(1.0), lambda _, predicted: keras.ops.mean(predicted), jit_compile=False)
model.fit(np.ones((4096, 8)), np.zeros(4096), batch_size=4096, verbose=0)
print("moved", -keras.ops.convert_to_numpy(model.layers[0].bias).sum())
model.save("model.keras")
"""
LOAD = "import keras, sys; keras.models.load_model('model.keras', compile=False); assert 'tfmixed' not in sys.modules"


@needs_tensorflow
@pytest.mark.slow
def test_a_script_under_run_sums_in_float32(tmp_path):
    """With a switch, and Keras alone loads what it saves."""
    (tmp_path / "script.py").write_text(SCRIPT)
    moved = []
    for switch in ([], ["--no-float32-sums"]):
        options = ["--policy", "mixed_bfloat16", "--no-islands", *switch]
        command = [sys.executable, "-m", "tfmixed", "run", *options, "script.py"]
        output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
        moved.append(float(output.partition("moved ")[2].split()[0]))
    assert moved[0] == pytest.approx(1, rel=0.01)
    assert moved[1] < 0.5
    subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, timeout=120, check=True)
