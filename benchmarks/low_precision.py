"""Measures memory, time and training loss with `LowPrecisionOptimizer` around Adam.

    python benchmarks/low_precision.py                      # half an hour; prints all sections in Markdown
    python benchmarks/low_precision.py bytes time           # `bytes` draws docs/memory.png
    KERAS_BACKEND=jax python benchmarks/low_precision.py peak

`peak` reads the memory of each training from outside of its process. `bytes` and `time` need TensorFlow.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits

import tfmixed
from tfmixed import hardware, plotting
from tfmixed._cli.bench import networks
from tfmixed._utils import timing
from tfmixed.plotting import style

SEEDS = 5
PICTURE = Path(__file__).parents[1] / "docs" / "memory.png"


class Form(NamedTuple):
    """A form of weights and states: a dtype policy, and arguments of `LowPrecisionOptimizer` or None without it."""

    policy: str
    arguments: dict[str, str] | None = None

    def optimizer(self, learning_rate: Any) -> keras.optimizers.Optimizer:
        adam = keras.optimizers.Adam(learning_rate)
        return adam if self.arguments is None else tfmixed.LowPrecisionOptimizer(adam, **self.arguments)


FORMS = {
    "float32": Form("float32"),
    "mixed_bfloat16": Form("mixed_bfloat16"),
    "mixed_bfloat16, bfloat16 states": Form("mixed_bfloat16", {"states": "bfloat16"}),
    "mixed_bfloat16, int8 states": Form("mixed_bfloat16", {"states": "int8"}),
    "nearest, float32 states": Form("bfloat16", {"weights": "nearest", "states": "float32"}),
    "stochastic, float32 states": Form("bfloat16", {"states": "float32"}),
    "stochastic, bfloat16 states": Form("bfloat16", {"states": "bfloat16"}),
    "stochastic, int8 states": Form("bfloat16", {"states": "int8"}),
    "split, float32 states": Form("bfloat16", {"weights": "split", "states": "float32"}),
    "split, bfloat16 states": Form("bfloat16", {"weights": "split", "states": "bfloat16"}),
    "split, int8 states": Form("bfloat16", {"weights": "split", "states": "int8"}),
}
LARGE = {"samples": 1, "tokens": 32, "width": 2048, "depth": 8, "heads": 16, "vocabulary": 8000}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bytes_section() -> Iterator[str]:
    yield "Bytes a parameter, counted in live buffers, in six kernels of 1,024 x 1,024 without biases.\n"
    shares = {name: bytes_of(form) for name, form in FORMS.items()}
    rows = [[name, *(f"{number:.2f}" for number in (*share, sum(share)))] for name, share in shares.items()]
    plotting.save(drawn(shares), PICTURE)
    yield table(["weights and states", "weights", "gradient", "optimizer", "sum"], rows)


def drawn(shares: dict[str, list[float]]) -> Figure:
    with style.sheet("light", style.WIDE, 3.4) as (figure, colors):
        axes = figure.subplots()
        names, starts = list(shares), numpy.zeros(len(shares))
        for part, label in enumerate(("weight", "gradient", "optimizer, Adam")):
            widths = numpy.array([share[part] for share in shares.values()])
            axes.barh(names, widths, left=starts, color=colors.colors[part], label=label)
            starts += widths
        for name, end in zip(names, starts, strict=True):
            axes.text(end + 0.1, name, f"{end:.0f}", va="center", color=colors.ink)
        axes.invert_yaxis()
        axes.set_xlabel("bytes a parameter")
        style.legend(axes, style.WIDE)
    return figure


def bytes_of(form: Form) -> list[float]:
    """Returns the bytes a parameter of weights, gradients and optimizer variables of a small model after a step."""
    import tensorflow as tf

    keras.config.set_dtype_policy(form.policy)
    model = keras.Sequential([keras.Input((1024,)), *(keras.layers.Dense(1024, use_bias=False) for _ in range(6))])
    weights, optimizer = model.trainable_variables, form.optimizer(1e-3)
    optimizer.build(weights)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(tf.ones((4, 1024))))
    grads = tape.gradient(loss, [weight.value for weight in weights])
    optimizer.apply(grads, weights)
    variables = [[value.value for value in values] for values in (weights, optimizer.variables)]
    tensors = variables[0], grads, variables[1]
    return [sum(value.numpy().nbytes for value in values) / 6 / 1024**2 for values in tensors]


def train_large(name: str) -> None:
    """Trains the large Transformer for three steps, in a process whose parent reads its memory before and after."""
    form = FORMS[name]
    print("before", flush=True)
    input()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(form.policy)
    model, x, y = networks.transformer(**LARGE)
    model.optimizer = form.optimizer(1e-4)
    model.fit(x, y, batch_size=1, epochs=3, verbose=0)
    print("after", model.count_params(), flush=True)
    input()


def peak(name: str) -> tuple[int, int]:
    """Returns the parameters of the large Transformer, and the peak memory of its training above that before it."""
    command = [sys.executable, __file__, "--train", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        peaks = []
        for word in ("before", "after"):
            line = process.stdout.readline()
            while not line.startswith(word):
                line = process.stdout.readline()
                assert line, f"training with {name} failed"
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peaks.append(1024 * int(status.split("VmHWM:")[1].split()[0]))
            process.stdin.write("\n")
            process.stdin.flush()
    return int(line.split()[1]), peaks[1] - peaks[0]


PEAKS = ("mixed_bfloat16", "stochastic, bfloat16 states", "stochastic, int8 states")


def peak_section() -> Iterator[str]:
    measured = {name: peak(name) for name in PEAKS}
    count, base = measured[PEAKS[0]]
    yield f"Peak memory of `fit`, {keras.backend.backend()}, a Transformer of {count:,} parameters, batch 1.\n"
    yield table(
        ["weights and states", "MiB", "bytes a parameter", "of mixed_bfloat16"],
        [[name, f"{size / 2**20:,.0f}", f"{size / count:.2f}", f"{size / base:.2f}"]
         for name, (_, size) in measured.items()],
    )  # fmt: skip


def update(form: Form, shapes: Sequence[tuple[int, ...]]) -> Callable[[], object]:
    """Returns a compiled step of Adam. In float32 it is the same step without rounding."""
    import tensorflow as tf

    random = numpy.random.default_rng(0)
    dtype = "bfloat16" if form.policy == "bfloat16" else "float32"
    weights = [keras.Variable(random.normal(size=shape), dtype=dtype) for shape in shapes]
    grads = [tf.cast(random.normal(size=shape), dtype) for shape in shapes]
    optimizer = form._replace(arguments=form.arguments or {"states": "float32"}).optimizer(1e-3)
    optimizer.build(weights)
    return tf.function(lambda: optimizer.apply(grads, weights), autograph=False)


SHAPES = {
    "6 x 2048 x 2048": [(2048, 2048)] * 6,
    "Transformer, width 512": [(8000, 512), (512, 8000), *([(512, 8, 64)] * 4 + [(512, 2048), (2048, 512)]) * 4],
}


def time_section(rounds: int = 61) -> Iterator[str]:
    yield "Update by Adam in ms. Ratios are to the compiled float32 update: of medians, and of the fastest.\n"
    names = ["float32", *(name for name, form in FORMS.items() if form.policy == "bfloat16" and "nearest" not in name)]
    for title, shapes in SHAPES.items():
        functions = {name: update(FORMS[name], shapes) for name in names}
        timing.interleaved(functions, 3)
        times = timing.interleaved(functions, rounds)
        median, least = timing.medians(times), {name: min(taken) for name, taken in times.items()}
        yield table(
            [title, "median", "minimum", "ratio of medians", "ratio of minima"],
            [[name, f"{1e3 * median[name]:.1f}", f"{1e3 * least[name]:.1f}",
              f"{median[name] / median['float32']:.2f}", f"{least[name] / least['float32']:.2f}"] for name in names],
        ) + "\n"  # fmt: skip


def digits() -> networks.Problem:
    x, y = load_digits(return_X_y=True)
    hidden = [keras.layers.Dense(128, activation="relu") for _ in range(2)]
    last = [keras.layers.Dense(10), keras.layers.Activation("linear", dtype="float32")]
    model = keras.Sequential([keras.Input((64,)), *hidden, *last])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, (x[:1437] / 16).astype("float32"), y[:1437]


def small_transformer() -> networks.Problem:
    return networks.transformer(samples=64, tokens=32, width=64, depth=2, heads=4, vocabulary=200)


TASKS = {"digits": (digits, 40, 64), "Transformer": (small_transformer, 60, 8)}


def loss(make: Callable[[], networks.Problem], epochs: int, batch: int, form: Form, seed: int) -> float:
    """Returns the loss of all training samples after a training whose learning rate falls to 0."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(form.policy)
    model, x, y = make()
    steps = epochs * math.ceil(len(x) / batch)
    model.optimizer = form.optimizer(keras.optimizers.schedules.CosineDecay(1e-3, steps))
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    return float(model.evaluate(x, y, batch_size=len(x), verbose=0))


