"""What a model and its losses take, in shapes and dtypes: enough to trace them without data."""

from __future__ import annotations

from typing import Any

import keras
from keras import tree

from tfmixed._utils import temporary_state
from tfmixed.auditing.tracing import tensors


def specs_of(model: keras.Model) -> Any:
    """Returns the `tf.TensorSpec` of a built model's inputs.

    Raises:
        ValueError: The model does not tell the shapes that it was built with. Dtypes it never tells: where it is no
            graph of layers they are float32.
    """
    import tensorflow as tf

    if isinstance(model, keras.Sequential) or hasattr(model, "_inputs_struct"):
        struct = model.inputs if isinstance(model, keras.Sequential) else model._inputs_struct
        return tree.map_structure(lambda each: tf.TensorSpec(each.shape, each.dtype), _single(struct))
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            "inputs must be given for a model that does not say what it was built with, received None: pass a batch"
        )
    return tree.map_shape_structure(lambda shape: tf.TensorSpec([None, *shape[1:]], "float32"), shapes)


def specs_from(batch: Any) -> Any:
    """Returns the `tf.TensorSpec` of a structure of tensors."""
    import tensorflow as tf

    return tree.map_structure(lambda each: tf.TensorSpec(each.shape, each.dtype), batch)


def targets_for(model: keras.Model, inputs: Any) -> Any:
    """Returns the `tf.TensorSpec` of targets that the losses of `compile` take; None without such losses.

    Args:
        model: The model.
        inputs: The `tf.TensorSpec` of its inputs.
    """
    import tensorflow as tf

    losses = getattr(model, "loss", None)
    if losses is None or type(model).compute_loss is not keras.Model.compute_loss:
        return None
    if isinstance(model, (keras.Function, keras.Sequential)):
        outputs = _single(model.outputs) if isinstance(model, keras.Sequential) else model.output
    else:  # Keras's own shape inference does not cast inputs as a call does (3.15)
        with temporary_state.states(model):
            outputs = tf.function(model, autograph=False).get_concrete_function(inputs).structured_outputs
    if isinstance(losses, dict) and not isinstance(outputs, dict):
        losses = [losses[name] for name in getattr(model, "output_names", losses)]
    sparse = ["sparse" in _name(loss) for loss in tree.flatten(losses)]
    flat = tensors(outputs)
    if len(sparse) not in (1, len(flat)):
        return None
    each = sparse if len(sparse) == len(flat) else sparse * len(flat)
    specs = [
        tf.TensorSpec(output.shape[:-1], "int32") if integers else tf.TensorSpec(output.shape, "float32")
        for integers, output in zip(each, flat, strict=True)
    ]
    return tree.pack_sequence_as(outputs, specs)


def _name(loss: Any) -> str:
    return (loss if isinstance(loss, str) else getattr(loss, "__name__", None) or type(loss).__name__).lower()


def _single(structure: Any) -> Any:
    return structure[0] if isinstance(structure, (list, tuple)) and len(structure) == 1 else structure
