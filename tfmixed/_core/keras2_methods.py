"""Keras 2-compatible names of a `LossScaleOptimizer`, among them `get_scaled_loss` and `get_unscaled_gradients`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
from keras import ops

from tfmixed._core import gradients
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._core.scaling_calls import ScalingCalls
from tfmixed._utils.patching import do_not_convert
from tfmixed.scaling import ConstantScale


class Keras2Methods(ScalerBase):
    """Mixin with what Keras 2's `LossScaleOptimizer` had and Keras 3's does not."""

    _calls: ScalingCalls
    iterations: Any
    learning_rate: Any
    step_counter: Any
    apply: Callable[..., None]
    scale_loss: Callable[[Any], Any]

    @property
    def dynamic_counter(self) -> keras.Variable | None:
        """The same as `step_counter`, by its Keras 2 name."""
        return self.step_counter

    @property
    def dynamic(self) -> bool:
        """True if the scale can change. Keras 2's name."""
        return not isinstance(self.rule, ConstantScale)

    @property
    def lr(self) -> Any:
        """The learning rate, by its Keras 2 name."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    @do_not_convert
    def get_scaled_loss(self, loss: Any) -> Any:
        """Returns `loss` times the scale, in float32 at least, for a loop in the style of Keras 2.

        Args:
            loss: A number, a tensor, or a callable that returns one, for which a callable is returned. Or a nested
                structure of these.

        Example:
        >>> optimizer = tfmixed.LossScaleOptimizer("sgd", 1024)
        >>> float(optimizer.get_scaled_loss(2.0)), float(optimizer.get_scaled_loss(lambda: 2.0)())
        (2048.0, 2048.0)
        """
        scaled = keras.tree.map_structure(self._scaled, loss)
        self._calls.scale("loss scaled", keras.tree.flatten(loss), keras.tree.flatten(scaled))
        return scaled

    def _scaled(self, loss: Any) -> Any:
        return (lambda: self._scaled(loss())) if callable(loss) else ops.multiply(loss, self.loss_scale)

    @do_not_convert
    def get_unscaled_gradients(self, grads: Any) -> Any:
        """Returns `grads` divided by the scale, in float32 at least, for a loop in the style of Keras 2.

        `apply` then takes its gradients as unscaled, clipped or not, unless they are the very tensors given here. It
        checks what it is given: clip by a norm in between and not by value, which would hide an overflow.

        Args:
            grads: A list, or another nested structure, of tensors, `tf.IndexedSlices` and None. Or an iterator.

        Example:
        >>> optimizer = tfmixed.LossScaleOptimizer("sgd", 1024)
        >>> loss = optimizer.get_scaled_loss(2.0)
        >>> gradient, missing = optimizer.get_unscaled_gradients([ops.array(512.0), None])
        >>> float(gradient), missing
        (0.5, None)
        """
        grads = list(grads) if isinstance(grads, Iterator) else grads
        unscale = partial(gradients.unscale, scale=self.loss_scale, largest=self.rule.bounds[1])
        unscaled = keras.tree.map_structure(unscale, grads)
        self._calls.unscale(keras.tree.flatten(grads), keras.tree.flatten(unscaled))
        return unscaled

    def minimize(self, loss: Any, var_list: Any, tape: Any = None) -> Any:
        """Differentiates a loss, applies the gradients, and returns `iterations`. TensorFlow only.

        Args:
            loss: A callable that returns the loss, or a tensor that `tape` has recorded.
            var_list: The variables, or a callable that returns them.
            tape: The `tf.GradientTape` of a tensor, which no longer records. Defaults to None.

        Raises:
            ValueError: If `loss` is a tensor and `tape` is None.
            NotImplementedError: If the Keras backend is not TensorFlow.

        Example:
        >>> optimizer, weight = tfmixed.LossScaleOptimizer(keras.optimizers.SGD(0.5), 1024), keras.Variable(3.0)
        >>> int(optimizer.minimize(lambda: weight**2, [weight])), float(weight.value)
        (1, 0.0)
        """
        if keras.backend.backend() != "tensorflow":
            raise NotImplementedError(
                "`minimize` needs the TensorFlow backend, whose tape differentiates the loss. Scale the loss with "
                f"`scale_loss` and call `apply`. Received: backend={keras.backend.backend()}"
            )
        if tape is None and not callable(loss):
            raise ValueError(f"`tape` is required when `loss` is a tensor. Pass its tape. Received: loss={loss!r}")
        import tensorflow as tf

        tape = tf.GradientTape() if tape is None else tape
        with tape:
            scaled = self.scale_loss(loss() if callable(loss) else loss)
        variables = keras.tree.flatten(var_list() if callable(var_list) else var_list)
        sources = [variable.value if isinstance(variable, keras.Variable) else variable for variable in variables]
        self.apply(tape.gradient(scaled, sources), variables)
        return self.iterations
