"""Optimizers with a `compute_gradients` or `minimize` of their own: scaled are the calls that these make."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfmixed._utils import temporary_state

Optimizer = tf.compat.v1.train.Optimizer
_lock = threading.Lock()
_local = threading.local()


class _Replaced:
    """TensorFlow's method, while at least one thread has it replaced."""

    threads = 0
    plain: Callable[..., Any] = Optimizer.compute_gradients


def has_own(opt: Any) -> bool:
    """Returns whether an optimizer may do something to its gradients before anybody else sees them."""
    return type(opt).compute_gradients is not Optimizer.compute_gradients


@contextlib.contextmanager
def going_through(around: Callable[..., Any]) -> Iterator[list[Any]]:
    """Lets TensorFlow's `Optimizer.compute_gradients`, whoever calls it in this thread, go through `around`.

    Clipping in the method that calls it then gets what `around` returns, and not gradients of a scaled loss.

    Args:
        around: Takes TensorFlow's method, bound, and its arguments.

    Yields:
        A list that has an element for each call, in the end.
    """
    before, calls = getattr(_local, "present", None), list[Any]()
    _local.present = around, calls
    with _lock:
        if not _Replaced.threads:
            _Replaced.plain, Optimizer.compute_gradients = Optimizer.compute_gradients, _method
        _Replaced.threads += 1
    try:
        yield calls
    finally:
        _local.present = before
        with _lock:
            _Replaced.threads -= 1
            if not _Replaced.threads:
                Optimizer.compute_gradients = _Replaced.plain


def _method(self: Any, *arguments: Any, **named: Any) -> Any:
    plain, present = functools.partial(_Replaced.plain, self), getattr(_local, "present", None)
    if present is None:
        return plain(*arguments, **named)
    around, calls = present
    calls.append(self)
    _local.present = None  # a call within this one belongs to it
    try:
        return around(plain, *arguments, **named)
    finally:
        _local.present = present


@contextlib.contextmanager
def taking(opt: Any, *methods: Callable[..., Any]) -> Iterator[set[str]]:
    """Lets what an optimizer calls of itself by the names of these methods be them.

    Yields:
        The names of those that were called, in the end.
    """
    calls = set[str]()

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.add(method.__name__)
            return method(*arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for method in methods:
            temporary_state.put(stack, opt, method.__name__, noted(method))
        yield calls
