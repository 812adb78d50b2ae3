"""Runs a model's own training step without taking it, and counts the gradients that it computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import keras
from keras import tree

from tfmixed._core import gradients
from tfmixed._probe import gradient_histogram
from tfmixed._probe.train_steps import compiled, holds_grad_scaler, untaken
from tfmixed._utils import layer_tree, model_building, temporary_state
from tfmixed.formats import HALF
from tfmixed.ranges import GradientRanges
from tfmixed.records import GradientRange, RangesRecord
from tfmixed.scaling import validation

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
    told nothing. What is not built yet is built, as in `fit`. All variables that the step uses are afterwards as they
    were, and so are the random states of Keras, TensorFlow, PyTorch, numpy and Python; attributes that a layer sets in
    Python are not. Only counts stay in memory. The method is that of Micikevicius et al., "Mixed Precision Training"
    (2017), figure 3.

    Gradients that are 0 in theory, such as that of a bias before a batch normalization, are rounding noise: their terms
    cancel. They are flagged and decide nothing. The first batch shows them: it runs once more in float32, with the
    gradients that flow back into each layer larger or smaller by a sixteenth. A sum changes by about as much, and one
    that cancels to less than 2^-10 of its terms, which is what float16 rounds each of them by, to 64 times itself.

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
    validation.count("steps", steps, 1)
    if batch_size is not None:
        validation.count("batch_size", batch_size, 1)
    probe = Probe(model, precision, scale)
    batches = itertools.islice(model_building.batches(data, batch_size), steps)
    with temporary_state.random_states():  # PyTorch's loaders draw from them
        first = list(itertools.islice(batches, 1))
    for batch in first:
        probe.build(batch)
    with temporary_state.random_states():
        for batch in itertools.chain(first, batches):
            probe.measure(batch)
    if not probe.batches:
        raise ValueError(f"data must hold a batch at least, received {data!r:.200}")
    return GradientRanges(probe.record())


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
        self.model, self.precision, self.scale = model, checked_precision(precision), validation.scale("scale", scale)
        self.batches = 0
        self._paths: dict[Any, str] = {}
        self._noise: set[Any] = set()
        self._seeds = temporary_state.seed_generator()

    def build(self, batch: Any) -> None:
        """Builds what is not built yet, the optimizers apart."""
        _check_targets(self.model, batch)
        built = all(layer.built for layer in self.model._flatten_layers())
        # What new layers draw, `fit` would have drawn.
        kept = temporary_state.states(self.model, self._seeds) if built else temporary_state.added_losses(self.model)
        wide = temporary_state.losses_in_float32(self.model._flatten_layers())
        with untaken(self.model, lambda *_: None, self.scale), kept, wide:
            self.model._symbolic_build(data_batch=_without_optionals(batch))
        self._paths = layer_tree.paths(self.model)
        self._step = _CountedStep(self.model, self._paths, self.precision, self.scale)
        exact = self.precision == "float32"
        self._exact = self._step if exact else _CountedStep(self.model, self._paths, "float32", self.scale)
        self._perturbed = _CountedStep(self.model, self._paths, "float32", self.scale, perturbed=True)

    def measure(self, batch: Any, state: Any = None) -> None:
        """Counts the gradients of one batch, as `train_step` takes it.

        Args:
            batch: Inputs, targets and sample weights.
            state: On JAX within `fit`, the values of all variables, which the trainer then holds.
        """
        if not self._paths:
            self.build(batch)
        batch = _without_optionals(batch)
        with temporary_state.states(self.model, self._seeds):
            self._step.run(batch, state)
        if not self._step.weights and self.model.trainable_variables:
            raise ValueError(
                f"model must hold the optimizers that its train_step uses, received {self.model!r:.100}, of which none "
                "was given a gradient: a step may have been taken. Make the optimizer an attribute of the model"
            )
        if not self.batches:
            self._find_noise(batch, state)
        self.batches += 1

    def _find_noise(self, batch: Any, state: Any) -> None:
        """Finds the gradients that are rounding noise: in float32 they change out of all proportion if perturbed."""
        for step in (self._exact, self._perturbed):
            if step is not self._step:
                step.clear()
                with temporary_state.states(self.model, self._seeds):
                    step.run(batch, state)
        exact, perturbed = self._exact.tallies, self._perturbed.tallies
        self._noise = {key for key in exact.keys() & perturbed.keys() if exact[key].cancels(perturbed[key])}

    def record(self, step: int | None = None, epoch: int | None = None) -> RangesRecord:
        """Returns what was counted since the last record, in the order of the layers, and starts anew.

        Args:
            step: The attempted step of a run before which it was measured.
            epoch: Its epoch.
        """
        layers = [self.model, *layer_tree.descendants(self.model)]  # what is inside a layer right behind it
        ranges = [each for layer in layers for each in self._ranges(layer, self._paths[layer])]
        record = RangesRecord(step, epoch, self.precision, self.scale, self.batches, str(self.model.name), ranges)
        self._step.clear()
        self.batches = 0
        return record

    def _ranges(self, layer: Any, path: str) -> Iterator[GradientRange]:
        tallies = self._step.tallies
        if (key := id(layer)) in tallies and tallies[key].counts.any():
            yield tallies[key].range(path, "activation", path, _given(layer), key in self._noise)
        for variable in getattr(layer, "_trainable_variables", ()):
            if (key := id(variable)) in tallies:
                name = gradients.path(variable)
                yield tallies[key].range(name, "weight", path, layer.compute_dtype, key in self._noise)


class _CountedStep:
    """A model's training step, run without being taken, with its gradients counted.

    Args:
        model: A compiled model.
        paths: All that is inside it.
        precision: What to compute in.
        scale: What the loss is multiplied by, and the gradients divided by before they are counted.
        perturbed: Are the gradients that flow back into layers perturbed? Defaults to False.
    """

    def __init__(
        self, model: keras.Model, paths: Iterable[Any], precision: Precision, scale: float, perturbed: bool = False
    ) -> None:
        self.model, self.paths, self.precision, self.scale, self.perturbed = model, paths, precision, scale, perturbed
        self.tallies: dict[int, gradient_histogram.Tally] = {}  # by the identity of the layer or the variable
        self.weights: dict[int, Any] = {}  # the variables, which stay as long as their identities count
        self._step = compiled(model)

    def run(self, batch: Any, state: Any) -> None:
        """Counts the gradients of one batch."""
        wide = temporary_state.losses_in_float32(self.paths)
        with untaken(self.model, self._count, self.scale), self._in_precision(), self._tapped(), wide:
            self._step(batch, state)

    def clear(self) -> None:
        """Forgets what was counted."""
        for tally in self.tallies.values():
            tally.clear()

    @contextlib.contextmanager
    def _in_precision(self) -> Iterator[None]:
        if self.precision == "float32":
            with temporary_state.in_float32(self.paths):
                yield
            return
        layers = [layer for layer in self.paths if isinstance(layer, keras.layers.Layer)]
        half = [layer for layer in layers if layer.compute_dtype in HALF]
        with temporary_state.with_policy(half or layers, f"mixed_{self.precision}"):
            yield

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[None]:
        """Has the layers' outputs counted on the way back."""
        layers = [
            layer for layer in self.paths if isinstance(layer, keras.layers.Layer) and not layer_tree.graph_of(layer)
        ]
        with contextlib.ExitStack() as stack:
            for layer in layers:
                tally = self.tallies.setdefault(id(layer), gradient_histogram.Tally())
                name = layer_tree.call_of(layer)
                tapped = gradient_histogram.tapped(getattr(layer, name), tally, self.scale, self.perturbed)
                temporary_state.put(stack, layer, name, tapped)
            yield

    def _count(self, grads: Iterable[Any], variables: Iterable[Any]) -> None:
        for gradient, variable in zip(grads, variables, strict=True):
            if gradient is not None and not gradients.holds_gradient(variable):
                self.weights[id(variable)] = variable
                gradient_histogram.count(
                    gradient, self.tallies.setdefault(id(variable), gradient_histogram.Tally()), self.scale
                )


def _check_targets(model: keras.Model, batch: Any) -> None:
    """Refuses inputs alone where the step and the loss are Keras's, which raise an error that names neither."""
    _, y, _ = keras.utils.unpack_x_y_sample_weight(_without_optionals(batch))
    own = any(getattr(type(model), name) is not getattr(keras.Model, name) for name in ("train_step", "compute_loss"))
    if y is None and model.loss is not None and not own:
        raise ValueError(
            "data must come with inputs and targets for the loss that the model is compiled with. Received: inputs "
            "alone. Pass (x, y), or a dataset of both"
        )


def _given(layer: Any) -> str:
    """Returns the dtype of what a layer gives, and so of the gradient that comes back to it."""
    declared = getattr(layer, "_gives", None) or getattr(layer, "output_dtype", None)
    return str(declared or getattr(layer, "compute_dtype", "float32"))


def _without_optionals(batch: Any) -> Any:
    # What TensorFlow's datasets have for None; Keras's trainer does the same.
    return tree.map_structure(lambda leaf: None if type(leaf).__name__ == "_OptionalImpl" else leaf, batch)
