"""Random overflows against random rules: tfmixed's LossScaleOptimizer, and Keras's own on the same gradients.

    python tests/helpers/fuzz_overflows.py --runs 2000 [--first-seed 0]

A case is a rule, an inner optimizer, 1, 2 or 4 replicas (MirroredStrategy on logical CPUs) and gradients of three
variables over 20 to 220 steps. At random steps, and in a quarter of the cases in 20 or 160 steps in a row, random
entries of random variables on random replicas are NaN or infinite. It prints how many runs had non-finite weights,
different replicas or a scale out of bounds, and for tfmixed also with a log that is not the history of the scale.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from rich import box
from rich.console import Console
from rich.table import Table

import tfmixed
from tfmixed import ConstantScale, DynamicScale, LogMaxScale, scaling

SHAPES = ((3,), (2, 2), (1,))
NAMES = ("a", "b", "c")
INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "clipped": lambda: keras.optimizers.SGD(0.01, global_clipnorm=1.0),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "ema": lambda: keras.optimizers.RMSprop(0.01, use_ema=True),
}


@dataclass(frozen=True)
class Case:
    """One run: `gradients[variable]` has shape (steps, replicas, ...), unscaled, float32."""

    rule: scaling.ScalingRule
    inner: str
    replicas: int
    gradients: tuple[np.ndarray, ...]


def case(seed: int) -> Case:
    random = np.random.default_rng(seed)
    replicas, row = int(random.choice([1, 1, 2, 2, 4])), int(random.choice([0] * 9 + [20, 20, 160]))
    steps = row + int(random.integers(20, 61))
    magnitude = 10.0 ** random.uniform(-3, 2)
    gradients = [random.normal(0, magnitude, (steps, replicas, *shape)).astype("float32") for shape in SHAPES]
    rate = random.uniform(0, 0.6)
    bad_steps = set(np.flatnonzero(random.random(steps) < rate)) | set(range(row))
    for step in bad_steps:
        for _ in range(random.integers(1, 4)):
            values = gradients[random.integers(3)][step, random.integers(replicas)]
            values.flat[random.integers(values.size)] = random.choice([np.nan, np.inf, -np.inf])
    return Case(_rule(random), str(random.choice(list(INNER))), replicas, tuple(gradients))


def _rule(random: np.random.Generator) -> scaling.ScalingRule:
    kind, initial = random.integers(10), 2.0 ** random.integers(-4, 20)
    if kind == 0:
        return ConstantScale(initial)
    if kind == 1:
        return LogMaxScale(initial_scale=max(initial, 1.0), beta1=random.uniform(0, 0.99), max_scale=2.0**24)
    low, high = (None, None) if random.random() < 0.3 else (initial / 2.0**4, initial * 2.0**6)
    return DynamicScale(
        initial_scale=initial,
        growth_factor=float(random.choice([2.0, 4.0, 1.5, 2.0**10])),
        backoff_factor=float(random.choice([0.5, 0.25, 0.7, 2.0**-10])),
        growth_interval=int(random.integers(1, 8)),
        hysteresis=int(random.integers(1, 4)),
        refill=str(random.choice(["growth", "finite"])),
        min_scale=low,
        max_scale=high,
    )


def optimizer_of(case: Case, ours: bool) -> keras.optimizers.Optimizer:
    inner = INNER[case.inner]()
    if ours:
        return tfmixed.LossScaleOptimizer(inner, case.rule)
    interval = getattr(case.rule, "growth_interval", 2000)
    return keras.optimizers.LossScaleOptimizer(inner, float(case.rule.start().scale), interval)


@dataclass
class Run:
    """Result of a run: an array for each variable and replica, and the scale before the first and after each step."""

    weights: list[list[np.ndarray]]
    scales: list[float]
    optimizer: keras.optimizers.Optimizer

    def bad(self, case: Case) -> np.ndarray:
        """Returns whether a value of the scaled gradient is not finite on any replica, of shape (steps, variables).

        A rule without a maximum can scale finite gradients beyond float32 too.
        """
        scales = np.array(self.scales[:-1], "float32")
        with np.errstate(over="ignore", invalid="ignore"):
            flat = [values.reshape(len(scales), -1) * scales[:, None] for values in case.gradients]
        return np.stack([~np.isfinite(values).all(axis=1) for values in flat], axis=1)


def run(case: Case, ours: bool) -> Run:
    devices = [f"CPU:{index}" for index in range(case.replicas)]
    strategy = (
        tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())
        if case.replicas > 1
        else tf.distribute.get_strategy()
    )
    with strategy.scope():
        weights = [keras.Variable(np.ones(shape), name=name) for name, shape in zip(NAMES, SHAPES, strict=True)]
        optimizer = optimizer_of(case, ours)
        optimizer.build(weights)

    @tf.function
    def step(gradients: list[tf.Tensor]) -> None:
        def replica_step() -> None:
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([optimizer.scale_loss(values[number]) for values in gradients], weights)

        strategy.run(replica_step)

    scales = [float(optimizer.dynamic_scale.numpy())]
    for index in range(len(case.gradients[0])):
        step([tf.constant(values[index]) for values in case.gradients])
        scales.append(float(optimizer.dynamic_scale.numpy()))
    copies = [[copy.numpy() for copy in strategy.experimental_local_results(weight.value)] for weight in weights]
    return Run(copies, scales, optimizer)


def faults(case: Case, run: Run) -> set[str]:
    """Returns the faults of a run, of tfmixed or Keras."""
    found = set()
    copies = list(itertools.chain.from_iterable(run.weights))
    if not all(np.isfinite(copy).all() for copy in copies):
        found.add("non-finite weights")
    if not all(np.array_equal(first, copy, equal_nan=True) for first, *rest in run.weights for copy in rest):
        found.add("replicas differ")
    if not all(0 < scale < math.inf for scale in run.scales):
        found.add("scale 0, inf or NaN")
    # Below that, the scaled gradients of a rule without a minimum are 0 in float32.
    if case.inner == "sgd" and min(run.scales) > 2.0**-90 and not _is_plain_descent(case, run):
        found.add("weights are not those of the finite steps")
    return found


def _is_plain_descent(case: Case, run: Run) -> bool:
    kept = ~run.bad(case).any(axis=1)
    for copies, gradients in zip(run.weights, case.gradients, strict=True):
        descended = 1 - 0.01 * gradients[kept].sum(axis=(0, 1), dtype="float64")
        size = np.abs(gradients[kept]).max(initial=1.0)
        if not np.allclose(copies[0], descended, rtol=1e-4, atol=1e-4 * size):
            return False
    return True


def own_faults(case: Case, run: Run) -> set[str]:
    """Returns further faults of a run of tfmixed: bounds, rule, counters, log."""
    optimizer, found = run.optimizer, set()
    low, high = case.rule.bounds
    if not all(low <= scale <= high for scale in run.scales):
        found.add("scale out of the rule's bounds")
    bad = run.bad(case)
    trace = [not any(step) for step in bad]
    sizes = [max(np.abs(values[step]).max() for values in case.gradients) for step in range(len(trace))]
    wanted = scaling.simulate(case.rule, trace, sizes)
    if not np.allclose(run.scales[1:], wanted, rtol=1e-3 if case.rule.needs_amax else 1e-6, atol=0):
        found.add("scale is not the rule's")
    if (int(optimizer.attempted_steps), int(optimizer.skipped_steps)) != (len(trace), trace.count(False)):
        found.add("counters are not the trace's")
    overflows = [NAMES[int(np.argmax(step))] if any(step) else None for step in bad]
    history = [
        (step, old, new, overflows[step])
        for step, (old, new) in enumerate(itertools.pairwise(run.scales))
        if old != new
    ]
    log = [(event.step, event.old_scale, event.new_scale, event.variable) for event in optimizer.drain_events()]
    if log != history:
        found.add("log is not the variable's history")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    counts, seeds = Counter(), range(arguments.first_seed, arguments.first_seed + arguments.runs)
    with contextlib.suppress(KeyboardInterrupt):
        count(seeds, counts)
    done = sum(counts[True, replicas, "runs"] for replicas in (1, 2, 4))
    print(f"{done} runs from seed {seeds.start}; Keras {keras.__version__}")
    table = Table("replicas", "fault", "tfmixed", "Keras", box=box.SIMPLE_HEAD)
    for replicas, fault in sorted({key[1:] for key in counts}):
        table.add_row(str(replicas), fault, *(str(counts[ours, replicas, fault]) for ours in (True, False)))
    Console().print(table)


def count(seeds: range, counts: Counter[tuple[bool, int, str]]) -> None:
    """Counts runs and faults by (ours, replicas, fault)."""
    for seed in seeds:
        chosen = case(seed)
        for ours in (True, False):
            outcome = run(chosen, ours)
            found = faults(chosen, outcome) | (own_faults(chosen, outcome) if ours else set())
            counts.update((ours, chosen.replicas, fault) for fault in [*found, "runs", *["any fault"] * bool(found)])
            if ours and found:
                parts = ", ".join(sorted(found)), chosen.rule, chosen.inner, f"{chosen.replicas} replicas"
                print(f"seed {seed}:", *parts, sep=" ")
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
