"""`gradient_fidelity`: the gradients of a model in half precision, compared with float32."""

from __future__ import annotations

from typing import Any

import keras

from tfmixed._islands import gradient_sums
from tfmixed._probe.fidelity_probe import FidelityProbe
from tfmixed.fidelity.gradient_fidelity import GradientFidelity


def gradient_fidelity(
    model: keras.Model, data: Any, steps: int = 1, *, scale: float | None = None, batch_size: int | None = None
) -> GradientFidelity:
    """Compares the gradient of each variable in half precision with that in float32.

    It runs the training step of `fit` on each batch three times, without the update: as the model trains; in float32;
    and in float32 with the weights, the inputs and outputs of each half-precision layer, and the gradients that flow
    through them rounded to the significand of half precision. The last run gives the error that rounding alone
    explains. A larger error has another cause: a sum in half precision, a value flushed to 0, an overflow.

    All runs have the same weights and random states, which are restored. Layers that draw random numbers, such as
    dropout, run in inference mode, since half precision would draw other numbers. A custom layer that draws random
    numbers whatever `training` is appears as wrong.

    The table also has the share of the optimizer's update that rounding the weights to half precision discards, as in
    `measure_gradients`, here for the gradients in half precision.

    Args:
        model: A compiled model with layers that compute in half precision.
        data: Data as `measure_gradients` accepts it.
        steps: The largest number of batches. Defaults to 1.
        scale: The loss scale. Defaults to None, the one that the optimizer would use now; 1 without a scale.
        batch_size: Batch size for arrays. Defaults to None, which stands for 32 as in `fit`. Errors of sums grow with
            the batch: pass the size that is used in training.

    Returns:
        The errors, the worst first.

    Raises:
        ValueError: If the model is not compiled or has no half-precision layer, if there is no data, or if an argument
            is out of range.
        NotImplementedError: If the model holds a `GradScaler`.

    Example:
    >>> layer = keras.layers.Dense(1, dtype="mixed_bfloat16", name="dense")
    >>> model = keras.Sequential([keras.Input((4,)), layer])
    >>> model.compile("sgd", loss="mse")
    >>> fidelity = gradient_fidelity(model, (ops.ones((32, 4)), ops.zeros((32, 1))))
    >>> len(fidelity), len(fidelity.wrong)
    (2, 0)
    """
    probe = FidelityProbe(model, scale)
    probe.measure_batches(data, steps, batch_size)
    return GradientFidelity(probe.record(gradient_sums.is_on()))
