"""Sizes of weight updates, relative to the distance between neighboring half-precision numbers."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy
from keras import ops

from tfmixed._core import gradients
from tfmixed._core.inner_optimizer import parts
from tfmixed._probe.tensor_hooks import deliver, dense
from tfmixed._utils import temporary_state
from tfmixed.formats import HALF
from tfmixed.records.record_types import Updates

_OFFSET = 512  # the octave 2^0 in a histogram; octaves go from -270 to 261
_CHUNK = 2**18  # elements, whose temporary arrays stay in the processor's cache


class AppliedGradients:
    """The gradients that a step passes to its optimizers, unscaled, as float32 arrays.

    Args:
        keep: If False, the arrays are not kept. Defaults to True.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        # Optimizer and variables of each call of `apply`. They stay alive, so that their ids stay valid.
        self.calls: dict[tuple[int, ...], tuple[Any, list[Any]]] = {}
        self.values: dict[tuple[tuple[int, ...], int], Any] = {}  # by call and place in it

    def add(
        self, grads: Iterable[Any], variables: Iterable[Any], optimizer: Any, scale: float
    ) -> list[tuple[Any, Any]]:
        """Adds a call of `apply`, and returns the pairs of gradient and variable that train the variable."""
        pairs = [
            (None if gradients.holds_gradient(variable) else gradient, variable)
            for gradient, variable in zip(grads, variables, strict=True)
        ]
        key = id(optimizer), *(id(variable) for _, variable in pairs)
        found = {place: pair for place, pair in enumerate(pairs) if pair[0] is not None}
        if found:
            self.calls[key] = optimizer, [variable for _, variable in pairs]
        for place, (gradient, _) in found.items() if self.keep else ():
            deliver(functools.partial(self._put, key, place), ops.cast(dense(gradient), "float32") / scale)
        return list(found.values())

    def _put(self, key: tuple[int, ...], place: int, gradient: Any) -> None:
        self.values[key, place] = numpy.array(gradient)

    def by_variable(self) -> dict[int, Any]:
        """Returns the gradient of each variable by its id: the sum, if two optimizers train it."""
        found: dict[int, Any] = {}
        for (key, place), gradient in self.values.items():
            variable = key[1 + place]
            found[variable] = found.get(variable, 0.0) + gradient.astype("float64")
        return found


class UpdateProbe:
    """Histograms of the updates that measured gradients would make to a model's variables.

    The optimizer's own step runs eagerly on float32 copies of the variables and of its states, in the memory of the
    CPU, so that no constant, state or result is rounded to half precision.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._histograms: dict[int, UpdateHistogram] = {}  # by the id of the variable
        self._rounded_to: dict[int, str] = {}

    def add(self, applied: AppliedGradients, state: Any) -> None:
        """Adds the updates of one step. A step with a gradient that is not finite has none, as if it were skipped.

        Args:
            applied: The gradients.
            state: The values of all variables on JAX within `fit`. None otherwise.
        """
        if not all(numpy.isfinite(gradient).all() for gradient in applied.values.values()) or _in_scope():
            return
        model, values = self.model, {}
        if state is not None:
            held = zip((*model.trainable_variables, *model.optimizer.variables), (*state[0], *state[2]), strict=True)
            values = {id(variable): value for variable, value in held}
        for key, (optimizer, variables) in applied.calls.items():
            grads = [applied.values.get((key, place)) for place in range(len(variables))]
            for variable, before, after in _updated(model, optimizer, grads, variables, values):
                self._histograms.setdefault(id(variable), UpdateHistogram()).add(before, after)
                self._rounded_to[id(variable)] = _rounded_to(optimizer, variable)

    def fields(self, variable: Any) -> dict[str, Any]:
        """Returns the fields of a variable's record."""
        if (key := id(variable)) not in self._histograms:
            return {}
        return {"updates": self._histograms[key].updates(), "rounded_to": self._rounded_to[key]}

    def clear(self) -> None:
        """Clears the histograms."""
        self._histograms.clear()


