"""Differences between Keras backends. Test files that use this module run on JAX and PyTorch too."""

from __future__ import annotations

import weakref

import keras
import pytest

from tfmixed import hardware

BACKEND = keras.backend.backend()
ON_CPU = hardware.describe().main.kind == "cpu"
# GPUs add in another order: some sums that overflow on a CPU do not there.
breaks_on_cpus = pytest.mark.skipif(not ON_CPU, reason="Keras does this on CPUs only")
needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="needs TensorFlow")

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    tf = None
if BACKEND == "jax":
    import jax
WIDE = "float16" if BACKEND == "jax" else "float64"  # JAX disables float64 by default

# For gradients that do not come from a loss: the optimizer warns that no loss was scaled.
made_up = pytest.mark.filterwarnings("ignore:apply was given gradients of a loss that was never scaled")

_compiled = weakref.WeakKeyDictionary()


def modes(*kinds):
    """Returns the keyword arguments of `compile` that Keras supports on this backend."""
    absent = {"steps_per_execution", "jit_compile"} if BACKEND == "torch" else set()
    return [kind for kind in kinds if not absent & kind.keys()]


def apply(optimizer, gradients, weights):
    """Applies gradients of a scaled loss, on JAX with `stateless_apply`."""
    optimizer.scale_loss(0.0)  # marks the gradients as scaled
    take_step(optimizer, gradients, weights)


def compiled(optimizer, weights):
    """Returns a compiled `apply`, for runs of hundreds of steps: an eager step takes 40 ms on TensorFlow."""
    if BACKEND == "tensorflow":
        return tf.function(lambda *gradients: apply(optimizer, gradients, weights))
    return lambda *gradients: apply(optimizer, gradients, weights)


def take_step(optimizer, gradients, weights):
    """Applies gradients, scaled or not as the calls before have told the optimizer."""
    if BACKEND != "jax":
        optimizer.apply(gradients, weights)
        return
    if not optimizer.built:
        optimizer.build(weights)
    if optimizer not in _compiled:
        _compiled[optimizer] = jax.jit(optimizer.stateless_apply)
    trainable, state = _compiled[optimizer](
        [variable.value for variable in optimizer.variables], gradients, [weight.value for weight in weights]
    )
    for variable, value in zip([*weights, *optimizer.variables], [*trainable, *state], strict=True):
        variable.assign(value)


def gradient(function, x):
    """Returns the gradient of a scalar function at a tensor."""
    if BACKEND == "jax":
        return jax.grad(function)(x)
    if BACKEND == "torch":
        x = x.detach().clone().requires_grad_()
        function(x).backward()
        return x.grad
    with tf.GradientTape() as tape:
        tape.watch(x)
        result = function(x)
    return tape.gradient(result, x)
