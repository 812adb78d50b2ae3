"""The fused update: unscaling and the inner optimizer's step, compiled by XLA into one function. TensorFlow's alone.

Keras's optimizers are a dozen operations a variable, each of which reads and writes memory. XLA makes three passes of
them for Adam, and unscaling is part of the first two. Compiled is just what a step does that is applied: a condition
within makes XLA copy all variables.
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
# Elements of a variable from which XLA's kernels are faster than TensorFlow's and worth compiling:
# `python benchmarks/growth.py` shows where they part.
_WORTH_COMPILING = 2**16
_MOST_FUNCTIONS = 16


@dataclass(frozen=True)
class Fusion:
    """Whether the update is compiled into one function, and why. As a bool: whether it is."""

    active: bool
    reason: str

    def __bool__(self) -> bool:
        return self.active

    def __str__(self) -> str:
        return f"{'fused' if self.active else 'not fused'}: {self.reason}"


# Unscales gradients by a scale and applies them to their variables.
Update = Callable[[Sequence[Any], Sequence[Any], Any], None]
# The same for variables that are settled.
Step = Callable[[Sequence[Any], Any], None]


class Call(NamedTuple):
    """A call of an update, before it is made.

    Args:
        update: What is called.
        inner: The optimizer that `update` calls.
        grads: Gradients as it will get them.
        variables: Theirs.
        indices: The variables' indices in the optimizer.
    """

    update: Update
    inner: Any
    grads: Sequence[Any]
    variables: Sequence[Any]
    indices: Sequence[int]

    def at(self, places: Sequence[int]) -> Call:
        """Returns the call with these of its gradients and variables alone."""
        return Call(self.update, self.inner, *([each[place] for place in places] for each in self[2:]))


class Fuser:
    """Compiles the update of one optimizer, each set of variables once.

    Args:
        fuse: `"auto"`, True or False; see `LossScaleOptimizer`.
    """

    def __init__(self, fuse: bool | Literal["auto"]) -> None:
        if fuse != "auto" and not isinstance(fuse, bool):
            raise ValueError(f'fuse must be "auto", True or False, received {fuse!r}')
        self.fuse = fuse
        self.fusion = Fusion(False, "no step was taken yet")
        # What is compiled, by what it read of Python, with the objects that it read: their ids stand in the key.
        self._functions: dict[Any, tuple[tuple[Any, str | None], list[Any]]] = {}

    def fused(self, call: Call) -> Step:
        """Returns the update of a call's variables, compiled as far as that is possible and faster."""
        update, inner, grads, variables, _ = call
        places = [] if self.fuse is False else self._places(inner, variables)
        large = [place for place in places if grads[place] is not None]
        obstacle = _obstacle(call) if large else self._why_none(variables)
        if obstacle:
            self._decided(obstacle)
            return _plain(call)
        # Variables without a gradient go where others have one: an optimizer that is given none raises.
        small = [place for place in range(len(variables)) if place not in places and grads[place] is not None]
        missing = [place for place, each in enumerate(grads) if each is None]
        large, small = (large, small + missing) if small else (large + missing, small)
        function, refusal = self._compiled(call.at(large))
        self._decided(refusal, f"{len(large)} of {len(variables)} variables, the large ones")

        def fused(grads: Sequence[Any], scale: Any) -> None:
            if small:
                with scalars_read_once(inner, variables, counts=False):
                    update([grads[place] for place in small], [variables[place] for place in small], scale)
            function(scale, *(grads[place] for place in large if grads[place] is not None))

        return _plain(call) if refusal else fused

    def _compiled(self, call: Call) -> tuple[Any, str | None]:
        # A function keeps what it reads of Python. What Keras's own optimizers hold is part of the key; what a user's
        # own reads is not known: compiled again with each trace.
        if not is_known(call.inner, call.variables):
            return _compile(call)
        missing = tuple(each is None for each in call.grads)
        state, held = python_state(call.inner)
        key = tuple(zip(call.indices, missing, strict=True)), state
        known = self._functions.pop(key, None)
        self._functions[key] = known or (_compile(call), held)
        if len(self._functions) > _MOST_FUNCTIONS:
            del self._functions[next(iter(self._functions))]  # the one that was not used for the longest time
        return self._functions[key][0]

    def _places(self, inner: keras.optimizers.Optimizer, variables: Sequence[Any]) -> list[int]:
        """Returns which variables are worth compiling: the large ones, or all where they depend on each other."""
        sizes = [math.prod(variable.shape) for variable in variables]
        everything = list(range(len(sizes)))
        if self.fuse is True:
            return everything
        if reads_scalars(inner, variables) and not inner.use_ema and inner.global_clipnorm is None:
            return [place for place in everything if sizes[place] >= _WORTH_COMPILING]
        return everything if sum(sizes) >= _WORTH_COMPILING * len(sizes) else []

    def _why_none(self, variables: Sequence[Any]) -> str:
        if self.fuse is False:
            return "fuse=False"
        largest = max(math.prod(variable.shape) for variable in variables)
        return f"XLA gains nothing on variables this small, the largest of {largest:,} elements"

    def _decided(self, obstacle: str | None, gain: str = "") -> None:
        fusion = Fusion(obstacle is None, obstacle or gain)
        if fusion != self.fusion:
            _LOG.debug("update %s", fusion)
            if self.fuse is True and obstacle:
                user_warnings.warn(f"fuse=True has no effect: {obstacle}")
        self.fusion = fusion


