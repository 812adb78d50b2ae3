"""`measure_gradients`: the gradient ranges of a model, measured on data without training it."""

from __future__ import annotations

from typing import Any

import keras

from tfmixed._probe.train_step_probe import Precision, Probe
from tfmixed.ranges.gradient_ranges import GradientRanges


def measure_gradients(
    model: keras.Model,
    data: Any,
    steps: int = 10,
    *,
    precision: Precision = "float32",
    scale: float = 1.0,
    batch_size: int | None = None,
) -> GradientRanges:
    """Measures the magnitudes of a model's gradients: of the output of each layer, and of each variable.

    It runs the training step of `fit`, including a custom `train_step`, without the update. A model that is not built
    is built as in `fit`. Variables are restored, and so are the random states of Keras, TensorFlow, PyTorch, NumPy and
    Python; attributes that a layer sets in Python are not. Only counts are kept. The method is that of
    Micikevicius et al., "Mixed Precision Training" (2017), figure 3.

    Gradients that are 0 in theory, such as that of a bias before a batch normalization, are rounding noise: the terms
    of a sum cancel. They are flagged and do not affect advice. To find them, the first batch runs once more in float32,
    with each gradient that flows back into a layer changed by 1/16. Most sums change by about as much. A sum that
    cancels to less than 2^-10 of its terms, which is the rounding error of float16, changes by 64 times its value.

    The table also has the share of the optimizer's update of each variable that rounding the weights to half precision
    discards; see `GradientRanges.update_loss`. With the first batch, the optimizer's step runs on float32 copies of
    weights and states, in the CPU's memory. If the optimizer has not trained yet, this is its first step, which in Adam
    is as large as the learning rate everywhere. A step that only accumulates gradients has no update.

    Args:
        model: A compiled model, under any dtype policy.
        data: Data as `fit` accepts it: `(x, y)` or `(x, y, sample_weight)` as a tuple, inputs alone, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a generator, or a PyTorch `DataLoader`.
        steps: The largest number of batches to measure. Defaults to 10.
        precision: `"float32"` measures the true magnitudes. `"float16"` and `"bfloat16"` measure those that half
            precision leaves: layers that compute in half precision use this dtype; in a model without such layers, all
            do. Defaults to `"float32"`.
        scale: The loss scale. Gradients are divided by it in float32 before they are counted. Defaults to 1.
        batch_size: Batch size for arrays. Defaults to None, which stands for 32 as in `fit`.

    Returns:
        The gradient ranges.

    Raises:
        ValueError: If the model is not compiled, there is no data, or an argument is out of range.
        NotImplementedError: If the model holds a `GradScaler`.

    Example:
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="dense")])
    >>> model.compile("sgd", loss="mse")
    >>> ranges = measure_gradients(model, (ops.ones((64, 4)), ops.zeros((64, 1))), steps=2)
    >>> [(gradient.layer, gradient.kind) for gradient in ranges]
    [('dense', 'activation'), ('dense', 'weight'), ('dense', 'weight')]
    """
    probe = Probe(model, precision, scale)
    probe.measure_batches(data, steps, batch_size)
    return GradientRanges(probe.record())
