"""Fused update: unscaling and the inner optimizer's step, compiled by XLA into one function. TensorFlow only.

Keras's optimizers run a dozen operations for each variable, and all of them read and write memory. For Adam, XLA makes
three passes of them, and unscaling is part of the first two. Only the part of a step that is skipped on overflow is
compiled, since a condition in the function would make XLA copy all variables.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import keras

from tfmixed._core import control_flow, gradients
from tfmixed._core.inner_optimizer import ADAMS, branches, is_known, python_state, reads_scalars, scalars_read_once
from tfmixed._utils import user_warnings

_LOG = logging.getLogger("tfmixed")
# Elements of a variable from which XLA's kernels are faster than TensorFlow's and worth compiling, measured by
# `python benchmarks/growth.py`.
WORTH_COMPILING = 2**16
_MOST_FUNCTIONS = 16


@dataclass(frozen=True)
class Fusion:
    """Tells whether the update is compiled into one function, and why. True as a bool if it is."""

    active: bool
    reason: str

    def __bool__(self) -> bool:
        return self.active

    def __str__(self) -> str:
        return f"{'fused' if self.active else 'not fused'}: {self.reason}"


# Unscales gradients by a scale and applies them to their variables.
Update = Callable[[Sequence[Any], Sequence[Any], Any], None]
# The same for variables that are fixed.
Step = Callable[[Sequence[Any], Any], None]


class Call(NamedTuple):
    """A call of an update, without its gradients, which differ between replicas.

    `indices` are those of the variables in the optimizer. `dtypes` are those of the gradients, None if there is none.
    """

    update: Update
    inner: Any
    variables: Sequence[Any]
    indices: Sequence[int]
    dtypes: Sequence[Any]
    has_sparse: bool

    def at(self, places: Sequence[int]) -> Call:
        """Returns the call with only the variables at these places."""
        variables, indices, dtypes = ([values[place] for place in places] for values in self[2:5])
        return self._replace(variables=variables, indices=indices, dtypes=dtypes)


def check_fuse(fuse: Any) -> bool | Literal["auto"]:
    """Returns the argument `fuse` of an optimizer; a `ValueError` is raised for unknown values."""
    if fuse != "auto" and not isinstance(fuse, bool):
        raise ValueError(f'`fuse` must be "auto", True or False. Received: fuse={fuse!r}')
    return fuse


class Fuser:
    """Compiles the update of one optimizer, once for each set of variables.

    Args:
        fuse: `"auto"`, True or False; see `LossScaleOptimizer`.
    """

    def __init__(self, fuse: bool | Literal["auto"]) -> None:
        self.fuse = check_fuse(fuse)
        self.fusion = Fusion(False, "no step was taken yet")
        # Compiled functions by the Python state that they read, with its objects, whose ids are part of the key.
        self._functions: dict[Any, tuple[tuple[Any, str | None], list[Any]]] = {}

    def step(
        self, inner: Any, variables: Sequence[Any], indices: Sequence[int], grads: Sequence[Any], largest: float
    ) -> Step:
        """Returns the function of gradients and their scale that updates variables, compiled where that is faster.

        Args:
            inner: Keras optimizer of unscaled gradients.
            variables: Variables.
            indices: Their indices in the optimizer, or other numbers that tell them apart.
            grads: Gradients of one replica, one for each variable.
            largest: Largest value that the scale can take.
        """
        if hasattr(inner, "apply_scaled"):  # compiles its update itself
            return lambda grads, scale: inner.apply_scaled(grads, variables, scale, largest)

        def update(grads: Sequence[Any], variables: Sequence[Any], scale: Any) -> None:
            unscaled = gradients.unscale_all(grads, gradients.raw(variables), scale, largest)
            inner.apply(unscaled, list(variables))

        dtypes = [None if gradient is None else gradient.dtype for gradient in grads]
        has_sparse = any(map(gradients.is_sparse, grads))
        return self._step_for(Call(update, inner, variables, indices, dtypes, has_sparse))

    def _step_for(self, call: Call) -> Step:
        update, inner, variables, dtypes = call.update, call.inner, call.variables, call.dtypes
        refused = "fuse=False" if self.fuse is False else _other_backend()
        places = [] if refused else self._places(inner, variables)
        large = [place for place in places if dtypes[place] is not None]
        reason = obstacle(call) if large else refused or _too_small(variables)
        if reason:
            self._decided(reason)
            return _plain(call)
        # Variables without a gradient go where others have one, since an optimizer raises if it gets no gradient.
        small = [place for place in range(len(variables)) if place not in places and dtypes[place] is not None]
        missing = [place for place, dtype in enumerate(dtypes) if dtype is None]
        large, small = (large, small + missing) if small else (large + missing, small)
        function, refusal = self._compiled(call.at(large))
        self._decided(refusal, f"{len(large)} of {len(variables)} variables, the large ones")

        def step(grads: Sequence[Any], scale: Any) -> None:
            if small:
                with scalars_read_once(inner, variables, counts=False):
                    update([grads[place] for place in small], [variables[place] for place in small], scale)
            function(scale, *(grads[place] for place in large if dtypes[place] is not None))

        return _plain(call) if refusal else step

    def _compiled(self, call: Call) -> tuple[Any, str | None]:
        # A function keeps the Python values that it reads. Those of Keras's own optimizers are part of the key. Those
        # of a user's own code are not known, so it is compiled again with each trace.
        if not is_known(call.inner, call.variables):
            return _compile(call)
        missing = tuple(dtype is None for dtype in call.dtypes)
        state, held = python_state(call.inner)
        key = tuple(zip(call.indices, missing, strict=True)), state
        known = self._functions.pop(key, None)
        self._functions[key] = known or (_compile(call), held)
        if len(self._functions) > _MOST_FUNCTIONS:
            del self._functions[next(iter(self._functions))]  # the least recently used
        return self._functions[key][0]

    def _places(self, inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> list[int]:
        """Returns the places of variables worth compiling: the large ones, or all if they depend on each other."""
        sizes = [math.prod(variable.shape) for variable in variables]
        all_places = list(range(len(sizes)))
        if self.fuse is True:
            return all_places
        if reads_scalars(inner, variables) and not inner.use_ema and inner.global_clipnorm is None:
            return [place for place in all_places if sizes[place] >= WORTH_COMPILING]
        return all_places if sum(sizes) >= WORTH_COMPILING * len(sizes) else []

    def _decided(self, obstacle: str | None, gain: str = "") -> None:
        fusion = Fusion(obstacle is None, obstacle or gain)
        if fusion != self.fusion:
            _LOG.debug("update %s", fusion)
            if self.fuse is True and obstacle:
                user_warnings.warn(f"`fuse=True` has no effect: {obstacle}")
        self.fusion = fusion


def _plain(call: Call) -> Step:
    def plain(grads: Sequence[Any], scale: Any) -> None:
        with scalars_read_once(call.inner, call.variables):
            call.update(grads, call.variables, scale)

    return plain


def _other_backend() -> str | None:
    backend = keras.backend.backend()
    return None if backend == "tensorflow" else f"fused updates need the TensorFlow backend, and this is {backend}"


def _too_small(variables: Sequence[Any]) -> str:
    largest = max(math.prod(variable.shape) for variable in variables)
    return f"XLA is not faster on variables this small, the largest with {largest:,} elements"


def _compile(call: Call) -> tuple[Any, str | None]:
    """Returns a compiled function of the scale and all gradients, and the reason if XLA cannot compile it."""
    import tensorflow as tf

    update, variables, dtypes = call.update, call.variables, call.dtypes
    places = [place for place, dtype in enumerate(dtypes) if dtype is not None]

    def dense(scale: Any, *values: Any) -> None:
        by_place = dict(zip(places, values, strict=True))
        update([by_place.get(place) for place in range(len(variables))], variables, scale)

    function = tf.function(dense, jit_compile=True, autograph=False)
    # Keras's own code can be compiled, as the tests show. A user's own code is tried first.
    if is_known(call.inner, variables):
        return function, None
    specs = [tf.TensorSpec(variables[place].shape, dtypes[place]) for place in places]
    try:
        with tf.init_scope():
            function.experimental_get_compiler_ir(tf.TensorSpec((), tf.float32), *specs)(stage="hlo")
    except Exception as error:  # a user's own code may raise anything while it is traced
        return function, f"XLA cannot compile it: {_first_line(error)}"
    return function, None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def obstacle(call: Call) -> str | None:
    """Returns the reason why XLA cannot compile an update, or should not. None if it can."""
    if reason := _other_backend():
        return reason
    import tensorflow as tf

    inner, variables = call.inner, call.variables
    if not control_flow.is_single_tensorflow():
        return f"{type(tf.distribute.get_strategy()).__name__} updates variables in ways that XLA cannot compile"
    if control_flow.in_xla():
        return "the whole step is compiled already"
    if type(inner) not in ADAMS and call.has_sparse:
        return "a gradient is sparse (tf.IndexedSlices), and XLA would make it dense"
    if tf.executing_eagerly() and not is_known(inner, variables):
        return "a user's own code may read Python values that change between eager steps"
    if branches(inner):
        return "the inner optimizer branches to accumulate or average, and XLA copies what a branch writes"
    devices = control_flow.devices((*variables, *inner.variables))
    if len(devices) > 1:
        return f"the variables are on several devices: {', '.join(sorted(devices))}"
    return no_xla()


@functools.cache
def no_xla() -> str | None:
    """Returns the reason why XLA does not work, such as missing parts of CUDA on a GPU. None if it works."""
    import tensorflow as tf

    try:
        with tf.init_scope():
            tf.function(lambda x: x + x, jit_compile=True, autograph=False)(tf.constant(1.0))
    except tf.errors.OpError as error:
        return f"XLA does not work here: {_first_line(error)}"
    return None
