"""Gradients of a training step in half precision, in float32, and in float32 with simulated rounding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy
from keras import ops

from tfmixed._core import gradients
from tfmixed._probe.dry_run import compiled_step, dry_run, loss_scale
from tfmixed._probe.tensor_hooks import hooked, round_significand
from tfmixed._probe.train_step_probe import StepProbe
from tfmixed._probe.update_probe import AppliedGradients
from tfmixed._utils import layer_tree, temporary_state
from tfmixed.formats import FLOAT32, FORMATS, HALF
from tfmixed.records import FidelityRecord, GradientError

_Context = contextlib.AbstractContextManager[None]


class FidelityProbe(StepProbe):
    """Compares the gradients of a model's training step with those in float32, batch by batch.

    Layers that draw random numbers run in inference mode.

    Args:
        model: A compiled model in which layers compute in half precision.
        scale: The loss scale. Defaults to None, the scale in use.

    Raises:
        ValueError: If the model is not compiled, or the scale is out of range.
        NotImplementedError: If the model holds a `GradScaler`.
    """

    def __init__(self, model: keras.Model, scale: float | None = None) -> None:
        super().__init__(model, 1.0 if scale is None else scale)
        self._is_in_use = scale is None

    def build(self, batch: Any) -> None:
        super().build(batch)
        layers = [layer for layer in self._paths if isinstance(layer, keras.layers.Layer)]
        self._half = {layer: layer.compute_dtype for layer in layers if layer.compute_dtype in HALF}
        if not self._half:
            raise ValueError(
                "`model` must compute in half precision to be compared with float32. Create it under a policy such as "
                f"mixed_bfloat16. Received: {self.model!r:.100}"
            )
        self._half_step: _GradientStep | None = None
        self._exact = _GradientStep(self.model, 1.0, lambda: temporary_state.in_float32(self._paths))
        self._rounded = _GradientStep(self.model, 1.0, self._with_rounding)
        self._rows: dict[Any, int] = {}  # by layer, from the half-precision run
        self._sums: dict[int, _Sums] = {}

    def _measure(self, batch: Any, state: Any) -> AppliedGradients:
        scale = self._scale_in_use(state) if self._is_in_use else self.scale
        if self._half_step is None or self.scale != scale:
            self.scale = scale
            self._half_step = _GradientStep(self.model, scale, self._with_row_counts)
        with temporary_state.random_layers_in_inference(self._paths):
            self._run(self._half_step, batch, state)
            self._run(self._exact, batch, state)
            with self._rounded_weights(state) as rounded:
                self._run(self._rounded, batch, rounded)
        steps = self._exact, self._half_step, self._rounded
        exact, half, rounded = (step.applied.by_variable() for step in steps)
        for key in exact:
            self._sums.setdefault(key, _Sums()).add(exact[key], half[key], rounded[key])
        return self._half_step.applied

    def _scale_in_use(self, state: Any) -> float:
        optimizer = self.model.optimizer
        held = getattr(optimizer, "dynamic_scale", None)
        if state is None or held is None:
            return float(loss_scale(self.model))
        (value,) = (value for variable, value in zip(optimizer.variables, state[2], strict=True) if variable is held)
        return float(value)

    def record(self, float32_sums: bool, step: int | None = None, epoch: int | None = None) -> FidelityRecord:
        """Returns the errors since the last record, in the order of the layers, and clears them.

        Args:
            float32_sums: Whether gradients were summed in float32.
            step: The attempted step before which they were measured. Defaults to None.
            epoch: Its epoch. Defaults to None.
        """
        layers = [self.model, *layer_tree.descendants(self.model)]
        errors = [error for layer in layers for error in self._errors(layer)]
        about = self.scale, self.batches, str(self.model.name), float32_sums
        record = FidelityRecord(step, epoch, *about, errors)
        self._sums.clear()
        self.updates.clear()
        self.batches = 0
        return record

    def _errors(self, layer: Any) -> Iterator[GradientError]:
        for variable in getattr(layer, "_trainable_variables", ()):
            if sums := self._sums.get(id(variable)):
                dtype, size = self._half.get(layer, layer.compute_dtype), math.prod(variable.shape)
                names = gradients.path(variable), self._paths[layer]
                error = GradientError(*names, dtype, size, self._rows.get(layer, 0), **sums.results())
                yield dataclasses.replace(error, **self.updates.fields(variable))

    @contextlib.contextmanager
    def _with_row_counts(self) -> Iterator[None]:
        """Counts the rows that layers return, when they are traced or run."""
        with self._calls_replaced(lambda layer, call: functools.partial(self._counted, layer, call)):
            yield

    def _counted(self, layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        shape = getattr(keras.tree.flatten(outputs)[0], "shape", ())
        self._rows[layer] = math.prod(size or 0 for size in shape[:-1])
        return outputs

    @contextlib.contextmanager
    def _with_rounding(self) -> Iterator[None]:
        """Computes in float32, and rounds to half precision what layers and activations take and return."""

        def rounded(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
            function = functools.partial(round_significand, bits=_significand(self._half[layer]))
            return hooked(call, function, function, inputs=True)

        with temporary_state.in_float32(self._paths), self._calls_replaced(rounded), contextlib.ExitStack() as stack:
            for layer in self._half:
                for name in layer_tree.activations_of(layer):
                    temporary_state.put(stack, layer, name, rounded(layer, getattr(layer, name)))
            yield

    @contextlib.contextmanager
    def _calls_replaced(self, replace: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer in self._half:
                if not layer_tree.graph_of(layer):
                    name = layer_tree.call_of(layer)
                    temporary_state.put(stack, layer, name, replace(layer, getattr(layer, name)))
            yield

    @contextlib.contextmanager
    def _rounded_weights(self, state: Any) -> Iterator[Any]:
        """Rounds the weights that are cast to half precision: in `state`, or in the variables if that is None."""
        dtypes = {id(variable): dtype for layer, dtype in self._half.items() for variable in layer._trainable_variables}

        def rounded(variable: Any, value: Any) -> Any:
            is_cast = id(variable) in dtypes and variable.dtype == "float32"
            return round_significand(value, _significand(dtypes[id(variable)])) if is_cast else value

        variables = self.model.trainable_variables
        if state is not None:
            values = [rounded(*pair) for pair in zip(variables, state[0], strict=True)]
            yield (values, *state[1:])
            return
        before = [ops.convert_to_numpy(variable.value) for variable in variables]
        try:
            for variable in variables:
                variable.assign(rounded(variable, variable.value))
            yield None
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)


def _significand(dtype: str) -> int:
    return 1 - round(math.log2(FORMATS[dtype].epsilon))


class _GradientStep:
    """A dry run of a model's training step that keeps its gradients as float32 arrays."""

    def __init__(self, model: keras.Model, scale: float, context: Callable[[], _Context]) -> None:
        self.model, self.scale, self.context = model, scale, context
        self.applied = AppliedGradients()
        self._step = compiled_step(model)

    def run(self, batch: Any, state: Any) -> None:
        """Replaces the gradients by those of one batch."""
        self.applied.values.clear()
        losses_in_float32 = temporary_state.losses_in_float32(self.model._flatten_layers())
        with dry_run(self.model, self._consume, self.scale), self.context(), losses_in_float32:
            self._step(batch, state)

    def _consume(self, grads: Iterable[Any], variables: Iterable[Any], optimizer: Any) -> None:
        self.applied.add(grads, variables, optimizer, self.scale)


