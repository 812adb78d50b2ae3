"""Callback that measures gradients during training."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from tfmixed import ranges
from tfmixed._probe.train_step_probe import Precision, Probe, checked_precision
from tfmixed.callbacks.measuring import MeasuringCallback
from tfmixed.records import GradientRange, RangesRecord


class GradientRanges(MeasuringCallback):
    """Measures the gradients of the next batch every `every` steps, like `tfmixed.measure_gradients`.

    The measured batch is trained on afterwards as usual. Measuring takes the time of about three steps, five with a
    half `precision`, and a step of the optimizer on the CPU; other steps are not slowed down. The attribute
    `last` is the last snapshot, a `tfmixed.ranges.GradientRanges`, or None before the first one.

    Args:
        path: A file of JSON lines, one for each snapshot: preferably that of `LossScaleLogger`, so that `tfmixed
            report` finds everything in one log. Snapshots that a restored run repeats are replaced. If the file belongs
            to another run, a new one with a number is used, as by `LossScaleLogger`. Defaults to None, which
            writes no file.
        every: The number of attempted steps from one snapshot to the next; the first is that of the first step.
            Defaults to 1000.
        precision: The same as in `measure_gradients`. Defaults to `"float32"`.
        tensorboard: A TensorBoard log directory, in which the run `gradients` appears. It has a histogram of the log2
            magnitudes of each gradient, and these scalars over all gradients: the largest and smallest magnitude, the
            share that float16 flushes to 0 without a scale, and the largest scale without an overflow. Requires
            TensorFlow and the tensorboard package. Defaults to None.
        verbose: 1 prints a summary of each snapshot, and 0 prints nothing. Defaults to 0.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If `tensorboard` is set and the package is not installed.
        NotImplementedError: If `fit` runs on several workers, since all of them would have to stop.

    Example:
    >>> watch = GradientRanges("runs/mine/loss_scale.jsonl", every=500)
    >>> # model.fit(x, y, callbacks=[LossScaleLogger("runs/mine/loss_scale.jsonl"), watch])
    """

    kind = RangesRecord

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        every: int = 1000,
        precision: Precision = "float32",
        tensorboard: str | os.PathLike[str] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(path, every, verbose)
        self.precision = checked_precision(precision)
        self.tensorboard = checked_tensorboard(tensorboard)
        self.last: ranges.GradientRanges | None = None
        self._writer: Any = None

    def _new_probe(self) -> Probe:
        return Probe(self.model, self.precision)

    def _snapshot(self) -> tuple[RangesRecord, str]:
        record = self._probe.record(self._step, self._epoch)
        self.last = ranges.GradientRanges(record)
        if self.tensorboard is not None:
            self._write(self.last, self.tensorboard)
        return record, self.last.verdict()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, snapshot: ranges.GradientRanges, folder: str | os.PathLike[str]) -> None:
        import tensorflow
        from tensorboard.plugins.histogram import metadata  # type: ignore[import-untyped]  # ships no types

        if self._writer is None:
            # A separate folder, since TensorBoard follows only the newest file of a folder.
            self._writer = tensorflow.summary.create_file_writer(str(Path(folder) / "gradients"))
        kind = metadata.create_summary_metadata(display_name=None, description="log2 of nonzero magnitudes")
        with self._writer.as_default(snapshot.record.step):
            for gradient in snapshot:
                tensorflow.summary.write(
                    f"gradients/{gradient.kind}/{gradient.name}", _buckets(gradient), metadata=kind
                )
            for name, value in _scalars(snapshot).items():
                tensorflow.summary.scalar(f"gradients/{name}", value)
        self._writer.flush()


def checked_tensorboard(tensorboard: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """Returns the argument, after a check that TensorBoard is installed.

    Raises:
        ImportError: If the argument is not None and TensorBoard is not installed.
    """
    if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "`tensorboard` requires the package of that name: pip install 'tfmixed[tensorboard]'. "
            f"Received: tensorboard={os.fspath(tensorboard)!r}"
        )
    return tensorboard


def _buckets(gradient: GradientRange) -> Any:
    """Returns left edge, right edge and count of each octave, the format of TensorBoard histograms."""
    import numpy

    rows = [(octave, octave + 1, sum(parts)) for octave, parts in sorted(gradient.octaves.items())]
    return numpy.array(rows, "float64").reshape(-1, 3)


def _scalars(snapshot: ranges.GradientRanges) -> dict[str, float]:
    gradients = [gradient for gradient in snapshot.half if gradient.nonzeros]
    if not gradients:
        return {}
    return {
        "largest": max(gradient.largest for gradient in gradients),
        "smallest": min(gradient.smallest for gradient in gradients),
        "underflow_at_scale_1": snapshot.underflow(),
        "log2_of_largest_scale": math.log2(snapshot.best_scales()[1]),
    }
