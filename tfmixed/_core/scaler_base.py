"""Base of everything that scales a loss: counters, events, and checks of a run that mostly skips."""

from __future__ import annotations

from collections import Counter
from typing import Any

from keras import ops

from tfmixed._core import event_buffer, scalar_ops
from tfmixed._core.control_flow import in_graph
from tfmixed._core.scaler_state import ScalerState
from tfmixed._utils import user_warnings
from tfmixed.errors import ADVICE, LossScaleExhausted, _worst
from tfmixed.records import Change, ScaleChange
from tfmixed.scaling import ScalingRule

_FEW = 5  # a dynamic scale may skip a few steps at its start


class ScalerBase:
    """Properties and events of a loss scaler.

    A subclass defines `_state`, which creates the variables on first use.
    """

    rule: ScalingRule
    max_consecutive_skips: int | None
    _paths: list[str]
    _since: tuple[int, int] = (0, 0)  # attempted and skipped steps when the run began

    def _state(self) -> ScalerState:
        raise NotImplementedError

    def _overflow_counts(self) -> dict[str, int]:
        """Returns the number of overflows in the present row of skipped steps for each variable by path."""
        counts = ops.convert_to_numpy(self._state().read("overflow_counts"))
        return dict(zip(self._paths, map(int, counts), strict=True))

    @property
    def loss_scale(self) -> Any:
        """The scale of the next step, a float32 scalar tensor."""
        return self._read("dynamic_scale")

    def _read(self, name: str) -> Any:
        # Reading an initial value creates no variables. A graph needs them, since they change later.
        if getattr(self, "_scaling", self) is None and not in_graph():
            value = ScalerState.initial(self.rule)[name]
            return ops.cast(value, "int" if value.dtype.kind == "i" else "float32")
        return scalar_ops.tensor(self._state().read(name))

    @property
    def attempted_steps(self) -> Any:
        """Number of steps so far, applied or skipped, an integer scalar tensor."""
        return self._read("attempted_steps")

    @property
    def skipped_steps(self) -> Any:
        """Number of steps skipped so far, an integer scalar tensor."""
        return self._read("skipped_steps")

    @property
    def consecutive_skips(self) -> Any:
        """Number of steps skipped since the last one that was applied, an integer scalar tensor."""
        return self._read("consecutive_skips")

    @property
    def gradient_norm(self) -> Any:
        """Global L2 norm of the last step's unscaled gradients before clipping, a float32 scalar tensor."""
        return self._read("gradient_norm")

    def measured(self) -> dict[str, Any]:
        """Returns loss scale, skipped steps and gradient norm by name."""
        return {name: self._read(variable) for name, variable in _MEASURED.items()}

    def drain_events(self) -> list[Change]:
        """Returns the changes of the scale since the last call, oldest first. Reads the device.

        Changes that a `LossScaleLogger` logs in the meantime are included. If more than `event_capacity` changes
        happened since the last call, the list starts with an `EventsLost` that counts those that were overwritten.
        """
        return self._drain()

    def _drain(self, reader: Any = None, starts: bool = False) -> list[Change]:
        state = self._state()
        return state.readers.drain(state, self._paths, reader, starts)

    def _buffered_events(self) -> list[Change]:
        """Returns all changes that the buffer still holds, drained or not. Reads the device."""
        return event_buffer.entries(event_buffer.read_buffer(self._state()), self._paths, since=0)

    def raise_if_exhausted(self, loss: float | None = None) -> None:
        """Raises an error if the last `max_consecutive_skips` steps were skipped and the scale is at its minimum.

        `LossScaleLogger` calls it whenever it collects events, and `fit` at its end. A custom loop may call it at any
        time. Reads the device. A scale above its minimum has ten times as many steps to get there.

        Args:
            loss: The last loss. An overflow and a loss that is NaN need different remedies. Defaults to None, for a
                loss that is not known.

        Raises:
            LossScaleExhausted: With the scale, the first step of the row, the three variables whose gradients
                overflowed most often, and advice.
        """
        limit, skips = self.max_consecutive_skips, int(self.consecutive_skips)
        if limit is None or skips < limit:
            return
        scale = float(self.loss_scale)
        if scale > self.rule.bounds[0] and skips < 10 * limit:
            return
        first = int(self.attempted_steps) - skips
        raise LossScaleExhausted(scale, first, skips, self._overflow_counts(), None if loss is None else float(loss))

    def _begin_run(self) -> None:
        """Notes where a run begins, for `_end_run`. Reads the device."""
        self._since = int(self.attempted_steps), int(self.skipped_steps)

    def _end_run(self) -> None:
        """Warns if most steps since the last `_begin_run` or `_end_run` were skipped. Reads the device."""
        since = self._since
        self._begin_run()
        if (message := self._skip_warning(*since)) is not None:
            user_warnings.warn(message)

    def _skip_warning(self, since: int, skipped: int) -> str | None:
        """Returns a warning if most steps of a run were skipped, and at least five. Reads the device.

        Args:
            since: First step of the run.
            skipped: Number of steps that were skipped before it.
        """
        steps, skips = int(self.attempted_steps) - since, int(self.skipped_steps) - skipped
        if skips < _FEW or 2 * skips <= steps or skips > steps:  # more only if another state was loaded meanwhile
            return None
        row, overflows = int(self.consecutive_skips), self._overflows_since(since)
        found, first = [change.step for change in overflows], since + steps - row
        named = _worst(self._overflow_counts())
        if not row and overflows:
            most_frequent, _ = Counter(change.variable for change in overflows).most_common(1)[0]
            named = f" Most frequent overflows: {most_frequent}."
        if not row and len(found) == skips:  # every overflow moved the scale, so the last row is known
            row = next((count for count in range(1, skips) if found[-count - 1] != found[-count] - 1), skips)
            first = found[-row]
        most = f", the last {row} of them in a row since step {first}" if 0 < row < steps else ""
        scale, is_constant = float(self.loss_scale), self.rule.bounds[0] == self.rule.bounds[1]
        if found == list(range(since, since + skips)) and skips < steps:
            advice = f"The scale was too high at first. Pass `initial_scale={scale:g}` or lower."
        else:
            advice = f"Try a constant scale below {scale:g}. {ADVICE}" if is_constant else ADVICE
        return (
            f"{skips} of the {steps} steps since step {since} had non-finite gradients and were skipped"
            f"{most}. The loss scale is {scale:g}.{named} {advice}"
        )

    def _overflows_since(self, step: int) -> list[ScaleChange]:
        changes = [change for change in self._buffered_events() if isinstance(change, ScaleChange)]
        return [change for change in changes if change.reason == "overflow" and change.step >= step]


_MEASURED = {"loss_scale": "dynamic_scale", "skipped_steps": "skipped_steps", "gradient_norm": "gradient_norm"}
