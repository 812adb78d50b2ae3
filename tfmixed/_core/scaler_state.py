"""State of a loss scaler in Keras variables: the rule's state, counters and the event buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from tfmixed._core import event_buffer
from tfmixed._core import scalar_ops as ops
from tfmixed._core.control_flow import in_graph, skip_unless
from tfmixed._core.finite_check import CheckResult
from tfmixed._core.variables import AddVariable, Variables
from tfmixed.scaling import ScalingRule, validation

# Names that Keras's own LossScaleOptimizer gives to the variables that both have.
_KERAS_NAMES = {"scale": "dynamic_scale", "good_steps": "step_counter"}


class ScalerState(Variables):
    """Variables of one scaler, which `advance` moves on by one step.

    Nothing here branches on a tensor. A step only selects and assigns, so it can run eagerly, in a `tf.function`, under
    XLA or in a `keras.StatelessScope`.

    Args:
        rule: Scaling rule.
        capacity: Number of entries of the event buffer.
        add_variable: Function that creates a variable.
        is_packed: Whether names other than Keras's may share variables. Defaults to False.
    """

    def __init__(self, rule: ScalingRule, capacity: int, add_variable: AddVariable, is_packed: bool = False) -> None:
        self.rule = rule
        self.readers = event_buffer.Readers()
        self._names = [self.name_of(field) for field in rule.start()._fields]
        values = {**self.initial(rule), **event_buffer.initial_values(capacity)}
        super().__init__(values, add_variable, _KERAS_NAMES.values() if is_packed else None)

    @classmethod
    def initial(cls, rule: ScalingRule) -> dict[str, Any]:
        """Returns the initial values of the rule's state and of the counters by variable name, as NumPy scalars."""
        return {
            **{cls.name_of(field): value for field, value in rule.start()._asdict().items()},
            **dict.fromkeys(("attempted_steps", "skipped_steps", "consecutive_skips"), numpy.int32(0)),
            "gradient_norm": numpy.float32(0),
        }

    @staticmethod
    def name_of(field: str) -> str:
        """Returns the name of the variable that holds a field of the rule's state."""
        return _KERAS_NAMES.get(field, field)

    def add_overflow_counts(self, count: int, add_variable: AddVariable) -> None:
        """Adds a counter for each of `count` variables: its overflows in the present row of skipped steps."""
        self.create({"overflow_counts": numpy.zeros(count, "int32")}, add_variable)

    @ops.quiet
    def advance(self, result: CheckResult, moves: bool = True) -> None:
        """Moves the state on by one attempted step.

        Args:
            result: Result of the step's finite check.
            moves: If False, the rule's own state stays. Defaults to True.
        """
        finite = result.finite
        old = type(self.rule.start())(*(self.read(name) for name in self._names))
        new = self.rule.next(old, finite, result.amax, xp=ops) if moves else old
        attempted, consecutive = self.read("attempted_steps"), self.read("consecutive_skips")
        overflow = ops.logical_not(finite)
        is_eventful = ops.logical_or(ops.logical_or(overflow, consecutive > 0), ops.not_equal(new.scale, old.scale))
        skip_unless(is_eventful, lambda: self._write_event(result, attempted, old.scale, new.scale))
        skipped = ops.cast(overflow if self.rule.skip_nonfinite else False, attempted.dtype)
        self.assign(
            {
                **dict(zip(self._names, new, strict=True)),
                "attempted_steps": attempted + one_depending_on(finite, attempted.dtype),
                "skipped_steps": self.read("skipped_steps") + skipped,
                "consecutive_skips": (consecutive + 1) * skipped,
                "gradient_norm": result.norm,
            }
        )

    def _write_event(self, result: CheckResult, step: Any, old: Any, new: Any) -> None:
        """Writes what changes only in a skipped step, in the step after it, or with a new scale."""
        finite = result.finite
        reason = ops.where(finite, ops.where(new > old, event_buffer.GROWTH, event_buffer.SET), event_buffer.OVERFLOW)
        event_buffer.write(self, step, old, new, reason, result.first_overflow)
        if result.squares is not None:
            counts = self.read("overflow_counts")
            counts = ops.where(finite, ops.zeros_like(counts), counts + ops.cast(result.overflowed, counts.dtype))
            self.assign({"overflow_counts": counts})

    def set_scale(self, value: Any, name: str = "loss_scale") -> None:
        """Sets the scale, and logs the change.

        Args:
            value: Number or scalar tensor. In a graph a tensor becomes the nearest value within the rule's bounds, and
                NaN changes nothing.
            name: Name of the value in an error. Defaults to `"loss_scale"`.

        Raises:
            ValueError: If `value` is outside of the rule's bounds.
        """
        low, high = self.rule.bounds
        old, step = self.read("dynamic_scale"), self.read("attempted_steps")
        if ops.is_tensor(value) and in_graph():
            wanted = ops.cast(value, "float32")
            new = ops.where(ops.isnan(wanted), old, ops.clip(wanted, low, high))
        else:
            number = float(ops.convert_to_numpy(value)) if ops.is_tensor(value) else value
            new = ops.cast(validation.number(name, number, least=low, most=high), "float32")
        event_buffer.write(self, step, old, new, event_buffer.SET, event_buffer.NO_VARIABLE)
        self.assign({"dynamic_scale": new})

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restores the variables whose values `saved` holds by name, and moves the scale into the rule's bounds.

        A value of another shape is ignored: events of a buffer of another capacity are lost.
        """
        fitting = {name: value for name, value in saved.items() if tuple(value.shape) == self.shapes.get(name)}
        buffer = event_buffer.initial_values(1).keys()
        if not buffer <= fitting.keys():
            fitting = {name: value for name, value in fitting.items() if name not in buffer}
        self.assign(fitting)
        self.bound_scale()

    def bound_scale(self) -> None:
        """Moves a scale to the nearest value within the rule's bounds, and NaN to the initial scale."""
        scale = self.variables["dynamic_scale"]
        value = numpy.nan_to_num(scale.numpy(), nan=self.rule.start().scale)
        scale.assign(numpy.clip(value, *self.rule.bounds))


def one_depending_on(tensor: Any, dtype: Any) -> Any:
    """Returns 1, computed from a boolean scalar.

    Where a dataset ends within a step, TensorFlow still runs what does not depend on its data. A counter that depends
    on the finite check does not count that step.
    """
    return ops.cast(ops.logical_or(tensor, ops.logical_not(tensor)), dtype)