def difference(losses: Sequence[float], reference: Sequence[float]) -> str:
    pairs = numpy.subtract(losses, reference)
    interval = float(stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs))
    return f"{pairs.mean():+.4f} ± {interval:.4f}"


LOSSES = [name for name in FORMS if name in {*PEAKS, "float32", "nearest, float32 states", "split, float32 states"}]


def loss_section() -> Iterator[str]:
    yield f"Loss of the training samples, {SEEDS} seeds, mean ± standard deviation. A difference is the mean over pairs"
    yield "of one seed, with its 95% interval by Student's t.\n"
    for title, task in TASKS.items():
        losses = {name: [loss(*task, FORMS[name], seed) for seed in range(SEEDS)] for name in LOSSES}
        yield table(
            [title, "loss", "difference from float32"],
            [[name, f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}",
              difference(found, losses["float32"])] for name, found in losses.items()],
        ) + "\n"  # fmt: skip


SECTIONS = {"bytes": bytes_section, "peak": peak_section, "time": time_section, "loss": loss_section}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="sections (default: all)")
    parser.add_argument("--train", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_large(arguments.train)
        return
    backend = keras.backend.backend()
    version = sys.modules[backend].__version__
    print(f"`python benchmarks/low_precision.py {' '.join(arguments.sections)}` on {hardware.describe().main.name},")
    print(f"{backend} {version}, Keras {keras.__version__}, Python {platform.python_version()};", end=" ")
    print(f"{datetime.date.today()}.\n")
    for name in arguments.sections or SECTIONS:
        for line in SECTIONS[name]():
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
