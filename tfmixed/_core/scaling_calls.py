"""Explicit scaling calls of a training loop, which decide whether the gradients given to `apply` are scaled."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from tfmixed._core.control_flow import current_graph
from tfmixed._utils import user_warnings

# Gradients after the last call: of `scale_loss`, of `get_unscaled_gradients`, or of `get_scaled_loss`, which
# `get_unscaled_gradients` may unscale in another function.
State = Literal["scaled", "unscaled", "loss scaled"]

_NEVER_SCALED = (
    "apply was given gradients of a loss that was never scaled. It divides them by the loss scale, as in Keras 3, but "
    "this loop called neither scale_loss nor get_scaled_loss of this optimizer. Differentiate scale_loss(loss)."
)
_NEVER_SCALED_KERAS2 = (
    "get_unscaled_gradients was called for a loss that was never scaled. It divides gradients by the loss scale, but "
    "this loop called neither scale_loss nor get_scaled_loss of this optimizer. Differentiate get_scaled_loss(loss)."
)
_UNKNOWN = (
    "apply cannot know whether its gradients are scaled: scale_loss and get_unscaled_gradients of this optimizer were "
    "both called, at least one of them in another compiled function than apply. Compile that call and apply in one "
    "function, or use one of the two styles only."
)


class TensorSet:
    """Set of tensors by identity that keeps none of them alive.

    Args:
        tensors: Initial tensors. `None` and objects without weak references, such as numbers, are ignored.
    """

    def __init__(self, tensors: Iterable[Any] = ()) -> None:
        self._tensors: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.add(tensors)

    def add(self, tensors: Iterable[Any]) -> None:
        """Adds tensors."""
        for tensor in tensors:
            if tensor is not None:
                with contextlib.suppress(TypeError):
                    self._tensors[id(tensor)] = tensor

    def __contains__(self, tensor: Any) -> bool:
        return tensor is not None and self._tensors.get(id(tensor)) is tensor


class ScalingCalls:
    """Scaling calls of one optimizer, by the eager code or compiled function that makes them.

    The last call in the function of `apply` decides. If that function makes no call, calls in other functions decide.
    It is an error if a compiled function that leaves `apply` to another one says the opposite, since Python does not
    see the order in which compiled functions run.

    Args:
        scales: False for a scale that is always 1, with which every order of calls is right.
    """

    warn: Callable[[str], None] = staticmethod(user_warnings.warn)
    """Function that reports a loss that was never scaled."""

    def __init__(self, scales: bool) -> None:
        self._scales = scales
        self._eager: State | None = None
        self._traced: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self._applying: weakref.WeakSet[Any] = weakref.WeakSet()  # traced functions that call apply
        self._relied_on: set[State] = set()  # states that traced functions without a call of their own rely on
        self._has_scaled = False
        self._losses, self._given, self._returned = TensorSet(), TensorSet(), TensorSet()
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return ScalingCalls, (self._scales,)

    def scale(self, state: State, losses: Iterable[Any], scaled: Iterable[Any] = ()) -> None:
        """Records a call that scales `losses` to `scaled`, and checks that they are not scaled already."""
        if self.has_scaled(losses):
            raise RuntimeError(
                "The loss is scaled already, and its gradients would be too large by the loss scale. Call one of "
                "scale_loss and get_scaled_loss, once."
            )
        self._losses.add(scaled)
        self._has_scaled = True
        self._record(state)

    def has_scaled(self, losses: Iterable[Any]) -> bool:
        """Returns whether one of these losses was scaled."""
        return self._scales and any(loss in self._losses for loss in losses)

    def unscale(self, grads: Sequence[Any], unscaled: Iterable[Any]) -> None:
        """Records a call that unscales `grads` to `unscaled`, and checks that they are not unscaled already."""
        if self._scales and any(gradient in self._returned for gradient in grads):
            raise RuntimeError("`grads` must not be unscaled already. Call `get_unscaled_gradients` once per step.")
        if not self._has_scaled:
            self._warn(_NEVER_SCALED_KERAS2)
        self._given.add(grads)
        self._returned.add(unscaled)
        self._record("unscaled")

    def end_fit(self) -> None:
        """Forgets the eager calls of `fit`, so that a custom loop after it makes its own."""
        self._eager = None

    def are_unscaled(self, grads: Sequence[Any]) -> bool:
        """Returns whether the gradients given to `apply` are unscaled, and raises an error if that cannot be known.

        Gradients that `get_unscaled_gradients` received or returned are known by identity.
        """
        graph = current_graph()
        if graph is not None:
            self._applying.add(graph)
        if not self._scales:
            return False
        returned, given = (any(gradient in tensors for gradient in grads) for tensors in (self._returned, self._given))
        if returned and given:
            raise RuntimeError(
                "`grads` must be all scaled or all unscaled. Pass all results of `get_unscaled_gradients`, or none of "
                "them. Received: a mixture."
            )
        return returned if returned or given else self._last_call(graph) == "unscaled"

    def _last_call(self, graph: Any) -> State | None:
        own = self._eager if graph is None else self._traced.get(graph)
        states = {state for function, state in self._traced.items() if function not in self._applying}
        if (nearest := own or self._eager) is not None:
            states.add(nearest)
        if {"scaled", "unscaled"} <= states:
            raise RuntimeError(_UNKNOWN)
        if not states:
            self._warn(_NEVER_SCALED)
            return None
        state: State = "unscaled" if "unscaled" in states else "scaled"
        if graph is not None and own is None:
            self._relied_on.add(state)
        return state

    def _record(self, state: State) -> None:
        graph = current_graph()
        if graph is None:
            self._eager = state
        else:
            self._traced[graph] = state
        if self._scales and {"scaled": "unscaled", "unscaled": "scaled"}.get(state) in self._relied_on:
            raise RuntimeError(_UNKNOWN)

    def _warn(self, message: str) -> None:
        if self._scales and message not in self._warned:
            self._warned.add(message)
            self.warn(message)
