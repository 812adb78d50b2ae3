"""Runs a model's own training step without taking it, and counts the gradients that it computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import keras
from keras import tree
from keras.src.trainers.data_adapters import get_data_adapter

from tfmixed import gradients, structure, taps, temporary
from tfmixed.formats import HALF
from tfmixed.ranges import GradientRanges
from tfmixed.records import GradientRange, RangesRecord
from tfmixed.scaling import checks
from tfmixed.steps import compiled, holds_grad_scaler, untaken

Precision = Literal["float32", "float16", "bfloat16"]


def measure_gradients(
    model: keras.Model,
    data: Any,
    steps: int = 10,
    *,
    precision: Precision = "float32",
    scale: float = 1.0,
    batch_size: int | None = None,
) -> GradientRanges:
    """Returns the magnitudes of a model's gradients: of the output of each layer, and of each variable.

    It runs the training step that `fit` would run, a `train_step` of one's own included, up to the optimizer, which is
    told nothing. Weights, moving statistics, metrics, and the random states of Keras, numpy and Python are afterwards
    as they were. What is not built yet is built, as in `fit`. Only counts stay in memory. The method is that of
    Micikevicius et al., "Mixed Precision Training" (2017), figure 3.

    Args:
        model: A compiled model, under any dtype policy.
        data: What `fit` takes: `(x, y)` or `(x, y, sample_weight)` as a tuple, inputs alone, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a generator, a PyTorch `DataLoader`.
        steps: How many batches, if there are as many.
        precision: `"float32"` for the true magnitudes. `"float16"` or `"bfloat16"` for what comes out in half
            precision: layers that compute in half precision already do it in this one; in a model that has none, all.
        scale: What the loss is multiplied by, and gradients are divided by in float32 before they are counted.
        batch_size: Of arrays; 32 by default, as in `fit`.

    Raises:
        ValueError: The model is not compiled, there is no data, or an argument is out of range.
        NotImplementedError: The model holds a `GradScaler`.

    Example:
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="dense")])
    >>> model.compile("sgd", loss="mse")
    >>> ranges = measure_gradients(model, (ops.ones((64, 4)), ops.zeros((64, 1))), steps=2)
    >>> [(each.layer, each.kind) for each in ranges]
    [('dense', 'activation'), ('dense', 'weight'), ('dense', 'weight')]
    """
    checks.count("steps", steps, 1)
    probe = Probe(model, precision, scale)
    with temporary.random_states():  # PyTorch's loaders draw from them
        for batch in itertools.islice(_batches(data, batch_size), steps):
            probe.measure(batch)
    if not probe.batches:
        raise ValueError(f"data must hold a batch at least, received {data!r:.200}")
    return GradientRanges(probe.record())


def _batches(data: Any, batch_size: int | None) -> Iterator[Any]:
    parts = data if isinstance(data, tuple) else (data,)
    if not 1 <= len(parts) <= 3 or parts[0] is None or (isinstance(parts[0], (list, tuple, dict)) and not parts[0]):
        raise ValueError(
            f"data must be what `fit` takes, as (x, y, sample_weight) or a dataset, received {data!r:.200}"
        )
    if batch_size is not None:
        checks.count("batch_size", batch_size, 1)
    adapter = get_data_adapter(*parts, batch_size=batch_size)
    iterators = {"tensorflow": "get_tf_dataset", "jax": "get_jax_iterator", "torch": "get_torch_dataloader"}
    with contextlib.ExitStack() as stack:
        if isinstance(data, keras.utils.PyDataset):  # no epoch of a user's begins or ends, where data may be shuffled
            for name in ("on_epoch_begin", "on_epoch_end"):
                temporary.put(stack, data, name, lambda: None)
        adapter.on_epoch_begin()
        stack.callback(adapter.on_epoch_end)  # ends the workers of a PyDataset
        yield from getattr(adapter, iterators[keras.backend.backend()])()


def checked_precision(precision: Precision) -> Precision:
    """Returns it, if it is one."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, received {precision!r}")
    return precision


