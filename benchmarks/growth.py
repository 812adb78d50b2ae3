"""Times the update and its finite check over parameters (at 16 variables) and over variables (at 8 M parameters).

    python benchmarks/growth.py      # benchmarks/results/growth.md and growth.png; 16 GiB of memory

Adam on TensorFlow, with tfmixed's and Keras's LossScaleOptimizer interleaved in one process.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import keras
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from update import first_and_later, update

import tfmixed
from tfmixed import plotting
from tfmixed._core.finite_check import FiniteCheck
from tfmixed._utils import timing

RESULTS = Path(__file__).parent / "results"
WIDTH = 2048
CURVES = {"Keras": "#D55E00", "tfmixed": "#0072B2", "tfmixed, unfused": "#56B4E9", "check": "#009E73"}


REASONS = """\
Where the curves bend:

- Left, below about 10 M parameters: the fixed cost of starting operations dominates, and weights, moments and gradients
  fit in the cache. Above, every curve is a straight line, because time is bytes divided by bandwidth. tfmixed is lower,
  since its compiled update reads and writes memory a third as often.
- Right, up to 128 variables (65,536 elements each): the same bytes in more pieces take little more time. Beyond that,
  tfmixed does not compile the update, since XLA's kernels are not faster on small pieces, and joins its unfused curve.
- Right, above: the cost is that of the operations, about a dozen for each variable. The check has one for each.
"""


class Point(NamedTuple):
    """Median milliseconds of one size."""

    parameters: int
    variables: int
    ms: dict[str, float]


def check(shape: tuple[int, ...], count: int) -> Callable[[], object]:
    """Returns the finite check alone."""
    gradients = [tf.random.stateless_normal(shape, (0, index)) for index in range(count)]
    check, scale = FiniteCheck.for_gradients([False] * count, 1, needs_amax=False), tf.constant(2.0**15)
    return tf.function(lambda: check.measure(gradients, scale, range(count)), autograph=False)


def measured(shape: tuple[int, ...], count: int, rounds: int) -> Point:
    functions = {
        "Keras": update(keras.optimizers.LossScaleOptimizer, shape, count),
        "tfmixed": update(tfmixed.LossScaleOptimizer, shape, count),
        "check": check(shape, count),
    }
    parameters = count * tf.TensorShape(shape).num_elements()
    if parameters <= 2**26:
        functions["tfmixed, unfused"] = update(lambda adam: tfmixed.LossScaleOptimizer(adam, fuse=False), shape, count)
    _, times = first_and_later(functions, rounds)
    point = Point(parameters, count, timing.medians(times))
    print(
        f"{parameters:,} in {count}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in point.ms.items()), flush=True
    )
    return point


def lines(points: list[Point]) -> list[str]:
    """Returns a Markdown table."""
    head = ["parameters", "variables", "elements a variable", *(f"{name}, ms" for name in CURVES), "Keras / tfmixed"]
    rows = [
        [f"{point.parameters:,}", f"{point.variables:,}", f"{point.parameters // point.variables:,}"]
        + [f"{point.ms[name]:.2f}" if name in point.ms else "-" for name in CURVES]
        + [f"{point.ms['Keras'] / point.ms['tfmixed']:.2f}"]
        for point in points
    ]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows)]


def drawn(by_parameters: list[Point], by_variables: list[Point]) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for axes, points, field in ((left, by_parameters, 0), (right, by_variables, 1)):
        for name, color in CURVES.items():
            known = [(point[field], point.ms[name]) for point in points if name in point.ms]
            axes.plot(*zip(*known, strict=True), marker="o", color=color, label=name)
        axes.set(xscale="log", yscale="log", ylabel="ms an update (check: of it)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3, which="both")
    left.set(title="16 variables", xlabel="parameters")
    right.set(title=f"{by_variables[0].parameters / 2**20:.0f} M parameters", xlabel="variables")
    left.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="calls of each (default: %(default)s)")
    parser.add_argument(
        "--largest", type=int, default=400, help="largest size in million parameters (default: %(default)s)"
    )
    arguments = parser.parse_args()
    millions = [size for size in (1, 4, 16, 64, 200, 400) if size <= arguments.largest]
    counts = (10, 30, 100, 128, 200, 500, 1000, 2000)
    # Each size runs in its own process, which frees its memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        grown = [pool.submit(measured, (size * 2**16 // WIDTH, WIDTH), 16, arguments.rounds) for size in millions]
        split = [pool.submit(measured, (2**23 // count,), count, arguments.rounds) for count in counts]
        by_parameters, by_variables = ([point.result() for point in points] for points in (grown, split))
    title = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, `python benchmarks/growth.py`"
    text = [title, "", *lines(by_parameters), "", *lines(by_variables), "", "![](growth.png)", "", REASONS]
    (RESULTS / "growth.md").write_text("\n".join(text))
    plotting.save(drawn(by_parameters, by_variables), RESULTS / "growth.png")


if __name__ == "__main__":
    main()
