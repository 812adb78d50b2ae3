"""What differs between the backends of Keras, for tests that run on all of them."""

from __future__ import annotations

import weakref

import keras
import pytest

from tfmixed import hardware

BACKEND = keras.backend.backend()
ON_CPU = hardware.describe().main.kind == "cpu"
# GPUs add up otherwise, and some sums that break on a CPU come out right there.
breaks_on_cpus = pytest.mark.skipif(not ON_CPU, reason="what Keras does on a CPU")
needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's alone")

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    tf = None
if BACKEND == "jax":
    import jax
WIDE = "float16" if BACKEND == "jax" else "float64"  # JAX has no float64 unless told so

# For gradients that no loss was differentiated for: the optimizer warns that none was scaled.
made_up = pytest.mark.filterwarnings("ignore:apply was given gradients of a loss that was never scaled")

_compiled = weakref.WeakKeyDictionary()


def modes(*kinds):
    """Leaves out the modes of `compile` that Keras does not offer on PyTorch."""
    absent = {"steps_per_execution", "jit_compile"} if BACKEND == "torch" else set()
    return [kind for kind in kinds if not absent & kind.keys()]


def apply(optimizer, gradients, weights):
    """Takes one step as a loop of the backend does: on JAX from values to values."""
    optimizer.scale_loss(0.0)  # whatever the gradients are made of, they count as those of a scaled loss
    take_step(optimizer, gradients, weights)


def compiled(optimizer, weights):
    """Returns what takes one step with gradients, for runs of hundreds: eagerly one takes TensorFlow 40 ms."""
    if BACKEND == "tensorflow":
        return tf.function(lambda *gradients: apply(optimizer, gradients, weights))
    return lambda *gradients: apply(optimizer, gradients, weights)


def take_step(optimizer, gradients, weights):
    """The same with gradients that are what the optimizer was told before."""
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