class Probe:
    """Counts the gradients of a model's training step, batch by batch.

    Args:
        model: A compiled model.
        precision: What to compute in.
        scale: What the loss is multiplied by, and the gradients divided by before they are counted.

    Raises:
        ValueError: The model is not compiled, or an argument is out of range.
        NotImplementedError: The model holds a `GradScaler`.
    """

    def __init__(self, model: keras.Model, precision: Precision = "float32", scale: float = 1.0) -> None:
        if not isinstance(model, keras.Model) or not model.compiled or model.optimizer is None:
            raise ValueError(
                "model must be a keras.Model that is compiled with an optimizer and a loss, received "
                f"{model!r:.100}: call model.compile first"
            )
        if holds_grad_scaler(model):
            raise NotImplementedError(
                f"model must not hold a GradScaler to be measured, received {model!r:.100}: its train_step would take "
                "the scaler a step on. Measure a model of the same layers that is compiled with a LossScaleOptimizer"
            )
        self.model, self.precision, self.scale = model, checked_precision(precision), checks.scale("scale", scale)
        self.batches = 0
        self._paths: dict[Any, str] = {}
        self._outputs: dict[Any, taps.Tally] = {}
        self._weights: dict[int, tuple[Any, taps.Tally]] = {}  # by the identity of the variable
        self._step: Callable[..., Any] | None = None

    def measure(self, batch: Any, state: Any = None) -> None:
        """Counts the gradients of one batch, as `train_step` takes it.

        Args:
            batch: Inputs, targets and sample weights.
            state: On JAX within `fit`, the values of all variables, which the trainer then holds.
        """
        batch = _without_optionals(batch)
        with temporary.random_states():
            if self._step is None:
                self._step = self._built(batch)
            # Only once the model is built: variables that are made meanwhile could not be restored.
            without_taking = untaken(self.model, self._count, self.scale)
            with temporary.restored(self.model), without_taking, self._in_precision(), self._tapped():
                self._step(batch, state)
        if not self._weights and self.model.trainable_variables:
            raise ValueError(
                f"model must hold the optimizers that its train_step uses, received {self.model!r:.100}, of which none "
                "was given a gradient: a step may have been taken. Make the optimizer an attribute of the model"
            )
        self.batches += 1

    def _built(self, batch: Any) -> Callable[..., Any]:
        with untaken(self.model, self._count, self.scale):  # the optimizer is not built
            self.model._symbolic_build(data_batch=batch)
        self._paths = structure.paths(self.model)
        return compiled(self.model)

    def record(self, step: int | None = None, epoch: int | None = None) -> RangesRecord:
        """Returns what was counted since the last record, in the order of the layers, and starts anew.

        Args:
            step: The attempted step of a run before which it was measured.
            epoch: Its epoch.
        """
        layers = [self.model, *structure.descendants(self.model)]  # what is inside a layer right behind it
        ranges = [each for layer in layers for each in self._ranges(layer, self._paths[layer])]
        record = RangesRecord(step, epoch, self.precision, self.scale, self.batches, str(self.model.name), ranges)
        for tally in self._tallies():
            tally.clear()
        self.batches = 0
        return record

    def _tallies(self) -> Iterator[taps.Tally]:
        yield from self._outputs.values()
        yield from (tally for _, tally in self._weights.values())

    def _ranges(self, layer: Any, path: str) -> Iterator[GradientRange]:
        if layer in self._outputs and self._outputs[layer].counts.any():
            yield self._outputs[layer].range(path, "activation", path, _given(layer))
        for variable in getattr(layer, "_trainable_variables", ()):
            if id(variable) in self._weights:
                _, tally = self._weights[id(variable)]
                yield tally.range(gradients.path(variable), "weight", path, layer.compute_dtype)

    @contextlib.contextmanager
    def _in_precision(self) -> Iterator[None]:
        if self.precision == "float32":
            with temporary.in_float32(self._paths):
                yield
            return
        layers = [layer for layer in self._paths if isinstance(layer, keras.layers.Layer)]
        half = [layer for layer in layers if layer.compute_dtype in HALF]
        with temporary.with_policy(half or layers, f"mixed_{self.precision}"):
            yield

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[None]:
        """Has the layers' outputs counted on the way back."""
        layers = [
            layer for layer in self._paths if isinstance(layer, keras.layers.Layer) and not structure.graph_of(layer)
        ]
        with contextlib.ExitStack() as stack:
            for layer in layers:
                tally = self._outputs.setdefault(layer, taps.Tally())
                temporary.put(stack, layer, "call", taps.tapped(layer.call, tally, self.scale))
            yield

    def _count(self, grads: Iterable[Any], variables: Iterable[Any]) -> None:
        for gradient, variable in zip(grads, variables, strict=True):
            if gradient is not None:
                _, tally = self._weights.setdefault(id(variable), (variable, taps.Tally()))
                taps.count(gradient, tally, self.scale)


def _given(layer: Any) -> str:
    """Returns the dtype of what a layer gives, and so of the gradient that comes back to it."""
    declared = getattr(layer, "_gives", None) or getattr(layer, "output_dtype", None)
    return str(declared or getattr(layer, "compute_dtype", "float32"))


def _without_optionals(batch: Any) -> Any:
    # What TensorFlow's datasets have for None; Keras's trainer does the same.
    return tree.map_structure(lambda leaf: None if type(leaf).__name__ == "_OptionalImpl" else leaf, batch)
