"""A small model that trains on one or several replicas, with planted overflows.

Used by the tests in this process and by the scripts of worker processes. `Trainer` is built once and reset between
runs, so that its functions are traced once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import keras
import numpy as np
import tensorflow as tf

from tfmixed import LossScaleOptimizer, scaling
from tfmixed.records import Record
from tfmixed.scaling import DynamicScale, ScalingRule

RULE = DynamicScale(initial_scale=2.0**10, growth_interval=5)
KINDS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
STEPS = {"first": [0], "middle": [6], "twenty": list(range(3, 23))}
PLACES = {"first": [0], "last": [-1], "all": None, "none": []}
TOTAL = 28
LOCAL_BATCH, FEATURES = 4, 3

Bad = dict[tuple[int, int], float]  # (step, replica) -> the value that one input takes


@functools.cache
def mirrored(count: int = 2) -> tf.distribute.MirroredStrategy:
    """Returns a strategy of CPUs without collectives, the default: those of two strategies in a process meet."""
    devices = [f"CPU:{index}" for index in range(count)]
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


def bad_values(steps: list[int], places: list[int] | None, kind: float, replicas: int) -> Bad:
    chosen = range(replicas) if places is None else [place % replicas for place in places]
    return {(step, replica): kind for step in steps for replica in chosen}


def data(replicas: int, bad: Bad, total: int = TOTAL, drop: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets of shape (steps, replicas, LOCAL_BATCH, ...), with `drop` without the bad steps."""
    x = np.random.default_rng(0).normal(size=(total, replicas, LOCAL_BATCH, FEATURES)).astype("float32")
    y = x.sum(axis=-1, keepdims=True)
    for (step, replica), value in bad.items():
        x[step, replica, 0, 0] = value
    kept = [step for step in range(total) if not drop or step not in {at for at, _ in bad}]
    return x[kept], y[kept]


@dataclass
class Outcome:
    """Result of a run. `state` has a copy of each variable for each local replica."""

    weights: list[list[np.ndarray]]
    state: list[list[np.ndarray]] = field(default_factory=list)
    scale: float = 1.0
    attempted: int = 0
    skipped: int = 0
    iterations: int = 0
    events: list[Record] = field(default_factory=list)

    def assert_sound(self) -> None:
        """Checks that all values are finite, and identical on all local replicas."""
        for copies in self.weights + self.state:
            assert all(np.isfinite(copy).all() for copy in copies)
            for copy in copies[1:]:
                np.testing.assert_array_equal(copies[0], copy)

    def assert_same_weights(self, other: Outcome, rtol: float = 0.0) -> None:
        for ours, theirs in zip(self.weights, other.weights, strict=True):
            np.testing.assert_allclose(ours[0], theirs[0], rtol=rtol)


def check(outcome: Outcome, steps: list[int]) -> None:
    """Checks that counters, scale and events follow the rule on the trace."""
    outcome.assert_sound()
    trace = "".join("F" if step in steps else "T" for step in range(TOTAL))
    scales = [RULE.start().scale, *scaling.simulate(RULE, trace)]
    changes = [(step, *scales[step : step + 2]) for step in range(TOTAL) if scales[step] != scales[step + 1]]
    assert (outcome.attempted, outcome.skipped, outcome.iterations) == (TOTAL, len(steps), TOTAL - len(steps))
    assert outcome.scale == scales[-1]
    assert [(event.step, event.old_scale, event.new_scale) for event in outcome.events] == changes
    assert {event.step for event in outcome.events if event.variable} == set(steps) & {step for step, *_ in changes}


class Trainer:
    """A dense network, its optimizer and a strategy, or None for no strategy."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy | None,
        inner: keras.optimizers.Optimizer | None = None,
        rule: ScalingRule | None = RULE,
        local_batches: int = 1,
        **compile_arguments: object,
    ) -> None:
        self.strategy = strategy
        self.replicas = local_batches if strategy is None else strategy.num_replicas_in_sync
        keras.utils.set_random_seed(1)
        with (strategy or tf.distribute.get_strategy()).scope():
            self.model = keras.Sequential(
                [keras.Input((FEATURES,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)]
            )
            inner = inner() if inner else keras.optimizers.Adam(0.01)
            self.optimizer = LossScaleOptimizer(inner, rule) if rule else inner
            self.optimizer.build(self.model.trainable_variables)
            self.model.compile(self.optimizer, loss="mse", **compile_arguments)
        self.variables = [*self.model.variables, *self.optimizer.variables]
        self.start = [variable.numpy() for variable in self.variables]
        self.step = tf.function(self._step)

    def reset(self) -> None:
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)

    def fit(self, bad: Bad, drop: bool = False, **arguments: object) -> Outcome:
        """Trains with `Model.fit`. A global batch consists of the batches of all replicas in their order."""
        self.reset()
        arrays = tuple(array.reshape(-1, array.shape[-1]) for array in data(self.replicas, bad, drop=drop))
        batches = tf.data.Dataset.from_tensor_slices(arrays).batch(self.replicas * LOCAL_BATCH)
        if self.strategy is not None:
            # TensorFlow sometimes crashes if an iterator that prefetches to its devices is dropped, and Keras drops
            # one at the start of `fit`.
            options = tf.distribute.InputOptions(experimental_fetch_to_device=False)
            batches = self.strategy.experimental_distribute_dataset(batches, options)
        self.model.fit(batches, shuffle=False, verbose=0, **arguments)
        return self.outcome()

    def loop(self, bad: Bad, drop: bool = False, workers: range | None = None) -> Outcome:
        """Trains in a loop with `strategy.run`. `workers` are the numbers of the local replicas, by default all."""
        self.reset()
        local = range(self.replicas) if workers is None else workers
        for x, y in zip(*data(self.replicas, bad, drop=drop), strict=True):
            self.step(self._distribute(x, local), self._distribute(y, local))
        return self.outcome()

    def _distribute(self, values: np.ndarray, local: range) -> object:
        if self.strategy is None or len(local) == 1:
            return tf.constant(values[local[0]])
        by_replica = [tf.constant(values[replica]) for replica in local]
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: by_replica[context.replica_id_in_sync_group]
        )

    def _step(self, x: object, y: object) -> None:
        run = self.strategy.run if self.strategy else lambda function, args: function(*args)
        run(self._replica_step, args=(x, y))

    def _replica_step(self, x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.model(x, training=True) - y) ** 2) / self.replicas
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.model.trainable_variables)
        self.optimizer.apply(gradients, self.model.trainable_variables)

    def outcome(self) -> Outcome:
        weights, optimizer = [self._copies(variable) for variable in self.model.trainable_variables], self.optimizer
        if not isinstance(optimizer, LossScaleOptimizer):
            return Outcome(weights)
        return Outcome(
            weights,
            # The norm of a skipped step is not finite.
            state=[self._copies(variable) for variable in optimizer.variables if variable.name != "gradient_norm"],
            scale=float(optimizer.loss_scale),
            attempted=int(optimizer.attempted_steps),
            skipped=int(optimizer.skipped_steps),
            iterations=int(optimizer.iterations.numpy()),
            events=optimizer.drain_events(),
        )

    def _copies(self, variable: keras.Variable) -> list[np.ndarray]:
        values = [variable.value] if self.strategy is None else self.strategy.experimental_local_results(variable.value)
        return [value.numpy() for value in values]
