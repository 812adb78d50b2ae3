"""Gradient histograms of a model's training step, from dry runs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import keras
from keras import tree

from tfmixed._core import gradients
from tfmixed._probe.dry_run import compiled_step, dry_run, holds_grad_scaler
from tfmixed._probe.gradient_histogram import Histogram, add_gradient, perturb
from tfmixed._probe.tensor_hooks import hooked
from tfmixed._probe.update_probe import AppliedGradients, UpdateProbe
from tfmixed._utils import layer_tree, model_building, temporary_state
from tfmixed.formats import HALF
from tfmixed.records import GradientRange, RangesRecord
from tfmixed.scaling import validation

Precision = Literal["float32", "float16", "bfloat16"]


def checked_precision(precision: Precision) -> Precision:
    """Returns the argument if it is a valid precision."""
    if precision not in get_args(Precision):
        options = ", ".join(get_args(Precision))
        raise ValueError(f"`precision` must be one of {options}. Received: precision={precision!r}")
    return precision


class StepProbe:
    """Base class of probes that run a model's training step on a batch without the update.

    Args:
        model: A compiled model.
        scale: The loss scale. Gradients are divided by it.

    Raises:
        ValueError: If the model is not compiled, or the scale is out of range.
        NotImplementedError: If the model holds a `GradScaler`.
    """

    def __init__(self, model: keras.Model, scale: float) -> None:
        if not isinstance(model, keras.Model) or not model.compiled or model.optimizer is None:
            raise ValueError(
                "`model` must be a keras.Model that is compiled with an optimizer and a loss. Call model.compile "
                f"first. Received: {model!r:.100}"
            )
        if holds_grad_scaler(model):
            raise NotImplementedError(
                "`model` must not hold a GradScaler, because its train_step would update the scaler. Measure a model "
                f"of the same layers that is compiled with a LossScaleOptimizer. Received: {model!r:.100}"
            )
        self.model, self.scale = model, validation.scale("scale", scale)
        self.batches = 0
        self.updates = UpdateProbe(model)
        self._paths: dict[Any, str] = {}
        self._seeds = temporary_state.seed_generator()

    def build(self, batch: Any) -> None:
        """Builds the model and its metrics if necessary, but not the optimizers."""
        batch = _without_optionals(batch)
        _check_targets(self.model, batch)
        built = all(layer.built for layer in self.model._flatten_layers())
        # New layers draw the random numbers that they would draw in `fit`.
        kept = temporary_state.states(self.model, self._seeds) if built else temporary_state.added_losses(self.model)
        losses_in_float32 = temporary_state.losses_in_float32(self.model._flatten_layers())
        with dry_run(self.model, lambda *_: None, self.scale), kept, losses_in_float32:
            self.model._symbolic_build(data_batch=batch)
        self._paths = layer_tree.paths(self.model)

    def measure(self, batch: Any, state: Any = None) -> None:
        """Adds the gradients of one batch.

        Args:
            batch: Inputs, targets and sample weights, as `train_step` accepts them.
            state: The values of all variables on JAX within `fit`, where the trainer holds them. Defaults to None.
        """
        if not self._paths:
            self.build(batch)
        applied = self._measure(_without_optionals(batch), state)
        if not self.batches:
            self.updates.add(applied, state)
        applied.values.clear()
        self.batches += 1

    def measure_batches(self, data: Any, steps: int, batch_size: int | None) -> None:
        """Adds the gradients of at most `steps` batches of data as `fit` accepts them.

        Raises:
            ValueError: If there is no batch, or an argument is out of range.
        """
        validation.count("steps", steps, 1)
        if batch_size is not None:
            validation.count("batch_size", batch_size, 1)
        batches = itertools.islice(model_building.batches(data, batch_size), steps)
        with temporary_state.random_states():  # PyTorch's loaders draw random numbers
            first = list(itertools.islice(batches, 1))
        for batch in first:
            self.build(batch)
        with temporary_state.random_states():
            for batch in itertools.chain(first, batches):
                self.measure(batch)
        if not self.batches:
            raise ValueError(f"`data` must contain at least one batch. Received: {data!r:.200}")

    def _measure(self, batch: Any, state: Any) -> AppliedGradients:
        """Measures a batch, and returns the gradients that train."""
        raise NotImplementedError

    def _run(self, step: Any, batch: Any, state: Any) -> None:
        """Runs a step, which has an attribute `applied`, its gradients."""
        with temporary_state.states(self.model, self._seeds):
            step.run(batch, state)
        if not step.applied.calls and self.model.trainable_variables:
            raise ValueError(
                "`model` must hold the optimizers that its train_step uses: no optimizer that it holds received a "
                "gradient, so that another one may have taken a step. Make the optimizer an attribute of the model. "
                f"Received: {self.model!r:.100}"
            )


class Probe(StepProbe):
    """Collects gradient histograms of a model's training step, batch by batch.

    Args:
        model: The same as in `StepProbe`.
        precision: The precision of the dry runs. Defaults to `"float32"`.
        scale: The same as in `StepProbe`. Defaults to 1.
    """

    def __init__(self, model: keras.Model, precision: Precision = "float32", scale: float = 1.0) -> None:
        super().__init__(model, scale)
        self.precision = checked_precision(precision)
        self._noise: set[int] = set()

    def build(self, batch: Any) -> None:
        super().build(batch)
        self._step = _ProbedStep(self.model, self._paths, self.precision, self.scale)
        is_float32 = self.precision == "float32"
        self._exact = self._step if is_float32 else _ProbedStep(self.model, self._paths, "float32", self.scale)
        self._perturbed = _ProbedStep(self.model, self._paths, "float32", self.scale, perturbed=True)

    def _measure(self, batch: Any, state: Any) -> AppliedGradients:
        self._run(self._step, batch, state)
        if not self.batches:
            self._find_noise(batch, state)
        return self._step.applied

    def _find_noise(self, batch: Any, state: Any) -> None:
        """Finds gradients that are rounding noise: they change disproportionately when the step is perturbed."""
        for step in (self._exact, self._perturbed):
            if step is not self._step:
                step.clear()
                self._run(step, batch, state)
        exact, perturbed = self._exact.histograms, self._perturbed.histograms
        self._noise = {key for key in exact.keys() & perturbed.keys() if exact[key].cancels(perturbed[key])}

    def record(self, step: int | None = None, epoch: int | None = None) -> RangesRecord:
        """Returns the gradients since the last record, in the order of the layers, and clears the histograms.

        Args:
            step: The attempted step before which they were measured. Defaults to None.
            epoch: Its epoch. Defaults to None.
        """
        layers = [self.model, *layer_tree.descendants(self.model)]
        ranges = [range_ for layer in layers for range_ in self._ranges(layer, self._paths[layer])]
        record = RangesRecord(step, epoch, self.precision, self.scale, self.batches, str(self.model.name), ranges)
        self._step.clear()
        self.updates.clear()
        self.batches = 0
        return record

    def _ranges(self, layer: Any, path: str) -> Iterator[GradientRange]:
        histograms = self._step.histograms
        if (key := id(layer)) in histograms and histograms[key].counts.any():
            yield histograms[key].range(path, "activation", path, _output_dtype(layer), key in self._noise)
        for variable in getattr(layer, "_trainable_variables", ()):
            if (key := id(variable)) in histograms:
                name = gradients.path(variable)
                range_ = histograms[key].range(name, "weight", path, layer.compute_dtype, key in self._noise)
                yield dataclasses.replace(range_, **self.updates.fields(variable))


class _ProbedStep:
    """A dry run of a model's training step that adds its gradients to histograms."""

    def __init__(
        self, model: keras.Model, layers: Iterable[Any], precision: Precision, scale: float, perturbed: bool = False
    ) -> None:
        self.model, self.layers, self.precision, self.scale, self.perturbed = model, layers, precision, scale, perturbed
        self.histograms: dict[int, Histogram] = {}  # by the id of the layer or variable
        self.applied = AppliedGradients(keep=not perturbed)
        self._step = compiled_step(model)

    def run(self, batch: Any, state: Any) -> None:
        """Adds the gradients of one batch."""
        losses_in_float32 = temporary_state.losses_in_float32(self.layers)
        with dry_run(self.model, self._add, self.scale), self._in_precision(), self._output_hooks(), losses_in_float32:
            self._step(batch, state)

    def clear(self) -> None:
        """Clears the histograms."""
        for histogram in self.histograms.values():
            histogram.clear()

    def _in_precision(self) -> contextlib.AbstractContextManager[None]:
        if self.precision == "float32":
            return temporary_state.in_float32(self.layers)
        layers = [layer for layer in self.layers if isinstance(layer, keras.layers.Layer)]
        half = [layer for layer in layers if layer.compute_dtype in HALF]
        return temporary_state.with_policy(half or layers, f"mixed_{self.precision}")

    @contextlib.contextmanager
    def _output_hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                if isinstance(layer, keras.layers.Layer) and not layer_tree.graph_of(layer):
                    name, backward = layer_tree.call_of(layer), self._backward(self._histogram(layer))
                    temporary_state.put(stack, layer, name, hooked(getattr(layer, name), backward))
            yield

    def _backward(self, histogram: Histogram) -> Callable[[Any], Any]:
        def backward(gradient: Any) -> Any:
            add_gradient(histogram, gradient, self.scale)
            return perturb(gradient) if self.perturbed else gradient

        return backward

    def _add(self, grads: Iterable[Any], variables: Iterable[Any], optimizer: Any) -> None:
        for gradient, variable in self.applied.add(grads, variables, optimizer, self.scale):
            add_gradient(self._histogram(variable), gradient, self.scale)

    def _histogram(self, key: Any) -> Histogram:
        return self.histograms.setdefault(id(key), Histogram())


def _check_targets(model: keras.Model, batch: Any) -> None:
    """Raises an error where Keras's own step and loss would raise a less clear one."""
    _, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    custom = any(
        getattr(type(model), name) is not getattr(keras.Model, name) for name in ("train_step", "compute_loss")
    )
    if y is None and model.loss is not None and not custom:
        raise ValueError(
            "`data` must come with inputs and targets for the loss that the model is compiled with. Pass (x, y), or a "
            "dataset of both. Received: inputs alone"
        )


def _output_dtype(layer: Any) -> str:
    """Returns the dtype of a layer's output, and so of the gradient that flows back to it."""
    declared = getattr(layer, "_gives", None) or getattr(layer, "output_dtype", None)
    return str(declared or getattr(layer, "compute_dtype", "float32"))


def _without_optionals(batch: Any) -> Any:
    # TensorFlow's datasets represent None as an optional. Keras's trainer replaces it in the same way.
    return tree.map_structure(lambda leaf: None if type(leaf).__name__ == "_OptionalImpl" else leaf, batch)
