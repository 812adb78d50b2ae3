"""A mixin for layer classes that compute in float32, and a wrapper for any other layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops, tree

from tfmixed._utils import layer_tree, temporary_state

PACKAGE = "tfmixed"


class InFloat32(keras.layers.Layer):
    """Mixin that gives a layer the float32 policy and an `output_dtype`. Listed before the Keras class."""

    def __init__(self, *args: Any, output_dtype: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, dtype="float32", **kwargs)
        # Without autocast, some Keras layers compute in float32 but round to the dtype of their inputs.
        self.autocast = True
        self.output_dtype = _resolve(output_dtype, keras.dtype_policies.get(dtype).compute_dtype)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original = cls.call

        # Keras reads the signature of `call` to pass masks and `training`; `wraps` keeps it.
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _cast(original(self, *args, **kwargs), self.output_dtype)

        cls.call = call

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return cast_spec(super().compute_output_spec(*args, **kwargs), self.output_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "output_dtype": self.output_dtype}


@keras.saving.register_keras_serializable(PACKAGE)
class Float32(InFloat32, keras.layers.Wrapper):
    """Computes the wrapped layer in float32, whatever the policy.

    In half precision, a custom layer that sums, exponentiates or divides may fail: float16 sums overflow at 65504, and
    squares of numbers below 2e-4 vanish.

    Args:
        layer: Any layer, built or not. Its dtype policy, and that of its sublayers, becomes float32.
        output_dtype: The dtype of the output, see `tfmixed.layers`. Defaults to None.
        **kwargs: Base layer keyword arguments.

    Raises:
        ValueError: If `output_dtype` is not a floating dtype.

    Example:
    >>> layer = Float32(keras.layers.Dense(3), dtype="mixed_float16")
    >>> layer(ops.ones((2, 4), "float16")).dtype.name
    'float32'
    """

    def __init__(self, layer: keras.layers.Layer, output_dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(layer, output_dtype=output_dtype, **kwargs)
        self.supports_masking = layer.supports_masking
        _set_float32(layer)

    def build(self, input_shape: Any = None) -> None:
        # A layer with several inputs, or without a `build` method, is built by its first call.
        takes_one_shape = len(inspect.signature(self.layer.build).parameters) == 1
        if takes_one_shape and type(self.layer).build is not keras.layers.Layer.build and not self.layer.built:
            with _created_in_float32(self.layer):
                self.layer.build(input_shape)
        self.built = True

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self.layer.built else _created_in_float32(self.layer):
            return self.layer(inputs, *args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # Traces `call`: Keras would ask for the shape alone, which does not determine the dtype.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.compute_mask(*args, **kwargs)


def cast_spec(spec: Any, dtype: str | None) -> Any:
    """Returns the symbolic tensors of `spec` with another dtype, or unchanged if it is None."""

    def cast(tensor: keras.KerasTensor) -> keras.KerasTensor:
        return keras.KerasTensor(tensor.shape, dtype=dtype, sparse=tensor.sparse, name=tensor.name)

    return spec if dtype is None else tree.map_structure(cast, spec)


def _cast(outputs: Any, dtype: str | None) -> Any:
    return outputs if dtype is None else tree.map_structure(lambda output: ops.cast(output, dtype), outputs)


def _set_float32(layer: keras.layers.Layer) -> None:
    for inner in layer._flatten_layers():
        inner.dtype_policy = layer_tree.policy_for(inner, "float32")


@contextlib.contextmanager
def _created_in_float32(layer: keras.layers.Layer) -> Iterator[None]:
    """Gives the sublayers that `layer` creates in its `build` or first call the float32 policy, too."""
    with temporary_state.global_policy("float32"):
        yield
    _set_float32(layer)


def _resolve(output_dtype: Any, compute_dtype: str) -> str | None:
    if output_dtype is None:
        return None
    with contextlib.suppress(ValueError):
        name = keras.backend.standardize_dtype(compute_dtype if output_dtype == "compute" else output_dtype)
        if "float" in name:
            return str(name)
    raise ValueError(
        f'`output_dtype` must be None, "compute" or a floating dtype. Received: output_dtype={output_dtype!r}'
    )
