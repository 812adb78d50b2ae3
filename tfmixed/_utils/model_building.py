"""Batches as `fit` would train on them, and models built from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.trainers.data_adapters import get_data_adapter

from tfmixed._utils import temporary_state


def build(model: keras.Model, inputs: Any) -> None:
    """Builds a model by a symbolic call with the shapes and dtypes of a batch, without running it.

    Raises:
        ValueError: If the inputs are not arrays, or a structure of them.
    """

    def symbolic(array: Any) -> keras.KerasTensor:
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(
                f"`inputs` must be arrays, or a structure of arrays, to build a model. Received: {type(array).__name__}"
            )
        return keras.KerasTensor(tuple(array.shape), keras.backend.standardize_dtype(array.dtype))

    model(keras.tree.map_structure(symbolic, inputs))


def first_batch(inputs: Any, targets: Any = None) -> tuple[Any, Any]:
    """Returns the given arrays, or the inputs and targets of the first batch if `inputs` is a dataset.

    Raises:
        ValueError: If the dataset is empty.
    """
    if targets is not None or all(hasattr(leaf, "shape") or leaf is None for leaf in keras.tree.flatten(inputs)):
        return inputs, targets
    for batch in batches(inputs):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return x, y
    raise ValueError(f"The data must contain at least one batch. Received: {inputs!r:.200}")


def batches(data: Any, batch_size: int | None = None) -> Iterator[Any]:
    """Yields the batches that `fit` would train on.

    Args:
        data: Anything that `fit` accepts: `(x, y)` or `(x, y, sample_weight)` as a tuple, inputs alone, or a dataset.
        batch_size: Number of samples in a batch of arrays. Defaults to None, which stands for 32.

    Raises:
        ValueError: If `fit` does not accept the data.
    """
    parts = data if isinstance(data, tuple) else (data,)
    if not 1 <= len(parts) <= 3 or parts[0] is None or (isinstance(parts[0], (list, tuple, dict)) and not parts[0]):
        raise ValueError(f"`data` must be (x, y, sample_weight) or a dataset, as for `fit`. Received: {data!r:.200}")
    adapter = get_data_adapter(*parts, batch_size=batch_size)
    iterators = {"tensorflow": "get_tf_dataset", "jax": "get_jax_iterator", "torch": "get_torch_dataloader"}
    with contextlib.ExitStack() as stack:
        if isinstance(data, keras.utils.PyDataset):  # its epoch hooks may shuffle: this is not an epoch of the user's
            for name in ("on_epoch_begin", "on_epoch_end"):
                temporary_state.put(stack, data, name, lambda: None)
        adapter.on_epoch_begin()
        stack.callback(adapter.on_epoch_end)  # stops the workers of a PyDataset
        yield from getattr(adapter, iterators[keras.backend.backend()])()
