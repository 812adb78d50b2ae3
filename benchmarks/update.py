"""Times the optimizer's update alone against Keras's, by turns in one process, and against what memory allows.

    python benchmarks/update.py                                # the two sizes of the README
    python benchmarks/update.py --shape 2048 2048 --count 6
    KERAS_BACKEND=jax python benchmarks/update.py

`floor` is the time in which the bytes that any such update must move can be moved: it reads each gradient twice (to
check it, then to use it), reads the weight and Adam's two moments, and writes these three. The bandwidth is measured in
the same turns: two arrays are read and one is written. What fits in a cache can be faster than this floor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import keras
import numpy
from keras import ops
from rich.console import Console
from rich.table import Table

import tfmixed

STREAMED = 2**25
BACKEND = keras.backend.backend()


class ByScaler:
    """Adam as `GradScaler` steps it."""

    def __init__(self, adam: keras.optimizers.Optimizer) -> None:
        self.adam, self.scaler = adam, tfmixed.GradScaler()
        self.build, self.scale_loss = adam.build, self.scaler.scale

    def apply(self, gradients: list, weights: list) -> None:
        self.scaler.step(self.adam, zip(gradients, weights, strict=True))
        self.scaler.update()


VARIANTS = {
    "Keras Adam, unscaled": lambda adam: adam,
    "Keras LossScaleOptimizer": keras.optimizers.LossScaleOptimizer,
    "tfmixed": tfmixed.LossScaleOptimizer,
    "tfmixed, fuse=False": lambda adam: tfmixed.LossScaleOptimizer(adam, fuse=False),
    **({} if BACKEND == "jax" else {"tfmixed.GradScaler": ByScaler}),  # it keeps its state in variables
}


def update(make: Callable, shape: tuple[int, ...], count: int) -> Callable[[], None]:
    """Returns a function that takes one compiled step and waits for it."""
    random = numpy.random.default_rng(0)
    weights = [keras.Variable(random.normal(size=shape).astype("float32")) for _ in range(count)]
    gradients = [ops.convert_to_tensor(random.normal(size=shape).astype("float32")) for _ in range(count)]
    optimizer = make(keras.optimizers.Adam(1e-3))
    optimizer.build(weights)
    optimizer.scale_loss(0.0)  # the gradients count as those of a scaled loss
    if BACKEND == "tensorflow":
        import tensorflow

        return tensorflow.function(lambda: optimizer.apply(gradients, weights), autograph=False)
    if BACKEND == "torch":
        return finished(lambda: optimizer.apply(gradients, weights))
    import jax

    # State in, state out, in the same order: otherwise donated buffers are of no use. Gradients are no constants.
    step = jax.jit(lambda state, given: optimizer.stateless_apply(state[1], given, state[0]), donate_argnums=0)
    state = [weight.value for weight in weights], [variable.value for variable in optimizer.variables]

    def taken() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, gradients))

    return taken


def stream() -> Callable[[], None]:
    """Returns a function that reads two large arrays and writes one, in place: three passes over `STREAMED` float32."""
    if BACKEND == "tensorflow":
        import tensorflow

        total, term = (tensorflow.Variable(tensorflow.zeros((STREAMED,))) for _ in range(2))
        return tensorflow.function(lambda: total.assign_add(term), autograph=False)
    if BACKEND == "torch":
        import torch

        total, term = (torch.zeros(STREAMED, device=torch_device()) for _ in range(2))
        return finished(lambda: total.add_(term))
    import jax

    term = jax.numpy.zeros(STREAMED)
    step = jax.jit(lambda total, term: total + term, donate_argnums=0)
    total = jax.numpy.zeros(STREAMED)

    def taken() -> None:
        nonlocal total
        total = jax.block_until_ready(step(total, term))

    return taken


def torch_device() -> str:
    """Returns where Keras puts its tensors."""
    from keras.src.backend.torch.core import get_device

    return get_device()


def finished(run: Callable) -> Callable[[], None]:
    """Returns a function that runs and waits for the GPU, if there is one."""
    import torch

    def taken() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return taken


def by_turns(functions: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the seconds of each first call, and the milliseconds of `rounds` later ones."""
    firsts, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        firsts[name] = elapsed(function)
        elapsed(function)
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(1e3 * elapsed(function))
    return firsts, times


def elapsed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measured(shape: tuple[int, ...], count: int, rounds: int) -> Table:
    functions = {name: update(make, shape, count) for name, make in VARIANTS.items()}
    elements = count * math.prod(shape)
    firsts, times = by_turns({**functions, "stream": stream()}, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = 3 * 4 * STREAMED / median["stream"]  # bytes a millisecond
    floor = 8 * 4 * elements / bandwidth
    sizes = " x ".join(map(str, (count, *shape)))
    table = Table(title=f"Adam, {sizes}: floor {floor:.1f} ms at {bandwidth / 1e6:.0f} GB/s, {BACKEND}")
    for heading in ("update", "ms", "min - max", "x Keras's scaling", "x unscaled", "/ floor", "first step"):
        table.add_column(heading, justify="left" if heading == "update" else "right")
    for name in functions:
        others = (median[other] / median[name] for other in ("Keras LossScaleOptimizer", "Keras Adam, unscaled"))
        table.add_row(
            name,
            f"{median[name]:.2f}",
            f"{min(times[name]):.2f} - {max(times[name]):.2f}",
            *(f"{ratio:.2f}" for ratio in others),
            f"{median[name] / floor:.2f}",
            f"{firsts[name]:.2f} s",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", help="of each variable")
    parser.add_argument("--count", type=int, default=6, help="how many variables (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="turns of each (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = [((2048, 2048), 6), ((64, 64), 200)]
    if arguments.shape:
        sizes = [(tuple(arguments.shape), arguments.count)]
    for shape, count in sizes:
        Console(width=110).print(measured(shape, count, arguments.rounds))


if __name__ == "__main__":
    main()
