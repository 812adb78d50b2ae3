"""`tf.TensorSpec` of a model's inputs and of the targets that its losses accept, to trace it without data."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
from keras import tree

from tfmixed._utils import temporary_state
from tfmixed.auditing.trace import leaves


def tensors(structure: Any) -> Any:
    """Returns a structure of arrays as tensors; None for None.

    Raises:
        ValueError: If a leaf is not an array.
    """
    return None if structure is None else tree.map_structure(_tensor, structure)


def _tensor(array: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        tensor = keras.ops.convert_to_tensor(array)
        if tensor.shape.rank != 0:  # a number, such as an element of a list
            return tensor
    raise ValueError(
        "`inputs` and `targets` must be arrays, or structures of arrays. Convert lists of numbers to arrays, and pass "
        f"one batch of a dataset. Received: {type(array).__name__}"
    )


def specs(model: keras.Model, inputs: Any = None) -> Any:
    """Returns the `tf.TensorSpec` of a model's inputs.

    Args:
        model: A built model. Unless it is functional or Sequential, its inputs are taken to be float32.
        inputs: A batch. Defaults to None, which reads the shapes that the model was built with.

    Raises:
        ValueError: If the inputs are not arrays, or are None and the model does not know the shapes.
    """
    import tensorflow as tf

    struct = tensors(inputs)
    if struct is None and isinstance(model, keras.Sequential):
        struct = _unpacked(model.inputs)
    elif struct is None and hasattr(model, "_inputs_struct"):
        struct = _unpacked(model._inputs_struct)
    if struct is not None:
        return tree.map_structure(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), struct)
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            "`inputs` must be a batch, because the model does not know the shapes that it was built with. "
            "Received: inputs=None"
        )
    return tree.map_shape_structure(lambda shape: tf.TensorSpec([None, *shape[1:]], "float32"), shapes)


def target_specs(model: keras.Model, inputs: Any) -> Any:
    """Returns the `tf.TensorSpec` of targets that the losses of `compile` accept; None without such losses.

    Args:
        model: A built model.
        inputs: The `tf.TensorSpec` of its inputs.
    """
    import tensorflow as tf

    losses = getattr(model, "loss", None)
    if losses is None or type(model).compute_loss is not keras.Model.compute_loss:
        return None
    if isinstance(model, keras.Sequential):
        outputs = _unpacked(model.outputs)
    elif isinstance(model, keras.Function):
        outputs = model.output
    else:  # Keras 3.15's shape inference does not cast inputs as a call does
        with temporary_state.states(model):
            outputs = tf.function(model, autograph=False).get_concrete_function(inputs).structured_outputs
    if isinstance(losses, dict) and not isinstance(outputs, dict):
        losses = [losses[name] for name in getattr(model, "output_names", losses)]
    names, flat = [_loss_name(loss) for loss in tree.flatten(losses)], leaves(outputs)
    if len(names) == 1:
        names *= len(flat)
    if len(names) != len(flat):
        return None
    specs = [
        tf.TensorSpec(output.shape[:-1], "int32") if "sparse" in name else tf.TensorSpec(output.shape, "float32")
        for name, output in zip(names, flat, strict=True)
    ]
    return tree.pack_sequence_as(outputs, specs)


def _loss_name(loss: Any) -> str:
    return (loss if isinstance(loss, str) else getattr(loss, "__name__", None) or type(loss).__name__).lower()


def _unpacked(structure: Any) -> Any:
    return structure[0] if isinstance(structure, (list, tuple)) and len(structure) == 1 else structure