def _chain(optimizer: Any) -> Iterator[Any]:
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _rounded_to(optimizer: Any, variable: Any) -> str:
    # `LowPrecisionOptimizer` keeps what rounding to nearest discards, on average or in a second variable.
    if any(getattr(part, "weights", None) in ("stochastic", "split") for part in _chain(optimizer)):
        return ""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return dtype if dtype in HALF else ""


def _updated(
    model: keras.Model, optimizer: Any, grads: list[Any], variables: list[Any], values: Mapping[int, Any]
) -> list[tuple[Any, Any, Any]]:
    """Returns each variable that has a gradient, and its values before and after a step in float32."""
    *_, inner = _chain(optimizer)
    low = [part for part in (*_chain(optimizer), *getattr(inner, "optimizers", ())) if hasattr(part, "to_keras")]
    if low:
        return _updated_by_keras(low[0], grads, variables, values) if low[0] in _chain(optimizer) else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(temporary_state.variables(model))  # states that are not variables of Keras
        stack.enter_context(temporary_state.random_states())
        stack.enter_context(_on_cpu())
        if not inner.built:
            inner = _rebuilt(inner, variables)
        copied = {id(variable): variable for part in parts(inner) for variable in part.variables}
        copied |= {id(variable): variable for variable in variables}
        before = {key: _copy_in_float32(stack, inner, variable, values) for key, variable in copied.items()}
        for part in parts(inner):
            temporary_state.put(stack, part, "use_ema", False)  # averages of the weights do not affect the update
            if keras.backend.backend() == "tensorflow":
                import tensorflow

                temporary_state.put(stack, part, "_distribution_strategy", tensorflow.distribute.get_strategy())
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # about variables without a gradient
        inner.apply([None if values is None else ops.convert_to_tensor(values) for values in grads], variables)
        return [
            (variable, before[id(variable)], ops.convert_to_numpy(variable.value))
            for gradient, variable in zip(grads, variables, strict=True)
            if gradient is not None
        ]


def _updated_by_keras(
    optimizer: Any, grads: list[Any], variables: list[Any], values: Mapping[int, Any]
) -> list[tuple[Any, Any, Any]]:
    """Does the same for a `LowPrecisionOptimizer`, by the Keras optimizer that would continue it in float32."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(temporary_state.random_states())
        stack.enter_context(_on_cpu())
        for variable in (*variables, *optimizer.variables):
            if id(variable) in values:
                temporary_state.put(stack, variable, "_value", values[id(variable)])
        copies = [keras.Variable(ops.cast(variable.value, "float32"), name=variable.name) for variable in variables]
        plain = optimizer.to_keras(copies) if optimizer.built else _rebuilt(optimizer.inner_optimizer, copies)
        before = [numpy.array(ops.convert_to_numpy(copy.value)) for copy in copies]
        plain.apply([None if values is None else ops.convert_to_tensor(values) for values in grads], copies)
        after = [ops.convert_to_numpy(copy.value) for copy in copies]
    found = zip(grads, variables, before, after, strict=True)
    return [(variable, old, new) for gradient, variable, old, new in found if gradient is not None]


def _rebuilt(optimizer: Any, variables: list[Any]) -> Any:
    """Returns a new optimizer like one that has not been built, and builds it."""
    config = optimizer.get_config()
    if isinstance(rate := getattr(optimizer, "_learning_rate", None), keras.optimizers.schedules.LearningRateSchedule):
        config["learning_rate"] = rate  # which may be of a class that Keras does not know
    rebuilt = type(optimizer).from_config(config)
    rebuilt.build(variables)
    return rebuilt


def _copy_in_float32(stack: contextlib.ExitStack, optimizer: Any, variable: Any, values: Mapping[int, Any]) -> Any:
    """Puts a float32 copy of its value into a variable until the stack is closed, and returns the value."""
    # Not `get`: on JAX within `fit` the variable itself has no value.
    held = values[id(variable)] if id(variable) in values else variable.value  # noqa: SIM401
    value = ops.convert_to_numpy(held)
    dtype = "float32" if "float" in str(value.dtype) else keras.backend.standardize_dtype(variable.dtype)
    value = value.astype(dtype)
    held = keras.Variable(value, dtype=dtype, trainable=False, name=variable.name).value
    if keras.backend.backend() == "tensorflow":
        held._unique_id = optimizer._var_key(variable)  # by which the optimizer finds its states
    temporary_state.put(stack, variable, "_value", held)
    temporary_state.put(stack, variable, "_dtype", dtype)
    return value


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() == "jax":
        import jax

        if (platforms := jax.config.jax_platforms) and "cpu" not in platforms:  # such as JAX_PLATFORMS=cuda
            return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = keras.device("cpu")
    return context


def _in_scope() -> bool:
    """Returns whether the code runs in the scope of a distribution strategy, where no single update can be made."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow

    return bool(tensorflow.distribute.in_cross_replica_context())


