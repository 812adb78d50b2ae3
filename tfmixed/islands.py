"""Float32 islands in a built half-precision model."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import keras

from tfmixed import auditing
from tfmixed._islands import gradient_sums
from tfmixed._islands.planner import Plan, reset_compiled_functions
from tfmixed._utils import user_warnings
from tfmixed.formats import HALF

Selector = str | type | Callable[[Any], bool]


def force_float32(
    model: keras.layers.Layer, layers: Selector | Collection[Selector] = "sensitive", inputs: Any = None
) -> list[str]:
    """Makes parts of a built model compute in float32, in place.

    Weights and their names in files, optimizer state and everything else stay as they are. The model saves and loads
    with the change. Under a policy such as `"float16"` the weights stay float16 variables, and are cast to float32 for
    the computation.

    With `"sensitive"`, these parts are forced:

    - softmax layers, also inside attention, and activations such as softmax and exponential (the matrix product of
      their layer stays in half precision);
    - `Attention`, `UnitNormalization`, `Normalization` and `Dot(normalize=True)`;
    - average pooling over 128 elements or more, or over masked sequences;
    - of the `keras.ops` in a functional graph: softmax, exponentials, norms, products, and sums of squares or over
      long or unknown axes;
    - the outputs of the model;
    - losses of activity regularizers, and of the regularizers of half-precision weights;
    - on TensorFlow, the code of custom layers in which `audit` finds a severe hazard, or which adds a half-precision
      loss.

    Layers selected in any other way are forced as a whole, with their matrix products and sublayers.

    The gradients of biases, other broadcast variables and embeddings are summed in float32 while the model exists, as
    under `set_policy`. A loaded model needs another call, or `set_policy` before it is loaded.

    In functional and Sequential graphs, forced parts return float32. Inside the `call` of a custom class they return
    the dtype of before, since TensorFlow refuses to mix dtypes.

    Args:
        model: A built Keras model of any kind.
        layers: `"sensitive"`; a layer name or path, or a pattern for these as in `fnmatch`
            (`"block_*/attention"`); a class; a layer; a function that takes a layer and returns a bool; or a list of
            these. Defaults to `"sensitive"`.
        inputs: A batch of inputs, for models whose input shapes and dtypes are unknown. Only its shapes and dtypes are
            used. Defaults to None.

    Returns:
        The paths of what this call changed, in the order of the model: layer names joined by `/`, and where only a
        part of the layer was changed, that part. For example `"block/mha/softmax"`, `"predictions: activation"`,
        `"hidden: activity regularizer"`, `"logits: output"`, or `"block: own code"` (all but its sublayers).

    Raises:
        ValueError: If the model is not built, or if a selector is invalid or matches nothing.

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
        raise ValueError(f"`model` must be a Keras model. Received: model={model!r}")
    if not model.built:
        raise ValueError(f"`model` must be built: call it on data, or `model.build(input_shape)`. Received: {model!r}")
    was_on = gradient_sums.is_on()
    for layer in model._flatten_layers():
        if layer.compute_dtype in HALF:
            gradient_sums.cover(layer)
    if gradient_sums.is_on() and not was_on:
        reset_compiled_functions([model])
    selectors: Any = layers if isinstance(layers, (list, tuple, set)) else [layers]
    changed: list[str] = []
    while True:
        plan = Plan(model)
        audited = _audited(model, inputs) if "sensitive" in selectors else _NOT_AUDITED
        for selector in selectors:
            if selector == "sensitive":
                plan.force_sensitive(audited.unsafe, audited.adding)
            else:
                for layer in _matching(plan, selector):
                    plan.force_whole(layer)
        new = [path for path in plan.apply(audited.is_traceable) if path not in changed]
        changed += new
        if not new or not audited.unsafe:  # code that is right in float32 reveals hazards in its inputs
            return changed


class _Audited(NamedTuple):
    """Layers with unsafe code, layers that add half-precision losses, and a check that the model can be traced."""

    unsafe: list[Any]
    adding: list[Any]
    is_traceable: Callable[[], bool] | None


_NOT_AUDITED = _Audited([], [], None)


def _audited(model: Any, inputs: Any) -> _Audited:
    if keras.backend.backend() != "tensorflow" or not isinstance(model, keras.Model):
        return _NOT_AUDITED
    try:
        specs = auditing.specs(model, inputs)
        return _Audited(*auditing.unsafe(model, specs), functools.partial(auditing.is_traceable, model, specs))
    except ValueError as error:
        user_warnings.warn(f"force_float32 considers known layer classes only, not custom code: {error}")
        return _NOT_AUDITED


def _matching(plan: Plan, selector: Selector) -> list[Any]:
    if isinstance(selector, str):
        return _named(plan, selector)
    if any(selector is layer for layer in plan.inside):
        return [selector]
    if isinstance(selector, keras.Operation):
        raise ValueError(f"`layers` must be part of the model. Received: {selector!r}")
    if isinstance(selector, type):
        return [layer for layer in plan.inside if isinstance(layer, selector)]
    if callable(selector):
        return [layer for layer in plan.inside if isinstance(layer, keras.layers.Layer) and selector(layer)]
    raise ValueError(
        '`layers` must be "sensitive", a name or pattern, a class, a layer, a function that takes a layer and returns '
        f"a bool, or a list of these. Received: {selector!r}"
    )


def _named(plan: Plan, pattern: str) -> list[Any]:
    names = {layer: {layer.name, plan.paths[layer]} for layer in plan.inside}
    found = [layer for layer in plan.inside if any(fnmatch.fnmatchcase(name, pattern) for name in names[layer])]
    if not found:
        known = sorted(set().union(*names.values()))
        near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.4) or known[:5]
        raise ValueError(f"`layers` must match layers of the model, such as {near}. Received: layers={pattern!r}")
    return found
