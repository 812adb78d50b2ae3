"""The hook that logs the loss scale of a session as `LossScaleLogger` logs that of `fit`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tensorflow as tf

from tfmixed._core import event_buffer
from tfmixed.callbacks import run_log
from tfmixed.compat.v1.graphs import Blaming
from tfmixed.compat.v1.optimizer import LossScaleOptimizer
from tfmixed.records import Change, Record, ScaleChange
from tfmixed.scaling import validation

V1 = tf.compat.v1


class Snapshot(Blaming):
    """What a scaler says of itself at one moment of a session.

    Args:
        optimizer: The scaler.
        values: Of the variables of its state, by name.
        paths: Of its variables.
    """

    def __init__(self, optimizer: LossScaleOptimizer, values: Mapping[str, Any], paths: Sequence[str]) -> None:
        self.rule, self.inner_optimizer = optimizer.rule, optimizer.inner_optimizer
        self.max_consecutive_skips = optimizer.max_consecutive_skips
        self._values, self._paths = values, list(paths)

    def _state(self) -> Any:
        return self

    def read(self, name: str) -> Any:
        """Returns the value of a variable of the state."""
        return self._values[name]

    def drain_events(self) -> list[Change]:
        """Returns the changes that were not drained yet; nothing is marked."""
        return event_buffer.entries(self._values, self._paths)


class LossScaleHook(tf.compat.v1.train.SessionRunHook):
    """Logs every change of the loss scale with its exact step, for `MonitoredTrainingSession` and others with hooks.

    The changes are written in the graph, in the step that makes them; this hook collects them, so that looking rarely
    costs nothing and loses nothing.

    Args:
        optimizer: What `enable_mixed_precision_graph_rewrite` returned.
        path: File of JSON lines, the same as that of `LossScaleLogger`: `records.read_log` reads it, and a run that
            goes on continues it; while another running training writes it, it is a new one with a number. None writes
            none.
        summary_dir: Where to write, for TensorBoard, `loss_scale` at each change, and it, `skipped_steps` and
            `gradient_norm` whenever the hook collects. None writes none.
        every: Collect each so many runs of the session, and at its end.
        verbose: 1 prints one line a change. 0 prints nothing.

    Raises:
        TypeError: `optimizer` is another one.
        ValueError: `every` or `verbose` is out of range.
        LossScaleExhausted: While training, where it collects; see `tfmixed.LossScaleOptimizer.raise_if_exhausted`.

    Example:
    >>> optimizer = LossScaleOptimizer(tf.compat.v1.train.AdamOptimizer())
    >>> hook = LossScaleHook(optimizer, "runs/mine/loss_scale.jsonl")
    >>> # tf.compat.v1.train.MonitoredTrainingSession(hooks=[hook])
    """

    def __init__(
        self,
        optimizer: Any,
        path: str | os.PathLike[str] | None = None,
        summary_dir: str | os.PathLike[str] | None = None,
        every: int = 100,
        verbose: int = 1,
    ) -> None:
        if not isinstance(optimizer, LossScaleOptimizer):
            raise TypeError(f"optimizer must be a tfmixed.compat.v1.LossScaleOptimizer, received {optimizer!r}")
        self._optimizer = optimizer
        self.path = None if path is None else Path(path)
        self.summary_dir = None if summary_dir is None else os.fspath(summary_dir)
        self.every = validation.count("every", every, 1)
        self.verbose = validation.count("verbose", verbose, 0)
        self._drained = 0
        self._writer: Any = None

    def begin(self) -> None:
        """Adds to the graph what reads the state; hooks may do so here only."""
        state = self._optimizer._state()
        self._paths = state.paths
        self._values = {name: state.read(name) for name in state.variables}
        drained = state.variables["events_drained"].value
        self._count = V1.placeholder(drained.dtype, [], name="tfmixed/drained")
        self._mark = drained.assign(self._count, read_value=False)
        if self.summary_dir is not None:
            self._writer = V1.summary.FileWriterCache.get(self.summary_dir)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Begins the log, or goes on with it where the session stands."""
        del coord
        self._runs = 0
        values = session.run(self._values)
        now = Snapshot(self._optimizer, values, self._paths)
        changes = now.drain_events()
        if self.path is not None:
            step, kinds = int(now.attempted_steps), get_args(Record)
            self.path, changes = run_log.begin(self.path, step, kinds, changes, now, loop=self._optimizer)
        self._tell(changes)
        run_log.append(self.path, [run_log.describe(None, now)])
        # Nothing is marked before all hooks have looked.
        self._drained = int(values["event_count"])

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Collects, each `every` runs."""
        del run_values
        self._runs += 1
        if self._runs % self.every == 0:
            self._collect(run_context.session)

    def end(self, session: Any) -> None:
        """Collects what is left, and writes how the run ended."""
        now = self._collect(session)
        last = int(now.attempted_steps) - 1
        run_log.append(self.path, [run_log.progress(last, None, run_log.numbers(now), {})])
        run_log.release(self.path)
        if self._writer is not None:
            self._writer.flush()

    def _collect(self, session: Any) -> Snapshot:
        values = session.run(self._values)
        # From where this hook has told: another one may have marked more as drained.
        now = Snapshot(self._optimizer, {**values, "events_drained": self._drained}, self._paths)
        self._tell(now.drain_events())
        self._drained = int(values["event_count"])
        session.run(self._mark, {self._count: self._drained})
        self._summarize(run_log.numbers(now), int(now.attempted_steps))
        now.raise_if_exhausted()
        return now

    def _tell(self, changes: Sequence[Change]) -> None:
        run_log.append(self.path, changes)
        for change in changes:
            if self.verbose:
                print(change)
            if isinstance(change, ScaleChange):
                self._summarize({"loss_scale": change.new_scale}, change.step)

    def _summarize(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            return
        values = [V1.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._writer.add_summary(V1.Summary(value=values), step)
