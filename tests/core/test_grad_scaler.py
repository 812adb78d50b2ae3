"""`GradScaler` eagerly, on all backends."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import keras
import numpy as np
import pytest
from backend import gradient, needs_tensorflow, tf
from keras import ops

from tfmixed import GradScaler, LossScaleOptimizer, records, scaling
from tfmixed.callbacks import LossScaleLogger
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import EventsLost, ScaleChange
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

RULE = DynamicScale(initial_scale=8.0, growth_interval=2)
slow = pytest.mark.slow


def pair(name="w", start=(1.0, 2.0)):
    """Returns an optimizer that subtracts gradients, and its variable."""
    return keras.optimizers.SGD(1.0), keras.Variable(start, name=name)


def scaled(scaler, *values):
    """Returns the gradient of a scaled loss."""
    return scaler.scale(ops.convert_to_tensor(np.array(values, "float32")))


def step(scaler, optimizer, weight, *values):
    return bool(scaler.step(optimizer, [(scaled(scaler, *values), weight)]))


def run(scaler, trace, parts=None):
    """Takes steps with gradients of 1, or an infinite one where the trace has F. Returns the scale after each."""
    parts, scales = parts or pair(), []
    for letter in trace:
        assert step(scaler, *parts, 1.0, 1.0 if letter == "T" else np.inf) is (letter == "T")
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


# The rule and the step.


@pytest.mark.parametrize(
    "peer",
    [pytest.param(peer, marks=() if peer in ("torch", "openseq2seq_logmax") else slow) for peer in scaling.PEERS],
)
def test_scale_and_counters_follow_the_rule(peer):
    """The scale follows `simulate` for each preset, and weights move in finite steps only."""
    trace, rule = "TTFTTTTFFTTT", scaling.like(peer)
    rule = {"openseq2seq_logmax": rule}.get(peer) or DynamicScale(**{**vars(rule), "growth_interval": 3})
    scaler, parts = GradScaler(rule=rule), pair(start=(0.0, 0.0))
    np.testing.assert_allclose(run(scaler, trace, parts), scaling.simulate(rule, trace, [1.0] * 12), rtol=1e-5)
    assert (int(scaler.attempted_steps), int(scaler.skipped_steps), int(scaler.consecutive_skips)) == (12, 3, 0)
    np.testing.assert_array_equal(parts[1].numpy(), [-9.0, -9.0])


@pytest.mark.parametrize("rule", [128, None, "dynamic", ConstantScale(4.0), {"rule": "DynamicScale"}], ids=str)
def test_rule_argument(rule):
    """`rule` takes what `scaling.get` takes. None is PyTorch's rule."""
    wanted = scaling.like("torch") if rule is None else scaling.get(rule)
    scaler = GradScaler(rule=rule)
    assert (scaler.rule, scaler.get_scale()) == (wanted, float(wanted.start().scale))
    assert isinstance(scaler.get_scale(), float)


def test_pytorch_arguments_getters_and_setters():
    """Defaults and positional arguments are PyTorch's."""
    scaler = GradScaler()
    assert (scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor()) == (65536.0, 2.0, 0.5)
    assert (scaler.get_growth_interval(), scaler.is_enabled()) == (2000, True)
    scaler = GradScaler(8.0, 4.0, 0.25, 1, device="cuda")
    assert run(scaler, "TF") == [32.0, 8.0]
    scaler.set_growth_factor(2.0)
    scaler.set_backoff_factor(0.5)
    scaler.set_growth_interval(2)
    assert run(scaler, "TTFT") == [8.0, 16.0, 8.0, 8.0]
    assert int(scaler.attempted_steps) == 6
    assert GradScaler(growth_interval=2000.0).rule == GradScaler().rule
    for scaler in (GradScaler(rule=8), GradScaler(enabled=False)):
        with pytest.raises(ValueError, match="growth_factor"):
            scaler.get_growth_factor()
        with pytest.raises(ValueError, match="growth_interval"):
            scaler.set_growth_interval(3)


