"""Times training under the graph rewrite against float32, in interleaved sessions of one process.

    python benchmarks/tf1_rewrite.py                            # writes benchmarks/results/tf1_rewrite.md
    python benchmarks/tf1_rewrite.py --rounds 31 --output -     # prints it only

The models are TensorFlow 1 code with placeholders, `get_variable` and a session. A step reads its batch, computes the
gradients and updates the weights. `scaled` is `enable_mixed_precision_graph_rewrite`, with the rewrite and a dynamic
loss scale. `rewrite` is the rewrite alone, and `scaling` the loss scale in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy
import tensorflow
from rich.console import Console
from rich.table import Table

import tfmixed
import tfmixed.compat.v1 as tf
from tfmixed import hardware
from tfmixed._utils import timing

RESULTS = Path(__file__).parent / "results" / "tf1_rewrite.md"
VARIANTS = {"float32": (False, False), "scaled": (True, True), "rewrite": (True, False), "scaling": (False, True)}
RANDOM = numpy.random.default_rng(0)


def variable(name: str, shape: list[int]) -> object:
    return tf.get_variable(name, shape, initializer=tf.glorot_uniform_initializer(seed=1))


def classified(logits: object, classes: int, batch: int) -> tuple[object, dict]:
    labels = tf.placeholder(tf.int32, [None])
    loss = tf.losses.sparse_softmax_cross_entropy(labels, logits)
    return loss, {labels: RANDOM.integers(0, classes, batch)}


def mlp(width: int, batch: int) -> tuple[object, dict]:
    """A network of three dense layers of `width` units."""
    x = tf.placeholder(tf.float32, [None, width])
    hidden = x
    for number in range(3):
        bias = tf.get_variable(f"bias{number}", [width], initializer=tf.zeros_initializer())
        hidden = tf.nn.relu(tf.matmul(hidden, variable(f"kernel{number}", [width, width])) + bias)
    loss, feed = classified(tf.matmul(hidden, variable("out", [width, 10])), 10, batch)
    return loss, {x: RANDOM.normal(size=(batch, width)), **feed}


def cnn(channels: int, batch: int) -> tuple[object, dict]:
    """A network of four convolutions with batch normalization on 32 x 32 images."""
    x = tf.placeholder(tf.float32, [None, 32, 32, channels])
    hidden = x
    for number in range(4):
        hidden = tf.nn.conv2d(hidden, variable(f"kernel{number}", [3, 3, channels, channels]), 1, "SAME")
        factors = [tf.get_variable(f"{name}{number}", initializer=tf.fill([channels], value)) for name, value in NORMAL]
        hidden = tf.nn.relu(tf.nn.fused_batch_norm(hidden, *factors)[0])
    pooled = tf.reduce_mean(hidden, [1, 2])
    loss, feed = classified(tf.matmul(pooled, variable("out", [channels, 10])), 10, batch)
    return loss, {x: RANDOM.normal(size=(batch, 32, 32, channels)), **feed}


NORMAL = (("scale", 1.0), ("offset", 0.0))
NETWORKS: dict[str, tuple[Callable[[], tuple[object, dict]], Callable[[], object]]] = {
    "MLP 2048, batch 512, Adam": (lambda: mlp(2048, 512), lambda: tf.train.AdamOptimizer(1e-4)),
    "MLP 2048, batch 512, SGD": (lambda: mlp(2048, 512), lambda: tf.train.GradientDescentOptimizer(1e-3)),
    "CNN 128, batch 64, Adam": (lambda: cnn(128, 64), lambda: tf.train.AdamOptimizer(1e-4)),
}


def step(network: str, rewritten: bool, scaled: bool, stack: contextlib.ExitStack) -> Callable[[], object]:
    """Returns a function that takes one training step of a variant."""
    build, optimizer = NETWORKS[network]
    opt = optimizer()
    if rewritten:
        wrapped = tf.enable_mixed_precision_graph_rewrite(opt)
    if scaled:
        opt = wrapped if rewritten else tf.LossScaleOptimizer(opt)
    with tensorflow.Graph().as_default():
        loss, feed = build()
        train = opt.minimize(loss)
        session = stack.enter_context(tf.Session(config=tf.ConfigProto()))
        session.run(tf.global_variables_initializer())
    if rewritten:
        tf.disable_mixed_precision_graph_rewrite()
    feed = {placeholder: value.astype(placeholder.dtype.as_numpy_dtype) for placeholder, value in feed.items()}
    return lambda: session.run(train, feed)


def measured(network: str, rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds of interleaved steps of each variant."""
    with contextlib.ExitStack() as stack:
        steps = {name: step(network, *how, stack) for name, how in VARIANTS.items()}
        timing.interleaved(steps, 3)
        times = timing.interleaved(steps, rounds)
    return {name: [1e3 * seconds for seconds in taken] for name, taken in times.items()}


def table(network: str, times: dict[str, list[float]]) -> Table:
    shown = Table(title=network)
    for heading in ("variant", "ms", "min - max", "x float32"):
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    plain = statistics.median(times["float32"])
    for name, values in times.items():
        median = statistics.median(values)
        shown.add_row(name, f"{median:.1f}", f"{min(values):.1f} - {max(values):.1f}", f"{plain / median:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each variant (default: %(default)s)")
    parser.add_argument("--output", default=str(RESULTS), help="file to write, or - (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console(width=80, record=True)
    for network in NETWORKS:
        console.print(table(network, measured(network, arguments.rounds)))
    device = hardware.describe().main
    about = (
        f"`python benchmarks/tf1_rewrite.py --rounds {arguments.rounds}` on {device.name}\n"
        f"({', '.join(device.features)}), {os.cpu_count()} cores; TensorFlow {tensorflow.__version__}, "
        f"tfmixed {tfmixed.__version__}."
    )
    if arguments.output != "-":
        text = f"# The graph rewrite against float32\n\n{about}\n\n```\n{console.export_text()}```\n"
        Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
