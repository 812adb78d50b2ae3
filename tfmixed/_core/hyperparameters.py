"""Hyperparameters and arguments of an optimizer that wraps another one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import keras

from tfmixed._core import gradients, replica_sync
from tfmixed._utils import temporary_state

# Set by the constructor of Keras's base optimizer, and meant for the inner one.
HYPERPARAMETERS = (
    *("weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "gradient_accumulation_steps"),
    *("use_ema", "ema_momentum", "ema_overwrite_frequency"),
)


class DelegatedHyperparameters:
    """Mixin for an optimizer that wraps another one.

    Attributes that the wrapper does not have are read from the inner optimizer and set on it: hyperparameters of
    Keras's base class, and attributes of the inner optimizer's own class, such as `beta_1` and `optimizers`. A subclass
    calls `_delegate` at the end of its constructor.
    """

    inner_optimizer: Any
    # Set by the constructor, and part of the variables that it creates.
    _FIXED: tuple[str, ...] = ()
    _delegates = False

    assign = property(attrgetter("inner_optimizer.assign"))
    assign_add = property(attrgetter("inner_optimizer.assign_add"))
    assign_sub = property(attrgetter("inner_optimizer.assign_sub"))
    exclude_from_weight_decay = property(attrgetter("inner_optimizer.exclude_from_weight_decay"))
    update_step = property(attrgetter("inner_optimizer.update_step"))

    def _delegate(self) -> None:
        """Starts to delegate, and removes the hyperparameters that the base class has set on the wrapper."""
        for name in HYPERPARAMETERS:
            vars(self).pop(name, None)
        self._delegates = True

    def __getattr__(self, name: str) -> Any:
        if self._delegates and not name.startswith("_"):
            return getattr(self.inner_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if self._delegates and name in self._FIXED:
            raise AttributeError(
                f"`{name}` cannot be changed after construction. Create another {type(self).__name__}. "
                f"Received: {name}={value!r}"
            )
        is_own = not self._delegates or name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if is_own or not hasattr(self.inner_optimizer, name):
            super().__setattr__(name, value)
        else:
            setattr(self.inner_optimizer, name, value)

    def __dir__(self) -> list[str]:
        inner = (name for name in dir(self.inner_optimizer) if not name.startswith("_"))
        return sorted({*super().__dir__(), *inner})

    def _build_base(self, variables: Sequence[Any]) -> None:
        """Builds what Keras's base class needs, without a second set of variables for averages and accumulation."""
        with contextlib.ExitStack() as stack:
            for name in ("use_ema", "gradient_accumulation_steps"):
                temporary_state.put(stack, self, name, None)
            keras.optimizers.Optimizer.build(self, variables)

    def _variables_of(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None) -> list[Any]:
        """Returns the variables of gradients. Builds the optimizer with them if it is not built."""
        check_any(grads)
        if not self.built:
            if trainable_variables is None:
                raise ValueError(
                    "`trainable_variables` is required for an optimizer that is not built. Pass the variables, or call "
                    "`optimizer.build(trainable_variables)` first. Received: trainable_variables=None"
                )
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        replica_sync.check_supported(self.inner_optimizer)
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must have one gradient for each variable. "
                f"Received: {len(grads)} gradients, {len(variables)} variables"
            )
        return variables

    def _indices(self, variables: Sequence[Any]) -> list[int]:
        try:
            return [self._get_variable_index(variable) for variable in variables]
        except KeyError:
            known = ", ".join(gradients.path(variable) for variable in self._trainable_variables)
            names = ", ".join(gradients.path(variable) for variable in variables)
            raise ValueError(
                f"`trainable_variables` must be among those that the optimizer was built with: {known}. "
                f"Received: {names}"
            ) from None

    @property
    def loss_scale_factor(self) -> None:
        """None. Keras's factor scales without a finite check; the loss is multiplied by `loss_scale`."""

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: float | None) -> None:
        if value is not None:
            raise ValueError(
                "`loss_scale_factor` cannot be set on an optimizer that wraps another one. Pass `scale` to a "
                f"`LossScaleOptimizer`, or set its `loss_scale`. Received: loss_scale_factor={value}"
            )

    @property
    def iterations(self) -> Any:
        """Number of applied steps: the inner optimizer's count.

        Assigning a number sets it. Assigning a variable makes that variable count the steps, as in Keras 2; this must
        be done before the optimizer is built.
        """
        return self.inner_optimizer.iterations

    @iterations.setter
    def iterations(self, value: Any) -> None:
        inner, counter = self.inner_optimizer, value
        if hasattr(value, "assign_add"):
            if self.built:
                raise RuntimeError(
                    "`iterations` cannot become another variable once the optimizer is built. Assign a number, or "
                    f"assign the variable before the first step. Received: iterations={value!r}"
                )
            counter = value if isinstance(value, keras.Variable) else _wrapped(value)
            inner._tracker.replace_tracked_value("variables", inner._iterations, counter)
            inner._iterations = counter
        for part in (inner, *getattr(inner, "optimizers", ())):
            if part._iterations is not counter:
                part._iterations.assign(value * (part.gradient_accumulation_steps or 1))


def check_any(grads: Sequence[Any]) -> None:
    """Checks that there is a gradient."""
    if all(gradient is None for gradient in grads):
        raise ValueError(
            "`grads` must have at least one gradient. The loss does not depend on any of the trainable variables. "
            f"Received: {len(grads)} times None"
        )


def _wrapped(variable: Any) -> keras.Variable:
    """Returns a Keras variable that reads and writes a `tf.Variable`."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    wrapped = keras.Variable(0, dtype=dtype, trainable=False, aggregation="only_first_replica", name="iteration")
    wrapped._value = variable
    return wrapped