class UpdateHistogram:
    """Number and sum of a variable's nonzero updates by octave, for each half-precision format. See `GradientRange`."""

    def __init__(self) -> None:
        self._counts = {precision: numpy.zeros(2 * _OFFSET, "int64") for precision in HALF}
        self._sums = {precision: numpy.zeros(2 * _OFFSET) for precision in HALF}

    def add(self, before: Any, after: Any) -> None:
        """Adds the updates between two float32 arrays: the differences in float32."""
        before, after = before.ravel(), after.ravel()
        for start in range(0, before.size, _CHUNK):
            old = before[start : start + _CHUNK]
            update = after[start : start + _CHUNK] - old
            sizes = numpy.abs(update)
            bits = sizes.view("int32")
            is_power, octaves = (bits & 0x7FFFFF) == 0, (bits >> 23) - 127
            if (tiny := bits < 0x800000).any():  # subnormal in float32, or 0
                fractions, exponents = numpy.frexp(sizes[tiny])
                is_power[tiny], octaves[tiny] = fractions == 0.5, exponents - 1
            known = (bits > 0) & (bits < 0x7F800000)
            for precision in HALF:
                spacing, is_held = _spacing(old, update < 0, is_power, precision)
                places = numpy.where(known & is_held, _OFFSET + octaves - spacing, 0)  # 0: a place that no update has
                self._counts[precision] += numpy.bincount(places, minlength=2 * _OFFSET)
                self._sums[precision] += numpy.bincount(places, sizes, minlength=2 * _OFFSET)

    def updates(self) -> Updates:
        """Returns the histograms for a record."""
        return {
            precision: {
                int(place) - _OFFSET: (int(counts[place]), float(self._sums[precision][place]))
                for place in numpy.flatnonzero(counts)
                if place
            }
            for precision, counts in self._counts.items()
        }


def _spacing(value: Any, is_down: Any, is_power: Any, precision: str) -> tuple[Any, Any]:
    """Returns exponents of the distance from each value, rounded to the format, to the next number, and finiteness.

    A tie, of an odd multiple of half the distance, returns to an even number. So there the exponent is 1 larger for
    updates that are powers of two, and they count as less than the tie.
    """
    info = ml_dtypes.finfo(precision)
    with numpy.errstate(over="ignore", invalid="ignore"):
        bits = value.astype(info.dtype).view("int16").astype("int32")
    exponent = (bits & 0x7FFF) >> info.nmant
    # Below a power of two the numbers are twice as close.
    halved = ((bits & (2**info.nmant - 1)) == 0) & (exponent > 1) & (is_down == (bits >= 0))
    is_even = (bits & 1) == 0
    spacing = numpy.maximum(exponent, 1) - 1 + info.minexp - info.nmant - halved + (is_even & is_power)
    return spacing, exponent < 2 * info.maxexp - 1
