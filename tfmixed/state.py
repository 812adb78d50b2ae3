"""What a loss scaler remembers: the rule's state, its counters and the ring of events, in Keras variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy
from keras import ops

from tfmixed import events
from tfmixed.branching import rarely
from tfmixed.gradients import Verdict
from tfmixed.scaling import ScalingRule, checks

# The names that Keras's own LossScaleOptimizer gives to what both have.
_KERAS_NAMES = {"scale": "dynamic_scale", "good_steps": "step_counter"}


class ScalingState:
    """The variables of one scaler and the step that advances them.

    Nothing here branches on a tensor, and a step only selects and assigns: it may run eagerly, in a `tf.function`,
    under XLA or in a `keras.StatelessScope`.

    Args:
        rule: How the scale moves.
        capacity: Entries of the ring.
        add_variable: Makes a variable, with the arguments of `keras.optimizers.Optimizer.add_variable`.
    """

    def __init__(self, rule: ScalingRule, capacity: int, add_variable: Callable[..., keras.Variable]) -> None:
        self.rule = rule
        start = rule.start()
        self._names = [_KERAS_NAMES.get(field, field) for field in start._fields]
        values = {
            **dict(zip(self._names, start, strict=True)),
            **dict.fromkeys(("attempted_steps", "skipped_steps", "consecutive_skips"), numpy.int32(0)),
            "gradient_norm": numpy.float32(0),
            **events.start(capacity),
        }
        with _outside_of_graphs():
            self.variables = {name: _variable(add_variable, name, value) for name, value in values.items()}

    def watch(self, count: int, add_variable: Callable[..., keras.Variable]) -> None:
        """Adds the counts of overflows of each of `count` variables, in the present row of skipped steps."""
        with _outside_of_graphs():
            name = "overflow_counts"
            self.variables[name] = _variable(add_variable, name, numpy.zeros(count, "int32"))

    def read(self, name: str) -> Any:
        """Returns the present value of a variable, as a tensor of its own."""
        value = self.variables[name].value
        return _tensor(value) if hasattr(value, "assign") else ops.copy(value)

    def advance(self, verdict: Verdict) -> None:
        """Moves everything on by one attempted step."""
        finite = verdict.finite
        old = type(self.rule.start())(*(self.read(name) for name in self._names))
        new = self.rule.next(old, finite, verdict.amax, xp=ops)
        attempted, consecutive = self.read("attempted_steps"), self.read("consecutive_skips")
        bad = ops.logical_not(finite)
        eventful = ops.logical_or(ops.logical_or(bad, consecutive > 0), ops.not_equal(new.scale, old.scale))
        rarely(eventful, lambda: self._note(verdict, attempted, old.scale, new.scale))
        skipped = ops.cast(bad if self.rule.skip_nonfinite else False, attempted.dtype)
        # One, made of the verdict: where a dataset ends within a step, what does not hang on its data is still carried
        # out.
        one = ops.cast(ops.logical_or(finite, bad), attempted.dtype)
        values = {
            **dict(zip(self._names, new, strict=True)),
            "attempted_steps": attempted + one,
            "skipped_steps": self.read("skipped_steps") + skipped,
            "consecutive_skips": (consecutive + 1) * skipped,
            "gradient_norm": verdict.norm,
        }
        for name, value in values.items():
            self.variables[name].assign(value)

    def _note(self, verdict: Verdict, step: Any, old: Any, new: Any) -> None:
        """Writes what only a skipped step, the one after it and a new scale change. Selects: may run in any step."""
        finite, counts = verdict.finite, self.read("overflow_counts")
        reason = ops.where(finite, ops.where(new > old, events.GROWTH, events.SET), events.OVERFLOW)
        culprit = ops.where(finite, events.NO_VARIABLE, ops.argmax(ops.cast(verdict.bad, "int32")))
        events.log(self.variables, step, old, new, reason, culprit)
        counts = ops.where(finite, 0, counts + ops.cast(verdict.bad, counts.dtype))
        self.variables["overflow_counts"].assign(counts)

    def set_scale(self, value: float) -> None:
        """Sets the scale by hand, and logs it.

        Raises:
            ValueError: The rule's bounds do not hold `value`.
        """
        low, high = self.rule.bounds
        old, new = self.read("dynamic_scale"), checks.number("loss_scale", value, least=low, most=high)
        step = self.read("attempted_steps")
        events.log(self.variables, step, old, ops.cast(new, "float32"), events.SET, events.NO_VARIABLE)
        self.variables["dynamic_scale"].assign(new)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over the values that it finds under the names of its variables.

        A scale that the rule's bounds do not hold (Keras's own can be 0 or inf) becomes the nearest that they do, NaN
        the initial one. What has another shape starts afresh: events of a ring of another capacity are lost.
        """
        fitting = {name: saved[name] for name in self.variables.keys() & saved.keys() if self._fits(name, saved[name])}
        if not events.start(1).keys() <= fitting.keys():
            fitting = {name: value for name, value in fitting.items() if name not in events.start(1)}
        for name, value in fitting.items():
            self.variables[name].assign(value)
        scale = self.variables["dynamic_scale"]
        known = numpy.nan_to_num(scale.numpy(), nan=self.rule.start().scale)
        scale.assign(numpy.clip(known, *self.rule.bounds))

    def _fits(self, name: str, value: Any) -> bool:
        return tuple(value.shape) == tuple(self.variables[name].shape)


def _variable(add_variable: Callable[..., keras.Variable], name: str, value: Any) -> keras.Variable:
    # "int" as in Keras: int64 on TensorFlow, which would keep int32 variables off the GPU.
    dtype = "int" if value.dtype.kind == "i" else "float32"
    return add_variable(
        shape=value.shape, dtype=dtype, initializer=lambda _shape, dtype: ops.cast(value, dtype), name=name
    )


def _outside_of_graphs() -> contextlib.AbstractContextManager[Any]:
    # A variable made while a tf.function is traced would belong to that trace alone.
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow

    return tensorflow.init_scope()  # type: ignore[no-any-return]  # tensorflow ships no types


def _tensor(variable: Any) -> Any:
    """Returns the value of a `tf.Variable`: no copy, and yet a later write leaves it alone."""
    import tensorflow

    if hasattr(variable, "values") or not tensorflow.executing_eagerly():
        return variable.value()
    # What the variable's own method ends in, without three quarters of the time: the logger reads in each step.
    return tensorflow.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
