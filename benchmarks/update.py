"""Times the optimizer's update against that of Keras, interleaved in one process, and against the memory bandwidth.

    python benchmarks/update.py                                # the two sizes of the README
    python benchmarks/update.py --shape 2048 2048 --count 6
    KERAS_BACKEND=jax python benchmarks/update.py

`floor` is the time to move the bytes that every such update must move. It reads each gradient twice (to check it, then
to use it), reads the weight and Adam's two moments, and writes these three. The bandwidth is measured in the same
rounds, with two arrays that are read and one that is written. Arrays that fit in a cache can be faster than this floor.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import keras
import numpy
from keras import ops
from rich.console import Console
from rich.table import Table

import tfmixed
from tfmixed._utils import timing
from tfmixed.doctor import speed_test

STREAMED = 2**25
BACKEND = keras.backend.backend()


class ByScaler:
    """Adam stepped by `GradScaler`."""

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
    **({} if BACKEND == "jax" else {"tfmixed.GradScaler": ByScaler}),  # its state is in variables
}


def update(make: Callable, shape: tuple[int, ...], count: int) -> Callable[[], None]:
    """Returns a function that takes one compiled step and waits for the device."""
    random = numpy.random.default_rng(0)
    weights = [keras.Variable(random.normal(size=shape).astype("float32")) for _ in range(count)]
    gradients = [ops.convert_to_tensor(random.normal(size=shape).astype("float32")) for _ in range(count)]
    optimizer = make(keras.optimizers.Adam(1e-3))
    optimizer.build(weights)
    optimizer.scale_loss(0.0)  # marks the gradients as those of a scaled loss
    if BACKEND == "tensorflow":
        import tensorflow

        # Gradients are arguments: of small constants, TensorFlow computes Keras's finite check while it traces.
        compiled = tensorflow.function(lambda given: optimizer.apply(given, weights), autograph=False)
        return lambda: compiled(gradients)
    if BACKEND == "torch":
        return finished(lambda: optimizer.apply(gradients, weights))
    import jax

    # The state returns in the same order, as donated buffers need. Gradients are arguments, not constants.
    step = jax.jit(lambda state, given: optimizer.stateless_apply(state[1], given, state[0]), donate_argnums=0)
    state = [weight.value for weight in weights], [variable.value for variable in optimizer.variables]

    def taken() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, gradients))

    return taken


def finished(run: Callable) -> Callable[[], None]:
    """Returns a function that calls `run` and waits for the GPU, if there is one."""
    import torch

    def taken() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return taken


def first_and_later(
    functions: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the seconds of each first call, and the milliseconds of `rounds` interleaved later calls."""
    firsts = {}
    for name, function in functions.items():
        firsts[name] = timing.elapsed(function)
        function()
    times = timing.interleaved(functions, rounds)
    return firsts, {name: [1e3 * seconds for seconds in taken] for name, taken in times.items()}


def measured(shape: tuple[int, ...], count: int, rounds: int) -> Table:
    functions = {name: update(make, shape, count) for name, make in VARIANTS.items()}
    elements = count * math.prod(shape)
    firsts, times = first_and_later({**functions, "stream": speed_test.addition(STREAMED).run}, rounds)
    median = timing.medians(times)
    bandwidth = 3 * 4 * STREAMED / median["stream"]  # bytes a millisecond
    floor = 8 * 4 * elements / bandwidth
    sizes = " x ".join(map(str, (count, *shape)))
    table = Table(title=f"Adam, {sizes}: floor {floor:.1f} ms at {bandwidth / 1e6:.0f} GB/s, {BACKEND}")
    for heading in ("update", "ms", "min - max", "x Keras's scaling", "x unscaled", "/ floor", "first step"):
        table.add_column(heading, justify="left" if heading == "update" else "right")
    for name in functions:
        ratios = (median[base] / median[name] for base in ("Keras LossScaleOptimizer", "Keras Adam, unscaled"))
        table.add_row(
            name,
            f"{median[name]:.2f}",
            f"{min(times[name]):.2f} - {max(times[name]):.2f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{median[name] / floor:.2f}",
            f"{firsts[name]:.2f} s",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", help="shape of each variable")
    parser.add_argument("--count", type=int, default=6, help="number of variables (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="calls of each (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = [((2048, 2048), 6), ((64, 64), 200)]
    if arguments.shape:
        sizes = [(tuple(arguments.shape), arguments.count)]
    for shape, count in sizes:
        Console(width=110).print(measured(shape, count, arguments.rounds))


if __name__ == "__main__":
    main()