def test_unchecked_rule_applies_every_step():
    """skip_nonfinite=False steps with any gradient, and returns True."""
    scaler, (optimizer, weight) = GradScaler(rule=ConstantScale(2.0, skip_nonfinite=False)), pair()
    assert step(scaler, optimizer, weight, 1.0, np.inf)
    scaler.update()
    assert (int(scaler.attempted_steps), int(scaler.skipped_steps)) == (1, 0)
    assert weight.numpy()[1] == -np.inf


@pytest.mark.parametrize(("letter", "bounds"), [("F", (0.0, 1e-30)), ("T", (1e30, np.inf))])
def test_scale_never_reaches_0_or_inf(letter, bounds):
    """PyTorch's scale reaches 0, and then nothing is skipped (pytorch#98828)."""
    scaler, parts = GradScaler(growth_factor=2.0**15, backoff_factor=2.0**-15, growth_interval=1), pair()
    for _ in range(20):
        scaler.step(parts[0], [(ops.ones(2) if letter == "T" else ops.full((2,), np.nan), parts[1])])
        scaler.update()
    assert bounds[0] < scaler.get_scale() < bounds[1]
    assert np.isfinite(parts[1].numpy()).all()


def test_losses_are_scaled_in_float32_at_least():
    """`scale` takes a loss or any structure of losses. A float16 loss times 2**16 is finite."""
    scaled = GradScaler().scale({"a": ops.cast(2.0, "float16"), "b": [ops.convert_to_tensor(1.0), 3.0]})
    assert keras.backend.standardize_dtype(scaled["a"].dtype) == "float32"
    assert [float(loss) for loss in keras.tree.flatten(scaled)] == [2.0**17, 2.0**16, 3 * 2.0**16]
    assert list(map(float, GradScaler(8.0).scale(map(float, "12")))) == [8.0, 16.0]


@pytest.mark.parametrize("unscales", [False, True])
def test_gradients_are_checked_after_unscaling(unscales):
    """A gradient that overflows only when it is divided by a scale below 1 is skipped (pytorch#99640)."""
    scaler, (optimizer, weight) = GradScaler(init_scale=2.0**-10), pair()
    grads = [ops.convert_to_tensor([1e37, 1.0])]
    if unscales:
        grads = scaler.unscale(optimizer, grads)
    assert not scaler.step(optimizer, zip(grads, [weight], strict=True))
    scaler.update()
    assert scaler.get_scale() == 2.0**-11
    np.testing.assert_array_equal(weight.numpy(), [1.0, 2.0])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_unscaled_gradients_may_be_clipped():
    """None stays None, and the norm is that before the clip."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    missing = keras.Variable([1.0], name="missing")
    none, grads = scaler.unscale(optimizer, [None, scaled(scaler, 3.0, 4.0)])
    assert none is None
    np.testing.assert_array_equal(ops.convert_to_numpy(grads), [3.0, 4.0])
    assert scaler.step(optimizer, [(None, missing), (ops.clip(grads, -1.0, 1.0), weight)])
    scaler.update()
    assert float(scaler.gradient_norm) == 5.0
    np.testing.assert_array_equal(weight.numpy(), [0.0, 1.0])


@pytest.mark.parametrize(("bad", "drops_none"), [(np.inf, False), (np.nan, True), (-np.inf, True)])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_no_clip_hides_an_overflow(bad, drops_none):
    """An overflow found by unscale skips the step and is named, although step gets finite gradients."""
    scaler, optimizer = GradScaler(init_scale=8.0), keras.optimizers.SGD(1.0)
    weights = [keras.Variable([1.0], name=name) for name in "abc"]
    for value in (1.0, bad):
        grads = scaler.unscale(optimizer, [None, scaled(scaler, 1.0), scaled(scaler, value)])
        clipped = [None, *(ops.clip(ops.nan_to_num(gradient), -1, 1) for gradient in grads[1:])]
        pairs = list(zip(clipped, weights, strict=True))
        stepped = scaler.step(optimizer, pairs[1:] if drops_none else pairs)
        scaler.update()
        assert bool(stepped) is (value == 1.0)
    np.testing.assert_array_equal([weight.numpy()[0] for weight in weights], [1.0, 0.0, 0.0])
    assert scaler.drain_events() == [ScaleChange(1, 8.0, 4.0, "overflow", "c")]


def test_nan_after_unscale_is_skipped():
    """Gradients are checked again in step, such as NaN from a clip by an infinite norm."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    assert not scaler.step(optimizer, [(ops.convert_to_tensor([np.nan, 1.0]), weight)])
    scaler.update()
    assert (scaler.get_scale(), int(scaler.skipped_steps)) == (4.0, 1)


