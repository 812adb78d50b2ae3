"""What a loss scaler remembers: the rule's state, its counters and the ring of events, in Keras variables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy
from keras import ops

from tfmixed._core import event_buffer
from tfmixed._core.control_flow import in_graph, rarely
from tfmixed._core.finite_check import Verdict
from tfmixed._core.variables import AddVariable, Variables
from tfmixed._utils import user_warnings
from tfmixed.errors import ADVICE, LossScaleExhausted, _worst
from tfmixed.records import Change
from tfmixed.scaling import ScalingRule, validation

_FEW = 5  # a dynamic scale may skip a few steps at its start
# The names that Keras's own LossScaleOptimizer gives to what both have.
_KERAS_NAMES = {"scale": "dynamic_scale", "good_steps": "step_counter"}


class Outcome(NamedTuple):
    """What one step says of which several verdicts were given.

    Args:
        finite: Boolean scalar: was each of them good?
        culprit: Integer scalar, the index of the first variable whose gradient was not finite, or -1.
        norm: float32 scalar, the L2 norm of all their gradients together.
        amax: float32 scalar, the largest absolute value of them all.
    """

    finite: Any
    culprit: Any
    norm: Any
    amax: Any


class ScalingState(Variables):
    """The variables of one scaler and the step that advances them.

    Nothing here branches on a tensor, and a step only selects and assigns: it may run eagerly, in a `tf.function`,
    under XLA or in a `keras.StatelessScope`.

    Args:
        rule: How the scale moves.
        capacity: Entries of the ring.
        add_variable: As in `Variables`.
    """

    def __init__(self, rule: ScalingRule, capacity: int, add_variable: AddVariable) -> None:
        self.rule = rule
        self.readers = event_buffer.Readers()
        self._names = [self.name_of(field) for field in rule.start()._fields]
        super().__init__({**self.initial(rule), **event_buffer.start(capacity)}, add_variable)

    @classmethod
    def initial(cls, rule: ScalingRule) -> dict[str, Any]:
        """Returns the first values of the rule's state and of the counters by variable name, NumPy scalars."""
        return {
            **{cls.name_of(field): value for field, value in rule.start()._asdict().items()},
            **dict.fromkeys(("attempted_steps", "skipped_steps", "consecutive_skips"), numpy.int32(0)),
            "gradient_norm": numpy.float32(0),
        }

    @staticmethod
    def name_of(field: str) -> str:
        """Returns the name of the variable that holds a field of the rule's state."""
        return _KERAS_NAMES.get(field, field)

    def watch(self, count: int, add_variable: AddVariable) -> None:
        """Adds the counts of overflows of each of `count` variables, in the present row of skipped steps."""
        self.make({"overflow_counts": numpy.zeros(count, "int32")}, add_variable)

    def advance(self, verdict: Verdict | Outcome, moves: bool = True) -> None:
        """Moves everything on by one attempted step; the rule only where it `moves`."""
        finite = verdict.finite
        old = type(self.rule.start())(*(self.read(name) for name in self._names))
        new = self.rule.next(old, finite, verdict.amax, xp=ops) if moves else old
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
        self.assign(values)

    def _note(self, verdict: Verdict | Outcome, step: Any, old: Any, new: Any) -> None:
        """Writes what only a skipped step, the one after it and a new scale change. Selects: may run in any step."""
        finite = verdict.finite
        reason = ops.where(finite, ops.where(new > old, event_buffer.GROWTH, event_buffer.SET), event_buffer.OVERFLOW)
        event_buffer.log(self.variables, step, old, new, reason, verdict.culprit)
        if isinstance(verdict, Verdict):
            counts = self.read("overflow_counts")
            counts = ops.where(finite, 0, counts + ops.cast(verdict.bad, counts.dtype))
            self.variables["overflow_counts"].assign(counts)

    def set_scale(self, value: Any, name: str = "loss_scale") -> None:
        """Sets the scale by hand, and logs it.

        Args:
            value: A number; or a scalar tensor, which in a graph becomes the nearest value that the rule's bounds hold,
                NaN none.
            name: What the caller calls it.

        Raises:
            ValueError: The rule's bounds do not hold `value`.
        """
        low, high = self.rule.bounds
        old, step = self.read("dynamic_scale"), self.read("attempted_steps")
        if ops.is_tensor(value) and in_graph():
            wanted = ops.cast(value, "float32")
            new = ops.where(ops.isnan(wanted), old, ops.clip(wanted, low, high))
        else:
            number = float(ops.convert_to_numpy(value)) if ops.is_tensor(value) else value
            new = ops.cast(validation.number(name, number, least=low, most=high), "float32")
        event_buffer.log(self.variables, step, old, new, event_buffer.SET, event_buffer.NO_VARIABLE)
        self.variables["dynamic_scale"].assign(new)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over the values that it finds under the names of its variables.

        A scale that the rule's bounds do not hold (Keras's own can be 0 or inf) becomes the nearest that they do, NaN
        the initial one. What has another shape starts afresh: events of a ring of another capacity are lost.
        """
        fitting = {name: saved[name] for name in self.variables.keys() & saved.keys() if self._fits(name, saved[name])}
        if not event_buffer.start(1).keys() <= fitting.keys():
            fitting = {name: value for name, value in fitting.items() if name not in event_buffer.start(1)}
        self.assign(fitting)
        self.bound_scale()

    def bound_scale(self) -> None:
        """Moves a scale outside of the rule's bounds to the nearest that they hold, NaN to the initial scale."""
        scale = self.variables["dynamic_scale"]
        known = numpy.nan_to_num(scale.numpy(), nan=self.rule.start().scale)
        scale.assign(numpy.clip(known, *self.rule.bounds))

    def _fits(self, name: str, value: Any) -> bool:
        return tuple(value.shape) == tuple(self.variables[name].shape)


