"""Files, conversion and configuration of a `LowPrecisionOptimizer`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import keras
import numpy
from keras import ops

from tfmixed._core.inner_optimizer import LOW_BITS
from tfmixed._core.low_precision_storage import Float32View
from tfmixed._core.low_precision_variables import LowPrecisionVariables
from tfmixed._utils import user_warnings


class LowPrecisionFiles(LowPrecisionVariables):
    """Mixin with the methods that save, load and convert an optimizer. Files hold states in float32."""

    fuse: bool | Literal["auto"]

    @property
    def variables(self) -> list[keras.Variable]:
        """Variables that hold the state, in the forms in which it is stored."""
        stored = [[v] if not isinstance(v, Float32View) else v.storage.variables for v in self._plain_variables()]
        return [*itertools.chain(*stored), *self._created.low_bits]

    def _plain_variables(self) -> list[keras.Variable]:
        """Returns the variables of an inner optimizer that is not wrapped, in its order: views, or real ones."""
        return self._created.variables or self.inner_optimizer.variables

    def saved_variables(self) -> dict[str, keras.Variable]:
        """Returns variables as a file holds them, by name.

        They are those of the inner optimizer in float32, numbered as by Keras, from which every form can be restored
        exactly. With `weights="split"`, the rest of the weights follows.
        """
        numbered = {str(number): variable for number, variable in enumerate(self._plain_variables())}
        return numbered | {f"{LOW_BITS}{index}": part for index, part in enumerate(self._created.low_bits)}

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables of `saved_variables`."""
        for name, variable in self.saved_variables().items():
            store[name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` of an optimizer with any `weights` and `states` wrote, or Keras's own."""
        saved, known = set(store.keys()), self.saved_variables()
        if {name for name in saved | set(known) if LOW_BITS not in name} - (saved & set(known)):
            user_warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}. It has {len(known)} variables, and the file "
                f"has {len(saved)}. Build it first with `optimizer.build(model.trainable_variables)`."
            )
            return
        for name, variable in known.items():
            variable.assign(store[name] if name in saved else numpy.zeros(variable.shape, "int16"))

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Sets all variables to values in the order of `variables`.

        Raises:
            ValueError: If their number or a shape is not that of `variables`. Nothing is set then.
        """
        variables, values = self.variables, list(weights)
        shapes = [[tuple(numpy.shape(value)) for value in found] for found in (variables, values)]
        if not self.built or shapes[0] != shapes[1]:
            raise ValueError(
                "`weights` must have a value of the same shape for each of `variables` of a built optimizer. "
                f"Received: shapes {shapes[1]}, expected {shapes[0]}"
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def to_keras(self, variables: Sequence[Any]) -> keras.optimizers.Optimizer:
        """Copies the weights into `variables` and returns a Keras optimizer for them that continues this one.

        Args:
            variables: Trainable variables of any dtype, in the order and shapes of those that this optimizer was built
                with, such as those of the same model in float32. `weights="split"` gives all bits of float32 weights.

        Raises:
            ValueError: If this optimizer is not built, or `variables` have other shapes. Nothing is written then.
        """
        inner, variables = self.inner_optimizer, list(variables)
        if not self.built:
            raise ValueError("`to_keras` needs a built optimizer. Call `optimizer.build(trainable_variables)` first.")
        _check_shapes(variables, self._trainable_variables)
        new = type(inner).from_config(inner.get_config())
        new.build(variables)
        _copy([*self._created.views, *self._plain_variables()], [*variables, *new.variables])
        return new

    @classmethod
    def from_keras(cls, optimizer: keras.optimizers.Optimizer, variables: Sequence[Any], **kwargs: Any) -> Self:
        """Copies weights into `variables` and returns an optimizer for them that continues a Keras optimizer.

        Args:
            optimizer: Built optimizer, not wrapped.
            variables: Trainable variables in the order and shapes of those that it was built with.
            **kwargs: Arguments of the constructor.

        Raises:
            ValueError: If `optimizer` is not built or wraps another one, or `variables` have other shapes. Nothing is
                written then.
        """
        if not optimizer.built or hasattr(optimizer, "inner_optimizer"):
            raise ValueError(
                "`optimizer` must be a built Keras optimizer. Pass the `inner_optimizer` of one that scales the loss. "
                f"Received: a {type(optimizer).__name__}, built={optimizer.built}"
            )
        variables = list(variables)
        _check_shapes(variables, optimizer._trainable_variables)
        new = cls(type(optimizer).from_config(optimizer.get_config()), **kwargs)
        new.build(variables)
        _copy([*optimizer._trainable_variables, *optimizer.variables], [*new._created.views, *new._plain_variables()])
        return new

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        own = {"weights": self.weights, "states": self.states, "seed": self.seed, "fuse": self.fuse}
        return {"name": self.name, "inner_optimizer": inner, **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        """Returns an optimizer from its configuration."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(inner, **{key: value for key, value in config.items() if key != "inner_optimizer"})


def _check_shapes(variables: Sequence[Any], like: Sequence[Any]) -> None:
    shapes, expected = ([tuple(variable.shape) for variable in found] for found in (variables, like))
    if shapes != expected:
        raise ValueError(f"`variables` must have the shapes {expected}. Received: {shapes}")


def _copy(values: Sequence[Any], variables: Sequence[Any]) -> None:
    for value, variable in zip(values, variables, strict=True):
        variable.assign(ops.cast(ops.convert_to_tensor(value), variable.dtype))
