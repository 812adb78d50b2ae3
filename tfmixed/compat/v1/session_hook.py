"""Session hook that logs the loss scale, as `LossScaleLogger` does for `fit`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tensorflow as tf

from tfmixed._core import event_buffer
from tfmixed.callbacks import run_log
from tfmixed.compat.v1.graph_state import GraphScaler
from tfmixed.compat.v1.optimizer import LossScaleOptimizer
from tfmixed.records import Change, Record, ScaleChange, log_file
from tfmixed.scaling import validation

V1 = tf.compat.v1


class Snapshot(GraphScaler):
    """The values that a session holds for the state of an optimizer, with the properties of the optimizer.

    Args:
        optimizer: The optimizer.
        values: The values of its state variables, by name.
        paths: The paths of the trainable variables.
    """

    def __init__(self, optimizer: LossScaleOptimizer, values: Mapping[str, Any], paths: Sequence[str]) -> None:
        self.rule, self.inner_optimizer = optimizer.rule, optimizer.inner_optimizer
        self.max_consecutive_skips = optimizer.max_consecutive_skips
        self._values, self._paths = values, list(paths)

    def _state(self) -> Any:
        return self

    def read(self, name: str) -> Any:
        """Returns the value of a state variable."""
        return self._values[name]

    def drain_events(self) -> list[Change]:
        """Returns the changes that are not marked as drained, and does not mark them."""
        return event_buffer.entries(self._values, self._paths)


class LossScaleHook(tf.compat.v1.train.SessionRunHook):
    """Logs every change of the loss scale with its exact step, in a `MonitoredTrainingSession` or any other with hooks.

    The training step itself records each change in the graph. The hook collects them, so a long interval loses nothing.

    Args:
        optimizer: The optimizer that `enable_mixed_precision_graph_rewrite` returned.
        path: A file of JSON lines in the format of `LossScaleLogger`, for `records.read_log`. A resumed run continues
            the file. If another running training writes it, the hook adds a number to the name. None writes no file.
            Defaults to None.
        summary_dir: A directory of summaries for TensorBoard: `loss_scale` at each change, and `loss_scale`,
            `skipped_steps` and `gradient_norm` at each collection. None writes none. Defaults to None.
        every: The number of session runs between collections. The hook also collects at the end. Defaults to 100.
        verbose: 1 prints a line for each change, and 0 prints nothing. Defaults to 1.

    Raises:
        TypeError: If `optimizer` is not a `tfmixed.compat.v1.LossScaleOptimizer`.
        ValueError: If `every` or `verbose` is out of range.
        LossScaleExhausted: During training, at a collection. See `tfmixed.LossScaleOptimizer.raise_if_exhausted`.

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
            raise TypeError(
                f"`optimizer` must be a tfmixed.compat.v1.LossScaleOptimizer. Received: optimizer={optimizer!r}."
            )
        self._optimizer = optimizer
        self.path = None if path is None else Path(path)
        self.summary_dir = None if summary_dir is None else os.fspath(summary_dir)
        self.every = validation.count("every", every, 1)
        self.verbose = validation.count("verbose", verbose, 0)
        self._drained = 0
        self._writer: Any = None

    def begin(self) -> None:
        """Adds the operations that read the state; later the graph is final."""
        state = self._optimizer._state()
        self._paths = state.paths
        self._values = {name: state.read(name) for name in state.variables}
        drained = state.variables["events_drained"].value
        self._count = V1.placeholder(drained.dtype, [], name="tfmixed/drained")
        self._mark = drained.assign(self._count, read_value=False)
        if self.summary_dir is not None:
            self._writer = V1.summary.FileWriterCache.get(self.summary_dir)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Starts the log, or continues it at the step of the session."""
        del coord
        self._runs = 0
        values = session.run(self._values)
        now = Snapshot(self._optimizer, values, self._paths)
        changes = now.drain_events()
        if self.path is not None:
            step, kinds = int(now.attempted_steps), get_args(Record)
            self.path, changes = run_log.begin(self.path, step, kinds, changes, now, loop=self._optimizer)
        self._log(changes)
        log_file.append(self.path, [run_log.describe(None, now)])
        # Not marked as drained, so that other hooks that start now log the same changes.
        self._drained = int(values["event_count"])

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Collects the changes after every `every` runs."""
        del run_values
        self._runs += 1
        if self._runs % self.every == 0:
            self._collect(run_context.session)

    def end(self, session: Any) -> None:
        """Collects the last changes, and logs the end of the run."""
        now = self._collect(session)
        last = int(now.attempted_steps) - 1
        log_file.append(self.path, [run_log.progress(last, None, run_log.measurements(now), {})])
        log_file.release(self.path)
        if self._writer is not None:
            self._writer.flush()

    def _collect(self, session: Any) -> Snapshot:
        values = session.run(self._values)
        # Another hook may have marked changes as drained that this one has not logged.
        now = Snapshot(self._optimizer, {**values, "events_drained": self._drained}, self._paths)
        self._log(now.drain_events())
        self._drained = int(values["event_count"])
        session.run(self._mark, {self._count: self._drained})
        self._summarize(run_log.measurements(now), int(now.attempted_steps))
        now.raise_if_exhausted()
        return now

    def _log(self, changes: Sequence[Change]) -> None:
        log_file.append(self.path, changes)
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