def _plain(call: Call) -> Step:
    def plain(grads: Sequence[Any], scale: Any) -> None:
        with scalars_read_once(call.inner, call.variables):
            call.update(grads, call.variables, scale)

    return plain


def _compile(call: Call) -> tuple[Any, str | None]:
    """Returns a compiled function of the scale and all gradients, and why XLA cannot compile it: None if it can."""
    import tensorflow as tf

    update, inner, grads, variables, _ = call
    places = [place for place, each in enumerate(grads) if each is not None]
    count = len(grads)  # a function that knew the gradients would keep them alive

    def dense(scale: Any, *values: Any) -> None:
        by_place = dict(zip(places, values, strict=True))
        update([by_place.get(place) for place in range(count)], variables, scale)

    function = tf.function(dense, jit_compile=True, autograph=False)
    # Keras's own code can be compiled, as the tests show; a user's may hold anything, and is asked beforehand.
    if is_known(inner, variables):
        return function, None
    specs = [tf.TensorSpec(variables[place].shape, grads[place].dtype) for place in places]
    try:
        with tf.init_scope():
            function.experimental_get_compiler_ir(tf.TensorSpec((), tf.float32), *specs)(stage="hlo")
    except Exception as error:  # whatever it may raise while it is traced
        return function, f"XLA cannot compile it: {_first_line(error)}"
    return function, None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _obstacle(call: Call) -> str | None:
    """Returns why XLA cannot compile an update, or should not; None if it can."""
    _, inner, grads, variables, _ = call
    backend = keras.backend.backend()
    if backend != "tensorflow":
        return f"the update is fused on TensorFlow only, and the backend is {backend}"
    import tensorflow as tf

    if not control_flow.is_single_tensorflow():
        return f"{type(tf.distribute.get_strategy()).__name__} updates variables in ways that XLA cannot compile"
    if control_flow.in_xla():
        return "the whole step is compiled already"
    if type(inner) not in ADAMS and any(map(gradients.is_sparse, grads)):
        return "a gradient is sparse (tf.IndexedSlices), and XLA would make all of it dense"
    if tf.executing_eagerly() and not is_known(inner, variables):
        return "what a user's own code reads of Python may change between eager steps"
    if branches(inner):
        return "the inner optimizer accumulates or averages by branching, and XLA copies what a branch writes"
    devices = control_flow.devices((*variables, *inner.variables))
    if len(devices) > 1:
        return f"the variables are on several devices: {', '.join(sorted(devices))}"
    return _no_xla()


@functools.cache
def _no_xla() -> str | None:
    """Returns why XLA does not work here; None if it does. On GPUs it needs parts of CUDA that are often missing."""
    import tensorflow as tf

    try:
        with tf.init_scope():
            tf.function(lambda x: x + x, jit_compile=True, autograph=False)(tf.constant(1.0))
    except tf.errors.OpError as error:
        return f"XLA does not work here: {_first_line(error)}"
    return None