class Observable:
    """What everything that scales a loss tells about itself.

    A subclass has `_state`, which makes the variables on first use.
    """

    rule: ScalingRule
    max_consecutive_skips: int | None
    _paths: list[str]
    _since: tuple[int, int] = (0, 0)  # attempted and skipped steps when the run began

    def _state(self) -> ScalingState:
        raise NotImplementedError

    def _overflows(self) -> dict[str, int]:
        """Returns for each variable by path in how many steps of the present row of skips its gradient overflowed."""
        counts = self._state().read("overflow_counts")
        return dict(zip(self._paths, map(int, ops.convert_to_numpy(counts)), strict=True))

    @property
    def loss_scale(self) -> Any:
        """The scale of the next step, a float32 scalar tensor."""
        return self._scale()

    def _scale(self) -> Any:
        return self._read("dynamic_scale")

    def _read(self, name: str) -> Any:
        # No variables are made to read a first value. A graph needs them, since they change later.
        if getattr(self, "_scaling", self) is None and not in_graph():
            value = ScalingState.initial(self.rule)[name]
            return ops.cast(value, "int" if value.dtype.kind == "i" else "float32")
        return self._state().read(name)

    @property
    def attempted_steps(self) -> Any:
        """Steps so far, applied or skipped: an integer scalar tensor."""
        return self._read("attempted_steps")

    @property
    def skipped_steps(self) -> Any:
        """Steps skipped so far: an integer scalar tensor."""
        return self._read("skipped_steps")

    @property
    def consecutive_skips(self) -> Any:
        """Steps skipped since the last one that was applied: an integer scalar tensor."""
        return self._read("consecutive_skips")

    @property
    def gradient_norm(self) -> Any:
        """Global L2 norm of the last step's unscaled gradients, before clipping: a float32 scalar tensor."""
        return self._read("gradient_norm")

    def measured(self) -> dict[str, Any]:
        """Returns scale, skipped steps and gradient norm by name, for who watches: nobody scales a loss by these."""
        names = {"loss_scale": "dynamic_scale", "skipped_steps": "skipped_steps", "gradient_norm": "gradient_norm"}
        return {name: self._read(variable) for name, variable in names.items()}

    def drain_events(self) -> list[Change]:
        """Returns the changes of the scale since the last call, oldest first.

        Those that a `LossScaleLogger` logs meanwhile are among them. Reads the device. If more than `event_capacity`
        changes happened since, the list starts with an `EventsLost` that counts those that the ring no longer holds.
        """
        return self._drain()

    def _drain(self, reader: Any = None, starts: bool = False) -> list[Change]:
        state = self._state()
        return state.readers.drain(state.variables, self._paths, reader, starts)

    def _remembered(self) -> list[Change]:
        """Returns all changes that the ring still holds, told or not. Reads the device."""
        state = self._state()
        values = {name: ops.convert_to_numpy(state.read(name)) for name in event_buffer.start(1)}
        return event_buffer.entries(values, self._paths, since=0)

    def raise_if_exhausted(self, loss: float | None = None) -> None:
        """Raises if the last `max_consecutive_skips` steps were all skipped and the scale is at its floor.

        `LossScaleLogger` calls it whenever it collects, `fit` at its end, a custom loop whenever it likes. Reads the
        device. A scale that is not at its floor has ten times as many steps to get there.

        Args:
            loss: The last loss, if known: an overflow and a loss that is NaN call for different remedies.

        Raises:
            LossScaleExhausted: With the scale, the step since when, the three variables whose gradients were
                non-finite most often, and advice.
        """
        limit, skips = self.max_consecutive_skips, int(self.consecutive_skips)
        if limit is None or skips < limit:
            return
        scale = float(self.loss_scale)
        if scale > self.rule.bounds[0] and skips < 10 * limit:
            return
        first = int(self.attempted_steps) - skips
        raise LossScaleExhausted(scale, first, skips, self._overflows(), None if loss is None else float(loss))

    def _begin_run(self) -> None:
        """Notes where a run begins, for `_end_run`. Reads the device."""
        self._since = int(self.attempted_steps), int(self.skipped_steps)

    def _end_run(self) -> None:
        """Warns if most steps since the last `_begin_run` or `_end_run` were skipped. Reads the device."""
        since = self._since
        self._begin_run()
        if (message := self._describe_skips(*since)) is not None:
            user_warnings.warn(message)

    def _describe_skips(self, since: int, skipped: int) -> str | None:
        """Returns a warning if most steps of a run were skipped, at least five; None otherwise. Reads the device.

        Args:
            since: The first step of the run.
            skipped: The steps that were skipped before it.
        """
        steps, skips = int(self.attempted_steps) - since, int(self.skipped_steps) - skipped
        if skips < _FEW or 2 * skips <= steps or skips > steps:  # more only if another state was loaded meanwhile
            return None
        row, overflows = (
            int(self.consecutive_skips),
            event_buffer.overflows(self._state().variables, self._paths, since),
        )
        found, first = [each.step for each in overflows], since + steps - row
        named = _worst(self._overflows())
        if not row and overflows:
            named = f" Not finite most often: {Counter(each.variable for each in overflows).most_common(1)[0][0]}."
        if not row and len(found) == skips:  # each of them moved the scale: the last row is known
            row = next((n for n in range(1, skips) if found[-n - 1] != found[-n] - 1), skips)
            first = found[-row]
        most = f", the last {row} of them in a row since step {first}" if 0 < row < steps else ""
        scale, constant = float(self._scale()), self.rule.bounds[0] == self.rule.bounds[1]
        if found == list(range(since, since + skips)) and skips < steps:
            advice = f"The scale was too high at first. Pass `initial_scale={scale:g}` or lower."
        else:
            advice = f"Try a constant scale below {scale:g}. {ADVICE}" if constant else ADVICE
        return (
            f"{skips} of the {steps} steps since step {since} had gradients that are not finite and were skipped"
            f"{most}. The loss scale stands at {scale:g}.{named} {advice}"
        )
