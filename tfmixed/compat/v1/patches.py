"""Registry of the changes that `tfmixed.compat.v1` makes to TensorFlow. Each change belongs to an owner.

`undo(owner)` reverts the changes of one owner in reverse order. Owners may be undone in any order, even if they wrap
the same method.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from typing import Any

import tensorflow as tf

from tfmixed._utils.patching import do_not_convert

_is_wrapped_call = contextvars.ContextVar("is_wrapped_call", default=False)
_lock = threading.RLock()
_owners: dict[Hashable, contextlib.ExitStack] = {}
# Wrapped methods: the original, and the wrappers of each owner, innermost first.
_methods: dict[tuple[Any, str], tuple[Any, dict[Hashable, Callable[..., Any]]]] = {}


def is_active(owner: Hashable) -> bool:
    """Returns whether `owner` has changes that are not undone."""
    return owner in _owners


def undo(owner: Hashable) -> None:
    """Reverts all changes of `owner` in reverse order."""
    with _lock:
        if owner in _owners:
            _owners.pop(owner).close()


def on_undo(owner: Hashable, function: Callable[..., Any], *arguments: Any) -> None:
    """Registers a call that reverts a change made elsewhere."""
    with _lock:
        _owners.setdefault(owner, contextlib.ExitStack()).callback(function, *arguments)


def add_attribute(owner: Hashable, target: Any, name: str, value: Any) -> None:
    """Adds an attribute, unless `target` has one of that name."""
    if not hasattr(target, name):
        setattr(target, name, value)
        on_undo(owner, _remove_attribute, target, name, value)


def set_item(owner: Hashable, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    """Sets an entry of a dictionary."""
    before = {key: mapping[key]} if key in mapping else {}
    mapping[key] = value
    on_undo(owner, _restore_item, mapping, key, value, before)


def wrap(owner: Hashable, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Calls `wrapper(original, *args, **kwargs)` instead of a method or function.

    Wrappers of several owners are nested, the latest outermost.
    """
    with _lock:
        if (target, name) not in _methods:
            original, wrappers = vars(target)[name], dict[Hashable, Callable[..., Any]]()
            _methods[target, name] = original, wrappers
            setattr(target, name, _wrapped(original, wrappers))
        _methods[target, name][1][owner] = wrapper
        on_undo(owner, _unwrap, owner, target, name)


def _wrapped(original: Callable[..., Any], wrappers: dict[Hashable, Callable[..., Any]]) -> Callable[..., Any]:
    @do_not_convert
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        function = original
        for wrapper in list(wrappers.values()):
            function = functools.partial(wrapper, function)
        return function(*args, **kwargs)

    return method


def _unwrap(owner: Hashable, target: Any, name: str) -> None:
    original, wrappers = _methods[target, name]
    del wrappers[owner]
    if not wrappers:
        del _methods[target, name]
        setattr(target, name, original)


def _remove_attribute(target: Any, name: str, value: Any) -> None:
    if getattr(target, name, None) is value:
        delattr(target, name)


def _restore_item(mapping: MutableMapping[Any, Any], key: Any, value: Any, before: Mapping[Any, Any]) -> None:
    if mapping.get(key) is value:  # otherwise someone else has replaced it
        del mapping[key]
        mapping.update(before)


def is_wrapped_call() -> bool:
    """Returns whether a `LossScaleOptimizer` is calling the optimizer that it wraps, in this thread."""
    return _is_wrapped_call.get()


@contextlib.contextmanager
def wrapped_call() -> Iterator[None]:
    """Context in which optimizers are called as wrapped ones, in this thread."""
    token = _is_wrapped_call.set(True)
    try:
        yield
    finally:
        _is_wrapped_call.reset(token)


@contextlib.contextmanager
def intercept_compute_gradients(around: Callable[..., Any]) -> Iterator[list[Any]]:
    """Context in which TensorFlow's `Optimizer.compute_gradients` goes through `around`, in this thread.

    Yields:
        The list of optimizers whose calls went through it.
    """
    owner, thread, calls, nested = object(), threading.get_ident(), list[Any](), list[Any]()

    def wrapper(plain: Callable[..., Any], optimizer: Any, /, *args: Any, **kwargs: Any) -> Any:
        if nested or threading.get_ident() != thread:
            return plain(optimizer, *args, **kwargs)
        calls.append(optimizer)
        nested.append(optimizer)
        try:
            return around(functools.partial(plain, optimizer), *args, **kwargs)
        finally:
            nested.clear()

    wrap(owner, tf.compat.v1.train.Optimizer, "compute_gradients", wrapper)
    try:
        yield calls
    finally:
        undo(owner)
