"""Serialization of a `LossScaleOptimizer`: its configuration, and its variables by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy
from keras import ops

from tfmixed._core import arguments
from tfmixed._core.fused_update import Fuser
from tfmixed._core.inner_optimizer import LOW_BITS, saved_variables
from tfmixed._core.scaler_base import ScalerBase
from tfmixed._utils import user_warnings

# Defaults of the constructor, left out of a configuration so that Keras's own class can read the rest.
_DEFAULTS = {"max_consecutive_skips": 100, "fuse": "auto", "event_capacity": 256}


class _Config(dict[str, Any]):
    """Configuration that looks up the inner optimizer's hyperparameters without storing them twice."""

    def __missing__(self, key: str) -> Any:
        return self["inner_optimizer"]["config"][key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self["inner_optimizer"]["config"]

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the entry, or that of the inner optimizer, or `default`."""
        try:
            return self[key]
        except KeyError:
            return default


class Serialization(ScalerBase, keras.optimizers.LossScaleOptimizer):
    """Mixin with the methods that Keras calls to save and load an optimizer. Reads files of Keras's own class too."""

    event_capacity: int
    _fuser: Fuser

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration, with Keras's own four entries only where these suffice.

        Other entries are looked up in the inner optimizer's configuration: `get_config()["learning_rate"]`.
        """
        config = {"name": self.name, "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer)}
        if self.rule == arguments.dynamic_rule(self.initial_scale, self.dynamic_growth_steps):
            config |= {"initial_scale": self.initial_scale, "dynamic_growth_steps": self.dynamic_growth_steps}
        else:
            config["scale"] = self.rule.get_config()
        own = (self.max_consecutive_skips, self._fuser.fuse, self.event_capacity)
        given = zip(_DEFAULTS.items(), own, strict=True)
        return _Config({**config, **{name: value for (name, default), value in given if value != default}})

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        """Returns an optimizer from its configuration, or from one of Keras's own class."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(inner, **{key: value for key, value in config.items() if key != "inner_optimizer"})

    @classmethod
    def from_keras(cls, optimizer: keras.optimizers.LossScaleOptimizer) -> Self:
        """Returns an optimizer that continues from the state of one of Keras's own class, with its inner optimizer.

        Args:
            optimizer: Optimizer such as `model.optimizer` after `keras.models.load_model` of an older file. It must
                not be used afterwards.
        """
        new = cls(
            optimizer.inner_optimizer,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
        )
        if optimizer.built:
            new.build(optimizer._trainable_variables)
            new._state().restore({name: getattr(optimizer, name).numpy() for name in ("dynamic_scale", "step_counter")})
        return new

    def save_own_variables(self, store: Any) -> None:
        """Writes own variables by name and the inner optimizer's by number."""
        state = self._state()
        for name in state.shapes:
            store[name] = ops.convert_to_numpy(state.read(name))
        for name, variable in self._inner_by_name().items():
            store[name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Reads the variables that `save_own_variables` or Keras's own class wrote.

        Variables that the file lacks, because another rule wrote it, keep their initial values.
        """
        inner = self._inner_by_name()
        zeros = {name: numpy.zeros(part.shape, "int16") for name, part in inner.items() if LOW_BITS in name}
        saved = zeros | _by_name(store, inner)
        if inner.keys() != {n for n in saved if n in inner or (n.startswith("inner_") and LOW_BITS not in n)}:
            user_warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}. The inner optimizer of the file has other "
                f"variables than {type(self.inner_optimizer).__name__}, or the optimizer is not built yet. Build it "
                "first with `optimizer.build(model.trainable_variables)`."
            )
            return
        values = {name: saved[name] for name in inner}
        _check_shapes(list(inner.values()), list(values.values()))
        self._state().restore(saved)
        for name, variable in inner.items():
            variable.assign(values[name])
        self._begin_run()

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Sets all variables, own and the inner optimizer's, to values in the order of `variables`.

        Raises:
            ValueError: If the optimizer is not built, or `weights` does not have one value of the right shape for each
                variable. Nothing is set then.
        """
        variables, values = self.variables, list(weights)
        if not self.built:
            raise ValueError(
                "`set_weights` needs a built optimizer. Call `optimizer.build(trainable_variables)` first."
            )
        if len(values) != len(variables):
            raise ValueError(
                f"`weights` must have {len(variables)} values, one for each of `optimizer.variables`. Values of the "
                f"inner optimizer alone belong to `optimizer.inner_optimizer.set_weights`. Received: {len(values)}"
            )
        _check_shapes(variables, values)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        self._state().bound_scale()
        self._begin_run()

    def _inner_by_name(self) -> dict[str, keras.Variable]:
        return {f"inner_{name}": variable for name, variable in saved_variables(self.inner_optimizer).items()}


def _check_shapes(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        if tuple(variable.shape) != tuple(numpy.shape(value)):
            raise ValueError(
                f"The value for the optimizer variable {variable.path!r} must have the shape {tuple(variable.shape)}. "
                f"Build the optimizer with the variables of the saved one. Received: shape={tuple(numpy.shape(value))}"
            )


def _by_name(store: Any, inner: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's values by our names. Keras numbers its own four variables, then the inner optimizer's."""
    numbered = ["iteration", "learning_rate", "step_counter", "dynamic_scale", *inner]
    if set(store.keys()) == {str(number) for number in range(len(numbered))}:
        return {name: store[str(number)] for number, name in enumerate(numbered)}
    return {name: store[name] for name in store.keys()}  # noqa: SIM118  # an HDF5 group of Keras does not iterate
