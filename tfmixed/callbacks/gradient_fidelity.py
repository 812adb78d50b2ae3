"""Callback that compares gradients with float32 during training."""

from __future__ import annotations

import os

from tfmixed import fidelity
from tfmixed._islands import gradient_sums
from tfmixed._probe.fidelity_probe import FidelityProbe
from tfmixed.callbacks.measuring import MeasuringCallback
from tfmixed.records import FidelityRecord


class GradientFidelity(MeasuringCallback):
    """Compares the gradients of the next batch with float32 every `every` steps, like `tfmixed.gradient_fidelity`.

    The measured batch is trained on afterwards as usual. Measuring takes the time of about three steps, most of it in
    float32, and a step of the optimizer on the CPU; other steps are not slowed down. The attribute `last` is the last
    snapshot, a `tfmixed.fidelity.GradientFidelity`, or None before the first one.

    Args:
        path: A file of JSON lines, one for each snapshot, as for `GradientRanges`. Defaults to None, which writes no
            file.
        every: The number of attempted steps from one snapshot to the next; the first is that of the first step.
            Defaults to 1000.
        verbose: 1 prints a summary of each snapshot, and 0 prints nothing. Defaults to 0.

    Raises:
        ValueError: If an argument is out of range, or if no layer computes in half precision.
        NotImplementedError: If `fit` runs on several workers, since all of them would have to stop.

    Example:
    >>> watch = GradientFidelity("runs/mine/loss_scale.jsonl", every=500)
    >>> # model.fit(x, y, callbacks=[LossScaleLogger("runs/mine/loss_scale.jsonl"), watch])
    """

    kind = FidelityRecord

    def __init__(self, path: str | os.PathLike[str] | None = None, every: int = 1000, verbose: int = 0) -> None:
        super().__init__(path, every, verbose)
        self.last: fidelity.GradientFidelity | None = None

    def _new_probe(self) -> FidelityProbe:
        return FidelityProbe(self.model)

    def _snapshot(self) -> tuple[FidelityRecord, str]:
        record = self._probe.record(gradient_sums.is_on(), self._step, self._epoch)
        self.last = fidelity.GradientFidelity(record)
        return record, self.last.summary()