def test_amax_is_that_of_all_optimizers_before_the_clip():
    """LogMax with two optimizers, one of them unscaled and clipped."""
    rule = LogMaxScale(initial_scale=4.0, max_scale=2.0**20)
    scaler, first, second = GradScaler(rule=rule), pair("a"), pair("b")
    scales, amax = [], [16.0, 4.0, 8.0]
    for size in amax:
        grads = scaler.unscale(first[0], [scaled(scaler, size, 0.0)])
        scaler.step(first[0], [(ops.clip(grads[0], -1, 1), first[1])])
        step(scaler, *second, 2.0, -1.0)
        scaler.update()
        scales.append(scaler.get_scale())
    np.testing.assert_allclose(scales, scaling.simulate(rule, "TTT", amax), rtol=1e-5)


def test_variables_that_hold_their_gradient_are_not_unscaled():
    """The scales of float8 layers are overwritten with the gradient as it is. unscale needs to know these variables."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    weight.overwrite_with_gradient = True
    grads = scaler.unscale(optimizer, [ops.convert_to_tensor([8.0, 8.0])])
    with pytest.raises(RuntimeError, match="build"):
        scaler.step(optimizer, zip(grads, [weight], strict=True))
    np.testing.assert_array_equal(weight.numpy(), [1.0, 2.0])
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    weight.overwrite_with_gradient = True
    optimizer.build([weight])
    assert scaler.step(optimizer, [(ops.convert_to_tensor([5.0, 6.0]), weight)])
    scaler.update()
    grads = scaler.unscale(optimizer, [ops.convert_to_tensor([7.0, 8.0])])
    assert scaler.step(optimizer, zip(grads, [weight], strict=True))
    np.testing.assert_array_equal(weight.numpy(), [7.0, 8.0])


@needs_tensorflow
@pytest.mark.parametrize("unscales", [False, True])
def test_sparse_gradients_stay_sparse(unscales):
    """`tf.IndexedSlices` of an embedding are unscaled and checked as they are."""
    scaler, optimizer, table = GradScaler(init_scale=4.0), keras.optimizers.SGD(1.0), keras.Variable(np.ones((3, 2)))
    for value in (4.0, np.inf):
        slices = tf.IndexedSlices(tf.fill((1, 2), value), tf.constant([1]), tf.constant([3, 2]))
        grads = scaler.unscale(optimizer, [slices]) if unscales else [slices]
        assert isinstance(grads[0], tf.IndexedSlices)
        assert bool(scaler.step(optimizer, zip(grads, [table], strict=True))) is (value == 4.0)
        scaler.update()
    np.testing.assert_array_equal(table.numpy(), [[1, 1], [0, 0], [1, 1]])


# Several optimizers.


def test_only_the_optimizer_that_overflowed_skips():
    """The scale backs off once for all. The event names the first overflow, and the norm is that of all gradients."""
    scaler, first, second, third = GradScaler(rule=RULE), pair("a"), pair("b"), pair("c")
    assert not step(scaler, *second, 1.0, np.inf)
    assert not step(scaler, *third, np.nan, 1.0)
    assert step(scaler, *first, 3.0, 0.0)
    scaler.update()
    assert (scaler.get_scale(), int(scaler.attempted_steps), int(scaler.skipped_steps)) == (4.0, 1, 1)
    assert scaler.drain_events() == [ScaleChange(0, 8.0, 4.0, "overflow", "b")]
    np.testing.assert_array_equal([first[1].numpy(), second[1].numpy()], [[-2.0, 2.0], [1.0, 2.0]])
    step(scaler, *first, 3.0, 0.0)
    step(scaler, *third, 0.0, 4.0)
    scaler.update()
    assert float(scaler.gradient_norm) == 5.0
    assert (int(scaler.skipped_steps), int(scaler.consecutive_skips)) == (1, 0)


def test_an_optimizer_may_get_new_variables_later():
    """Events name them too."""
    scaler, optimizer = GradScaler(rule=RULE), keras.optimizers.SGD(1.0)
    weights = [keras.Variable([1.0], name=name) for name in "abc"]
    optimizer.build(weights)
    for weight in weights:
        assert not step(scaler, optimizer, weight, np.nan)
        scaler.update()
    assert [event.variable for event in scaler.drain_events()] == ["a", "b", "c"]


@pytest.mark.parametrize("value", [1.0, np.inf])
def test_an_optimizer_that_was_only_unscaled_counts(value):
    """As in PyTorch, with or without another one that steps. It may skip unscale in the next iteration."""
    for steps in (False, True):
        scaler, first, second = GradScaler(rule=RULE), pair("a"), pair("b")
        scaler.unscale(first[0], [scaled(scaler, 3.0, value)])
        if steps:
            assert step(scaler, *second, 4.0, 0.0)
        scaler.update()
        bad = not np.isfinite(value)
        assert (scaler.get_scale(), int(scaler.attempted_steps), int(scaler.skipped_steps)) == (4 if bad else 8, 1, bad)
        assert scaler.drain_events() == ([ScaleChange(0, 8.0, 4.0, "overflow", None)] if bad else [])
        if not bad:
            assert float(scaler.gradient_norm) == pytest.approx((10 + 16 * steps) ** 0.5)
        assert step(scaler, *first, 1.0, 1.0)
        np.testing.assert_array_equal(first[1].numpy(), [0.0, 1.0])


# Order of calls.


def unscale_twice(scaler, optimizer, _weight):
    scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])


def unscale_after_step(scaler, optimizer, weight):
    step(scaler, optimizer, weight, 1.0, 1.0)
    scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])


def step_twice(scaler, optimizer, weight):
    step(scaler, optimizer, weight, 1.0, 1.0)
    step(scaler, optimizer, weight, 1.0, 1.0)


def step_with_none(scaler, optimizer, weight):
    scaler.step(optimizer, [(None, weight)])


def step_with_nothing(scaler, optimizer, weight):
    step(scaler, optimizer, weight, 1.0, 1.0)
    scaler.update()
    scaler.step(optimizer, [])


def unscale_none(scaler, optimizer, _weight):
    scaler.unscale(optimizer, [None])


def update_first(scaler, _optimizer, _weight):
    scaler.update()


def update_twice(scaler, optimizer, weight):
    step(scaler, optimizer, weight, 1.0, 1.0)
    scaler.update()
    scaler.update()


def step_after_loading(scaler, optimizer, weight):
    (grads,) = scaler.unscale(optimizer, [scaled(scaler, 1.0, np.inf)])
    scaler.load_state_dict(scaler.state_dict())
    scaler.step(optimizer, [(ops.clip(grads, -1.0, 1.0), weight)])


def step_after_update(scaler, optimizer, weight):
    (grads,) = scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    scaler.update(4.0)
    scaler.step(optimizer, [(ops.clip(grads, -1.0, 1.0), weight)])


def step_with_gradients_of_an_earlier_iteration(scaler, optimizer, weight):
    (grads,) = scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    scaler.update(4.0)
    scaler.scale(1.0)
    scaler.step(optimizer, [(grads, weight)])


def step_with_gradients_of_another_optimizer(scaler, optimizer, weight):
    (grads,) = scaler.unscale(keras.optimizers.SGD(), [scaled(scaler, 1.0, 1.0)])
    scaler.step(optimizer, [(grads, weight)])


def step_with_gradients_of_another_scaler(scaler, optimizer, weight):
    (grads,) = GradScaler(init_scale=8.0).unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    scaler.step(optimizer, [(grads, weight)])


def unscale_unscaled_gradients(scaler, optimizer, _weight):
    scaler.unscale(optimizer, scaler.unscale(keras.optimizers.SGD(), [scaled(scaler, 1.0, 1.0)]))


def step_with_scaled_gradients(scaler, optimizer, weight):
    grads = [scaled(scaler, 1.0, 1.0)]
    scaler.unscale(optimizer, grads)
    scaler.step(optimizer, zip(grads, [weight], strict=True))


WRONG = {
    unscale_twice: "unscaled already",
    unscale_after_step: "stepped already",
    step_twice: "twice",
    step_with_none: "gradient",
    step_with_nothing: "gradient",
    unscale_none: "gradient",
    update_first: "without",
    update_twice: "without",
    step_after_loading: "earlier iteration",
    step_after_update: "earlier iteration",
    step_with_gradients_of_an_earlier_iteration: "another iteration",
    step_with_gradients_of_another_optimizer: "another optimizer",
    step_with_gradients_of_another_scaler: "another scaler",
    unscale_unscaled_gradients: "another optimizer",
    step_with_scaled_gradients: "still scaled",
}


@pytest.mark.parametrize(("calls", "message"), WRONG.items(), ids=[calls.__name__ for calls in WRONG])
def test_a_wrong_order_is_an_error(calls, message):
    """The error tells the order of calls, and the scaler still works after it."""
    scaler, parts = GradScaler(init_scale=8.0), pair()
    with pytest.raises(RuntimeError, match=f"{message}.*each iteration"):
        calls(scaler, *parts)
    scaler.update(8.0)
    assert run(scaler, "TF", parts) == [8.0, 4.0]


def test_nothing_is_kept_alive():
    """Neither optimizer nor variables nor gradients."""
    scaler, (optimizer, weight) = GradScaler(), pair()
    grads = scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    scaler.step(optimizer, zip(grads, [weight], strict=True))
    scaler.update()
    references = [weakref.ref(thing) for thing in (optimizer, weight, *grads)]
    del optimizer, weight, grads
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_the_same_gradients_may_be_used_in_the_next_iteration():
    """Constants, for instance, are not reported as still scaled."""
    scaler, (optimizer, weight) = GradScaler(init_scale=1.0, backoff_factor=0.5), pair()
    grads = [ops.ones(2)]
    scaler.step(optimizer, zip(scaler.unscale(optimizer, grads), [weight], strict=True))
    scaler.update()
    scaler.step(optimizer, zip(grads, [weight], strict=True))
    scaler.update()
    scaler.unscale(optimizer, grads)
    scaler.update(2.0)
    scaler.step(optimizer, zip(scaler.unscale(optimizer, grads), [weight], strict=True))
    np.testing.assert_array_equal(weight.numpy(), [-1.5, -0.5])


# update(new_scale).


@pytest.mark.parametrize("value", [64.0, np.float32(64), "tensor"], ids=str)
def test_update_with_a_new_scale(value):
    """The change is logged, the step counts, and the growth tracker stays as it was, as in PyTorch."""
    scaler, parts = GradScaler(rule=RULE), pair()
    run(scaler, "T", parts)
    step(scaler, *parts, 1.0, np.inf)
    scaler.update(ops.convert_to_tensor(64.0) if value == "tensor" else value)
    assert scaler.drain_events() == [ScaleChange(1, 8.0, 64.0, "set")]
    assert (int(scaler.attempted_steps), int(scaler.skipped_steps)) == (2, 1)
    assert run(scaler, "T", parts) == [128.0]
    scaler.update(32)  # without a step
    assert (scaler.get_scale(), int(scaler.attempted_steps)) == (32.0, 3)


def test_a_new_scale_out_of_bounds_is_an_error():
    """The scaler stays as it was."""
    scaler, parts = GradScaler(rule=RULE), pair()
    step(scaler, *parts, 1.0, 1.0)
    for value in (0.0, np.inf, np.nan, -1.0, 2.0**25):
        with pytest.raises(ValueError, match="new_scale"):
            scaler.update(value)
    scaler.update()
    assert scaler.get_scale() == 8.0


# State dict, pickle and copy.


@pytest.mark.parametrize(
    "rule",
    [
        None,
        DynamicScale(growth_interval=3, hysteresis=2),
        *(pytest.param(rule, marks=slow) for rule in (128, LogMaxScale())),
    ],
    ids=str,
)
def test_a_restored_scaler_continues(rule):
    """The state survives JSON, and a scaler with other arguments takes it over with its counters."""
    trace, rest = "TTFTFFT", "TTFTTTTFTT"
    whole = GradScaler(rule=rule)
    run(whole, trace)
    saved = json.loads(json.dumps(whole.state_dict()))
    restored = GradScaler(init_scale=2.0)
    restored.load_state_dict(saved)
    assert restored.state_dict() == saved
    assert run(restored, rest) == run(whole, rest)
    assert int(restored.skipped_steps) == int(whole.skipped_steps) == 5


@pytest.mark.parametrize(
    ("duplicate", "enabled"),
    [(copy.deepcopy, True), (lambda scaler: pickle.loads(pickle.dumps(scaler)), False)],
    ids=["copy", "pickle"],
)
def test_copy_and_pickle(duplicate, enabled):
    """A duplicate continues as the original, used or not."""
    scaler = GradScaler(64.0, growth_interval=2, enabled=enabled, max_consecutive_skips=7, event_capacity=3)
    assert duplicate(scaler).get_scale() == scaler.get_scale()
    if enabled:
        run(scaler, "TTF")
    again = duplicate(scaler)
    assert (again.max_consecutive_skips, again.event_capacity, again.is_enabled()) == (7, 3, enabled)
    assert again.state_dict() == scaler.state_dict()
    if enabled:
        assert run(again, "TFT") == run(scaler, "TFT")


PYTORCH = {"scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 5, "_growth_tracker": 3}


def test_a_state_of_pytorch_is_loaded():
    """With its factors, as in PyTorch. The saved state has the same entries."""
    scaler = GradScaler()
    scaler.load_state_dict(PYTORCH)
    assert PYTORCH.items() <= scaler.state_dict().items()
    assert run(scaler, "TTF") == [1024.0, 4096.0, 1024.0]


def test_a_state_brings_its_rule():
    """Into a scaler in use whose rule has fewer variables."""
    scaler, saved = GradScaler(rule=2.0), GradScaler(rule=RULE)
    run(scaler, "TF")
    assert run(saved, "TTT") == [8.0, 16.0, 16.0]
    scaler.load_state_dict(saved.state_dict())
    assert run(scaler, "TF") == run(saved, "TF") == [32.0, 16.0]


def test_entries_of_pytorch_take_precedence():
    """An edited scale of a saved state takes effect."""
    scaler = GradScaler()
    scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0, "growth_interval": 2, "_growth_tracker": 1})
    assert run(scaler, "T") == [8.0]


BROKEN = {
    "empty": ({}, "not enabled"),
    "no scale": ({name: value for name, value in PYTORCH.items() if name != "scale"}, "scale"),
    "no tracker": ({name: value for name, value in PYTORCH.items() if name != "_growth_tracker"}, "_growth_tracker"),
    "scale 0": ({**PYTORCH, "scale": 0.0}, "scale"),
    "scale inf": ({**PYTORCH, "scale": np.inf}, "scale"),
    "scale above the rule's": ({**PYTORCH, "rule": DynamicScale().get_config(), "scale": 2.0**30}, "scale"),
    "factor": ({**PYTORCH, "growth_factor": 0.5}, "growth_factor"),
    "interval": ({**PYTORCH, "growth_interval": 1.5}, "growth_interval"),
    "tracker": ({**PYTORCH, "_growth_tracker": "3"}, "_growth_tracker"),
    "rule": ({**PYTORCH, "rule": {"rule": "Nonsense"}}, "rule"),
    "rule type": ({**PYTORCH, "rule": 3}, "dictionary"),
    "state type": ({**PYTORCH, "state": []}, "dictionary"),
    "state": ({**PYTORCH, "state": {}}, "entry"),
}


def test_a_broken_state_is_an_error():
    """The error names the entry, and nothing is loaded."""
    scaler = GradScaler(8.0)
    run(scaler, "TF")
    before = scaler.state_dict()
    for broken, message in BROKEN.values():
        with pytest.raises(ValueError, match=message):
            scaler.load_state_dict(broken)
        assert scaler.state_dict() == before


def test_loading_forgets_an_open_iteration():
    """A step before it does not count for the loaded run."""
    scaler, parts = GradScaler(8.0), pair()
    saved = scaler.state_dict()
    step(scaler, *parts, 1.0, np.inf)
    scaler.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="update"):
        scaler.update()
    assert run(scaler, "T", parts) == [8.0]


# Arguments.


def test_a_disabled_scaler_passes_everything_through():
    """It checks no order and no gradients, and saves nothing."""
    scaler, (optimizer, weight) = GradScaler(enabled=False), pair()
    assert scaler.scale(3.0) == 3.0
    scaler.update()
    grads = [ops.convert_to_tensor([1.0, np.inf])]
    assert scaler.unscale(optimizer, grads)[0] is grads[0]
    assert scaler.step(optimizer, zip(grads, [weight], strict=True))
    assert scaler.step(optimizer, [(ops.ones(2), weight)])
    np.testing.assert_array_equal(weight.numpy(), [-1.0, -np.inf])
    assert (scaler.get_scale(), scaler.is_enabled(), scaler.state_dict()) == (1.0, False, {})
    scaler.load_state_dict({"scale": 7.0})
    assert scaler.get_scale() == 1.0
    assert GradScaler(init_scale=0.0, enabled=False).get_scale() == 1.0  # as in PyTorch, nothing is checked


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scaler: scaler.step("adam", []), "optimizer"),
        (lambda scaler: scaler.step(keras.optimizers.SGD, []), "optimizer"),
        (lambda scaler: scaler.step(pair()[0], [ops.ones(2)]), "pairs"),
        (lambda scaler: scaler.step(pair()[0], [(pair()[1], ops.ones(2))]), "pairs"),
        (lambda scaler: scaler.unscale(pair()[0], [(ops.ones(2), pair()[1])]), "grads"),
        (lambda scaler: scaler.unscale(pair()[0], [4.0]), "grads"),
    ],
)
def test_wrong_optimizers_and_gradients_are_errors(call, message):
    """Before anything is done."""
    with pytest.raises(TypeError, match=message):
        call(GradScaler())


class LossScaleFreeSGD(keras.optimizers.SGD):
    """Does not scale, whatever its name."""


def factor_scales():
    optimizer = keras.optimizers.SGD()
    optimizer.loss_scale_factor = 8.0
    return optimizer


def part_scales():
    part = keras.optimizers.SGD()
    optimizer = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(part))
    part.loss_scale_factor = 8.0
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossScaleOptimizer("sgd"), "must not scale"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "auto_scale_loss"),
        (factor_scales, "loss_scale_factor"),
        *[(part_scales, "loss_scale_factor")] * hasattr(keras.optimizers, "MultiOptimizer"),  # from Keras 3.15 on
    ],
)
def test_optimizers_that_scale_by_themselves_are_errors(make, message):
    """Otherwise gradients would be unscaled twice."""
    for call in (
        lambda scaler: scaler.step(make(), [(ops.ones(2), pair()[1])]),
        lambda scaler: scaler.unscale(make(), [ops.ones(2)]),
    ):
        with pytest.raises(ValueError, match=message):
            call(GradScaler())
    assert step(GradScaler(), LossScaleFreeSGD(), pair()[1], 1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0.0}, "init_scale"),
        ({"init_scale": "cuda"}, "device"),
        ({"rule": "deepspeed"}, "like"),
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"rule": "nonsense"}, "scale"),
        ({"rule": 8, "growth_factor": 4.0}, "excludes"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips"),
        ({"event_capacity": 0}, "event_capacity"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(arguments, message):
    """The error names the argument."""
    with pytest.raises(ValueError, match=message):
        GradScaler(**arguments)


# Events and the logger.


def test_events():
    """Growth, overflow, and a count of what the buffer could not hold."""
    scaler = GradScaler(rule=RULE, event_capacity=2)
    parts = pair()
    run(scaler, "TTFT", parts)
    path = parts[1].path
    assert scaler.drain_events() == [ScaleChange(1, 8.0, 16.0, "growth"), ScaleChange(2, 16.0, 8.0, "overflow", path)]
    assert scaler.drain_events() == []
    run(scaler, "FFF", parts)
    assert scaler.drain_events()[0] == EventsLost(1, before_step=5)


@pytest.mark.parametrize("unscales", [False, pytest.param(True, marks=slow)])
def test_an_exhausted_scale_names_the_variables_of_all_optimizers(unscales):
    """Overflows of an earlier row of skipped steps do not count, nor those of an optimizer that no longer steps."""
    scaler = GradScaler(rule=DynamicScale(initial_scale=4.0), max_consecutive_skips=6)
    first, second, gone = pair("first"), pair("second"), pair("gone")

    def iteration(*steps):
        for (optimizer, weight), value in steps:
            grads = [scaled(scaler, value, 1.0)]
            grads = scaler.unscale(optimizer, grads) if unscales else grads
            scaler.step(optimizer, zip(grads, [weight], strict=True))
        scaler.update()

    for _ in range(3):
        iteration((first, np.nan), (gone, np.nan))
    iteration((first, 1.0))
    for number in range(6):
        scaler.raise_if_exhausted()
        iteration((first, np.nan if number % 2 else 1.0), (second, np.inf))
    with pytest.raises(LossScaleExhausted) as raised:
        scaler.raise_if_exhausted()
    assert (raised.value.skips, raised.value.since_step) == (6, 4)
    assert {path: count for path, count in raised.value.overflows.items() if count} == {"second": 6, "first": 3}


def test_the_logger_logs_a_custom_loop(tmp_path, capsys):
    """Its hooks are called by hand, and write the same lines and logs as in `fit`."""
    path, logs = tmp_path / "log.jsonl", {}
    scaler, parts = GradScaler(rule=RULE), pair("w")
    logger = LossScaleLogger(path).watch(scaler)
    logger.on_train_begin()
    for epoch in range(2):
        logger.on_epoch_begin(epoch)
        for batch, letter in enumerate("TTF"):
            run(scaler, letter, parts)
            logger.on_train_batch_end(batch, logs)
        logger.on_epoch_end(epoch, logs)
    logger.on_train_end()
    assert [record for record in records.read_log(path) if isinstance(record, ScaleChange)] == [
        ScaleChange(1, 8.0, 16.0, "growth", epoch=0),
        ScaleChange(2, 16.0, 8.0, "overflow", "w", epoch=0),
        ScaleChange(4, 8.0, 16.0, "growth", epoch=1),
        ScaleChange(5, 16.0, 8.0, "overflow", "w", epoch=1),
    ]
    assert (logs["loss_scale"], logs["skipped_steps"]) == (8.0, 2.0)
    assert "overflow" in capsys.readouterr().out
    with pytest.raises(TypeError, match="GradScaler"):
        LossScaleLogger().watch(3)


def test_the_logger_raises_if_the_scale_is_exhausted():
    """An error is raised when it collects events."""
    scaler = GradScaler(rule=DynamicScale(initial_scale=1.0), max_consecutive_skips=3)
    logger = LossScaleLogger(every=1, verbose=0).watch(scaler)
    logger.on_epoch_begin(0)
    parts = pair()
    for batch in range(2):
        run(scaler, "F", parts)
        logger.on_train_batch_end(batch, {})
    run(scaler, "F", parts)
    with pytest.raises(LossScaleExhausted):
        logger.on_train_batch_end(2, {})


def test_the_logger_warns_of_a_loop_that_mostly_skipped():
    """At its end, counting from its start."""
    scaler, parts = GradScaler(rule=DynamicScale(initial_scale=2.0**12)), pair()
    run(scaler, "FFFF", parts)
    logger = LossScaleLogger(verbose=0).watch(scaler)
    logger.on_epoch_begin(0)
    run(scaler, "FFFTFF", parts)
    with pytest.warns(UserWarning, match=r"5 of the 6 steps.* w \("):
        logger.on_train_end()


def test_gradients_of_a_real_loss():
    """The loop of the class docstring trains as one without a scaler."""
    weights = [keras.Variable([3.0, 4.0], name="plain"), keras.Variable([3.0, 4.0], name="scaled")]
    optimizers, scaler = [keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1)], GradScaler()

    def loss(x):
        return ops.sum(ops.square(x))

    for _ in range(3):
        optimizers[0].apply([gradient(loss, weights[0].value)], [weights[0]])
        grads = [gradient(lambda x: scaler.scale(loss(x)), weights[1].value)]
        assert scaler.step(optimizers[1], zip(grads, [weights[1]], strict=True))
        scaler.update()
    np.testing.assert_allclose(weights[1].numpy(), weights[0].numpy(), rtol=1e-6)
