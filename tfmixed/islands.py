"""Float32 islands in a half-precision model that is already built."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection
from typing import Any

import keras

from tfmixed._islands.planner import Plan

Selector = str | type | Callable[[Any], bool]


def force_float32(
    model: keras.layers.Layer, layers: Selector | Collection[Selector] = "sensitive", inputs: Any = None
) -> list[str]:
    """Makes parts of a built model compute in float32, in place, and says which.

    Weights, their names in files, the state of the optimizer and everything else stay. The model saves and loads with
    the change. Under a policy like `"float16"` the weights stay float16 variables; they are computed with in float32.

    `"sensitive"` are: softmax layers, also those inside attention; softmax, exponential and the like as `activation`
    of any layer, whose matrix product stays half; `Attention`, `UnitNormalization`, `Normalization`,
    `Dot(normalize=True)`; average pooling over 128 elements or more, over masked sequences too; of the `keras.ops`
    in a functional graph: softmax, exponentials, norms, products, and sums over long or unknown axes or of squares;
    what the model returns; losses of activity regularizers, and of weight regularizers where the weights are half
    precision; on TensorFlow the code of one's own layers in which `audit` finds something severe, or that adds a loss
    in half precision. Whatever is named instead is forced whole, with its matrix products and all that is in it.

    In functional and Sequential graphs what is forced gives float32. In the `call` of a user's own class it gives the
    dtype that it gave before, since TensorFlow refuses to mix them.

    Args:
        model: Built; of any kind.
        layers: `"sensitive"`, a name or pattern (as of files: `"block_*/attention"`) that is matched with names and
            with paths, a class, a layer, a function from a layer to a bool, or a list of these.
        inputs: A batch, for "sensitive" models that do not tell what they are called with. Nothing runs.

    Returns:
        What was changed now, in the order of the model, a path each: the names of the layers from the model's own on,
        joined by `/`, and where not all of that layer was changed, what was: `"block/mha/softmax"`,
        `"predictions: activation"`, `"hidden: activity regularizer"`, `"logits: output"`, `"block: own code"` (all but
        its sublayers). Nothing for what was changed before, or is float32 anyway.

    Raises:
        ValueError: The model is not built; a name or pattern matches nothing.

    Example:
    >>> keras.config.set_dtype_policy("mixed_float16")
    >>> hidden, last = keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, "softmax", name="predictions")
    >>> model = keras.Sequential([keras.Input((3,)), hidden, last])
    >>> force_float32(model)
    ['predictions: activation']
    >>> force_float32(model, "hid*")
    ['hidden']
    >>> force_float32(model)
    []
    >>> keras.config.set_dtype_policy("float32")
    """
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(f"model must be a Keras model, received {model!r}")
    if not model.built:
        raise ValueError(f"model must be built, received {model!r}: call it on data, or `model.build(input_shape)`")
    selectors: Any = layers if isinstance(layers, (list, tuple, set)) else [layers]
    made: list[str] = []
    while True:
        plan = Plan(model)
        for selector in selectors:
            if selector == "sensitive":
                plan.sensitive(inputs)
            else:
                for layer in _matching(plan, selector):
                    plan.whole(layer)
        new = [each for each in plan.make() if each not in made]
        made += new
        if not new or plan.is_final:
            return made


def _matching(plan: Plan, selector: Selector) -> list[Any]:
    if isinstance(selector, str):
        return _named(plan, selector)
    if any(selector is layer for layer in plan.inside):
        return [selector]
    if isinstance(selector, keras.Operation):
        raise ValueError(f"layers must be among the model's, received {selector!r}")
    if isinstance(selector, type):
        return [layer for layer in plan.inside if isinstance(layer, selector)]
    if callable(selector):
        return [layer for layer in plan.inside if isinstance(layer, keras.layers.Layer) and selector(layer)]
    raise ValueError(
        'layers must be "sensitive", a name or pattern, a class, a layer, a function from one to a bool or a list '
        f"of these, received {selector!r}"
    )


def _named(plan: Plan, pattern: str) -> list[Any]:
    names = {layer: {layer.name, plan.paths[layer]} for layer in plan.inside}
    found = [layer for layer in plan.inside if any(fnmatch.fnmatchcase(name, pattern) for name in names[layer])]
    if not found:
        known = sorted(set().union(*names.values()))
        near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.4) or known[:5]
        raise ValueError(f"layers must match layers of the model, received {pattern!r}, which is near {near}")
    return found