@dataclass
class _Sums:
    """Sums over batches of what `GradientError` is computed from."""

    exact: float = 0.0
    half: float = 0.0
    product: float = 0.0
    difference: float = 0.0
    rounding: float = 0.0
    flushed: int = 0
    nonzero: int = 0
    nonfinite: int = 0
    unknown: int = 0

    def add(self, exact: Any, half: Any, rounded: Any) -> None:
        known = numpy.isfinite(exact) & numpy.isfinite(rounded)
        self.nonfinite += int(numpy.sum(known & ~numpy.isfinite(half)))
        self.unknown += int(numpy.sum(~known))
        finite = known & numpy.isfinite(half)
        exact, half, rounded = (numpy.where(finite, values, 0.0) for values in (exact, half, rounded))
        self.exact += numpy.vdot(exact, exact)
        self.half += numpy.vdot(half, half)
        self.product += numpy.vdot(exact, half)
        self.difference += numpy.vdot(half - exact, half - exact)
        self.rounding += numpy.vdot(rounded - exact, rounded - exact)
        self.flushed += int(numpy.sum((half == 0) & (rounded != 0) & (exact != 0)))
        self.nonzero += int(numpy.sum((rounded != 0) & (exact != 0)))

    def results(self) -> dict[str, Any]:
        """Returns the last fields of `GradientError`."""
        error, rounding = (_ratio(square, self.exact) ** 0.5 for square in (self.difference, self.rounding))
        cosine = _ratio(self.product, math.sqrt(self.exact) * math.sqrt(self.half), 1.0)
        flushed = _ratio(self.flushed, self.nonzero)
        return {
            "error": error,
            "rounding": rounding,
            "cosine": cosine,
            "flushed": flushed,
            "nonfinite": self.nonfinite,
            "unknown": self.unknown,
        }


def _ratio(value: float, reference: float, both_zero: float = 0.0) -> float:
    if reference:
        return min(value / reference, FLOAT32.max)
    return FLOAT32.max if value else both_zero
