"""`GradScaler` where each call runs at once: on all backends."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import keras
import numpy as np
import pytest
from backend import gradient, needs_tensorflow
from keras import ops

from tfmixed import GradScaler, LossScaleOptimizer, records, scaling
from tfmixed.callbacks import LossScaleLogger
from tfmixed.errors import LossScaleExhausted
from tfmixed.records import EventsLost, ScaleChange
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale

RULE = DynamicScale(initial_scale=8.0, growth_interval=2)
ORDER = r"In each iteration the order is: scale, then for each optimizer unscale \(if at all\) and step, then update"


def pair(name="w", start=(1.0, 2.0)):
    """Returns an optimizer that subtracts gradients, and a variable of its own."""
    return keras.optimizers.SGD(1.0), keras.Variable(start, name=name)


def scaled(scaler, *values):
    """Returns the gradient of a scaled loss."""
    return scaler.scale(ops.convert_to_tensor(np.array(values, "float32")))


def step(scaler, optimizer, weight, *values):
    return bool(scaler.step(optimizer, [(scaled(scaler, *values), weight)]))


def run(scaler, trace, parts=None):
    """Takes steps with gradients of 1, or with one that is infinite; returns the scale after each."""
    parts, scales = parts or pair(), []
    for letter in trace:
        assert step(scaler, *parts, 1.0, 1.0 if letter == "T" else np.inf) is (letter == "T")
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


# The rule and the step.


@pytest.mark.parametrize("peer", scaling.PEERS)
def test_scale_and_counters_follow_any_preset(peer):
    """As `simulate` has it; the weights move in finite steps only."""
    trace, rule = "TTFTTTTFFTTT", scaling.like(peer)
    rule = {"openseq2seq_logmax": rule}.get(peer) or DynamicScale(**{**vars(rule), "growth_interval": 3})
    scaler, parts = GradScaler(rule=rule), pair(start=(0.0, 0.0))
    np.testing.assert_allclose(run(scaler, trace, parts), scaling.simulate(rule, trace, [1.0] * 12), rtol=1e-5)
    assert (int(scaler.attempted_steps), int(scaler.skipped_steps), int(scaler.consecutive_skips)) == (12, 3, 0)
    np.testing.assert_array_equal(parts[1].numpy(), [-9.0, -9.0])


@pytest.mark.parametrize("rule", [128, None, "dynamic", ConstantScale(4.0), {"rule": "DynamicScale"}], ids=str)
def test_whatever_stands_for_a_rule_is_one(rule):
    """As in `scaling.get`; None is PyTorch's."""
    wanted = scaling.like("torch") if rule is None else scaling.get(rule)
    scaler = GradScaler(rule=rule)
    assert (scaler.rule, scaler.get_scale()) == (wanted, float(wanted.start().scale))
    assert isinstance(scaler.get_scale(), float)


def test_pytorchs_numbers_and_its_questions():
    """Defaults and arguments by place."""
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


@pytest.mark.parametrize("make", [lambda: GradScaler(rule=8), lambda: GradScaler(enabled=False)])
def test_numbers_that_a_rule_has_not_are_neither_got_nor_set(make):
    """By name."""
    for act in (lambda scaler: scaler.get_growth_factor(), lambda scaler: scaler.set_growth_interval(3)):
        with pytest.raises(ValueError, match=r"rule must have a growth_\w+ to get or set, received ConstantScale"):
            act(make())


def test_a_step_that_is_checked_by_nobody():
    """skip_nonfinite=False steps whatever comes, and says so."""
    scaler, (optimizer, weight) = GradScaler(rule=ConstantScale(2.0, skip_nonfinite=False)), pair()
    assert step(scaler, optimizer, weight, 1.0, np.inf)
    scaler.update()
    assert (int(scaler.attempted_steps), int(scaler.skipped_steps)) == (1, 0)
    assert weight.numpy()[1] == -np.inf


@pytest.mark.parametrize(("letter", "bounds"), [("F", (0.0, 1e-30)), ("T", (1e30, np.inf))])
def test_the_scale_reaches_neither_0_nor_inf(letter, bounds):
    """PyTorch's own reaches 0, and then skips nothing that it should (pytorch#98828)."""
    scaler, parts = GradScaler(growth_factor=2.0**10, backoff_factor=2.0**-10, growth_interval=1), pair()
    for _ in range(30):
        scaler.step(parts[0], [(ops.ones(2) if letter == "T" else ops.full((2,), np.nan), parts[1])])
        scaler.update()
    assert bounds[0] < scaler.get_scale() < bounds[1]
    assert np.isfinite(parts[1].numpy()).all()


def test_losses_are_scaled_in_float32_at_least():
    """One, or any structure of them; a float16 loss times 2**16 is no inf."""
    scaled = GradScaler().scale({"a": ops.cast(2.0, "float16"), "b": [ops.convert_to_tensor(1.0), 3.0]})
    assert keras.backend.standardize_dtype(scaled["a"].dtype) == "float32"
    assert [float(each) for each in keras.tree.flatten(scaled)] == [2.0**17, 2.0**16, 3 * 2.0**16]
    assert list(map(float, GradScaler(8.0).scale(map(float, "12")))) == [8.0, 16.0]


@pytest.mark.parametrize("by_hand", [False, True])
def test_finite_is_judged_after_unscaling(by_hand):
    """A gradient that is finite while it is scaled by less than 1 (pytorch#99640)."""
    scaler, (optimizer, weight) = GradScaler(init_scale=2.0**-10), pair()
    grads = [ops.convert_to_tensor([1e37, 1.0])]
    if by_hand:
        grads = scaler.unscale(optimizer, grads)
    assert not scaler.step(optimizer, zip(grads, [weight], strict=True))
    scaler.update()
    assert scaler.get_scale() == 2.0**-11
    np.testing.assert_array_equal(weight.numpy(), [1.0, 2.0])


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_unscaled_gradients_may_be_clipped():
    """They are in training terms, None stays None, the norm is that before the clip."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    missing = keras.Variable([1.0], name="missing")
    none, grads = scaler.unscale(optimizer, [None, scaled(scaler, 3.0, 4.0)])
    assert none is None
    np.testing.assert_array_equal(ops.convert_to_numpy(grads), [3.0, 4.0])
    assert scaler.step(optimizer, [(None, missing), (ops.clip(grads, -1.0, 1.0), weight)])
    scaler.update()
    assert float(scaler.gradient_norm) == 5.0
    np.testing.assert_array_equal(weight.numpy(), [0.0, 1.0])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_no_clip_hides_an_overflow(bad, drop):
    """The gradients that step is given are all finite; the variable is named, though None was dropped in between."""
    scaler, optimizer = GradScaler(init_scale=8.0), keras.optimizers.SGD(1.0)
    weights = [keras.Variable([1.0], name=name) for name in "abc"]
    for value in (1.0, bad):
        grads = scaler.unscale(optimizer, [None, scaled(scaler, 1.0), scaled(scaler, value)])
        pairs = [
            (None, weights[0]),
            *((ops.clip(ops.nan_to_num(g), -1, 1), w) for g, w in zip(grads[1:], weights[1:], strict=True)),
        ]
        stepped = scaler.step(optimizer, pairs[1:] if drop else pairs)
        scaler.update()
        assert bool(stepped) is (value == 1.0)
    np.testing.assert_array_equal([weight.numpy()[0] for weight in weights], [1.0, 0.0, 0.0])
    assert scaler.drain_events() == [ScaleChange(1, 8.0, 4.0, "overflow", "c")]


def test_what_a_clip_makes_of_an_infinite_norm_is_skipped():
    """NaN that came after unscale is judged too."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    assert not scaler.step(optimizer, [(ops.convert_to_tensor([np.nan, 1.0]), weight)])
    scaler.update()
    assert (scaler.get_scale(), int(scaler.skipped_steps)) == (4.0, 1)


def test_a_rule_sees_the_largest_gradient_of_all_before_the_clip():
    """LogMax, with two optimizers, one of them unscaled by hand."""
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
    """The scales of float8 layers: given as they are, with unscale and without."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    weight.overwrite_with_gradient = True
    optimizer.build([weight])
    assert scaler.step(optimizer, [(ops.convert_to_tensor([5.0, 6.0]), weight)])
    scaler.update()
    grads = scaler.unscale(optimizer, [ops.convert_to_tensor([7.0, 8.0])])
    assert scaler.step(optimizer, zip(grads, [weight], strict=True))
    np.testing.assert_array_equal(weight.numpy(), [7.0, 8.0])


def test_variables_that_hold_their_gradient_need_a_built_optimizer_for_unscale():
    """It cannot know them otherwise: said by name, and nothing is written."""
    scaler, (optimizer, weight) = GradScaler(init_scale=8.0), pair()
    weight.overwrite_with_gradient = True
    grads = scaler.unscale(optimizer, [ops.convert_to_tensor([8.0, 8.0])])
    with pytest.raises(RuntimeError, match=r"overwrites w, .* call `optimizer\.build\(variables\)` before"):
        scaler.step(optimizer, zip(grads, [weight], strict=True))
    np.testing.assert_array_equal(weight.numpy(), [1.0, 2.0])


@needs_tensorflow
@pytest.mark.parametrize("by_hand", [False, True])
def test_sparse_gradients_stay_sparse(by_hand):
    """IndexedSlices of an embedding."""
    import tensorflow as tf

    scaler, optimizer, table = GradScaler(init_scale=4.0), keras.optimizers.SGD(1.0), keras.Variable(np.ones((3, 2)))
    for value in (4.0, np.inf):
        slices = tf.IndexedSlices(tf.fill((1, 2), value), tf.constant([1]), tf.constant([3, 2]))
        grads = scaler.unscale(optimizer, [slices]) if by_hand else [slices]
        assert isinstance(grads[0], tf.IndexedSlices)
        assert bool(scaler.step(optimizer, zip(grads, [table], strict=True))) is (value == 4.0)
        scaler.update()
    np.testing.assert_array_equal(table.numpy(), [[1, 1], [0, 0], [1, 1]])


# Several optimizers.


def test_only_the_optimizer_that_overflowed_skips_and_the_scale_backs_off_once():
    """Counters count iterations; the event names the first guilty variable; the norm is that of all."""
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


def test_an_optimizer_may_get_other_variables_later():
    """Events name them all the same."""
    scaler, optimizer = GradScaler(rule=RULE), keras.optimizers.SGD(1.0)
    weights = [keras.Variable([1.0], name=name) for name in "abc"]
    optimizer.build(weights)
    for weight in weights:
        assert not step(scaler, optimizer, weight, np.nan)
        scaler.update()
    assert [event.variable for event in scaler.drain_events()] == ["a", "b", "c"]


@needs_tensorflow
def test_functions_that_were_compiled_before_an_optimizer_got_more_variables_go_on_counting():
    """A run that is stuck names the variables of both."""
    import tensorflow as tf

    scaler, optimizer = (
        GradScaler(rule=DynamicScale(initial_scale=1.0), max_consecutive_skips=4),
        keras.optimizers.SGD(),
    )
    weights = [keras.Variable([1.0], name=name) for name in "ab"]
    optimizer.build(weights)

    def compiled(weight):
        return tf.function(lambda: scaler.step(optimizer, [(tf.constant([np.nan]), weight)]))

    steps = [compiled(weight) for weight in weights]
    for number in (0, 1, 0, 0):
        steps[number]()
        scaler.update()
    with pytest.raises(LossScaleExhausted, match=r"often: a \(3 times\), b \(1 times\)\."):
        scaler.raise_if_exhausted()


# Wrong orders.


NOT_READY = "unscale must be called at most once and before step, received an optimizer"
NOTHING = "update must follow unscale or step, received neither since the last update"

LEFT = (
    "step must be given gradients of this iteration, received an optimizer whose gradients were unscaled in an earlier "
    "one, and no loss was scaled since"
)
FOREIGN = "must not be given gradients that were unscaled for another optimizer, by another scaler .*, received such"


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


def unscale_what_is_unscaled(scaler, optimizer, _weight):
    scaler.unscale(optimizer, scaler.unscale(keras.optimizers.SGD(), [scaled(scaler, 1.0, 1.0)]))


def step_with_what_is_still_scaled(scaler, optimizer, weight):
    grads = [scaled(scaler, 1.0, 1.0)]
    scaler.unscale(optimizer, grads)
    scaler.step(optimizer, zip(grads, [weight], strict=True))


WRONG = {
    unscale_twice: f"{NOT_READY} unscaled already",
    unscale_after_step: f"{NOT_READY} stepped already",
    step_twice: "step must be called once for each optimizer, received one that has stepped already",
    step_with_none: "step must be given a gradient, received 1 times None",
    step_with_nothing: "step must be given a gradient, received 0 times None",
    unscale_none: "unscale must be given a gradient, received 1 times None",
    update_first: NOTHING,
    update_twice: NOTHING,
    step_after_loading: LEFT,
    step_after_update: LEFT,
    step_with_gradients_of_an_earlier_iteration: f"step {FOREIGN}",
    step_with_gradients_of_another_optimizer: f"step {FOREIGN}",
    step_with_gradients_of_another_scaler: f"step {FOREIGN}",
    unscale_what_is_unscaled: f"unscale {FOREIGN}",
    step_with_what_is_still_scaled: "step must be given what unscale returned, received .* that are still scaled",
}


@pytest.mark.parametrize(("act", "message"), WRONG.items(), ids=[act.__name__ for act in WRONG])
def test_a_wrong_order_says_the_right_one(act, message):
    """And leaves the scaler fit to go on."""
    scaler, parts = GradScaler(init_scale=8.0), pair()
    with pytest.raises(RuntimeError, match=f"{message}. {ORDER}"):
        act(scaler, *parts)
    scaler.update(8.0)  # whatever stands open
    assert run(scaler, "TF", parts) == [8.0, 4.0]


@pytest.mark.parametrize("value", [1.0, np.inf])
def test_an_optimizer_that_was_only_unscaled_counts(value):
    """Whether or not another one steps, as in PyTorch; and it may go on in the next iteration without unscale."""
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


def test_nothing_is_kept_alive():
    """Neither an optimizer, nor its variables, nor gradients."""
    scaler, (optimizer, weight) = GradScaler(), pair()
    grads = scaler.unscale(optimizer, [scaled(scaler, 1.0, 1.0)])
    scaler.step(optimizer, zip(grads, [weight], strict=True))
    scaler.update()
    left = [weakref.ref(each) for each in (optimizer, weight, *grads)]
    del optimizer, weight, grads
    gc.collect()
    assert [reference() for reference in left] == [None] * 3


def test_the_same_gradients_may_come_again_in_another_iteration():
    """Constants, for instance: no false alarm."""
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


@pytest.mark.parametrize("value", [64.0, 64, np.float32(64), "tensor"], ids=str)
def test_a_scale_set_by_hand(value):
    """It is logged, the step counts, and what counts towards a growth stays as it was, as in PyTorch."""
    scaler, parts = GradScaler(rule=RULE), pair()
    run(scaler, "T", parts)
    step(scaler, *parts, 1.0, np.inf)
    scaler.update(ops.convert_to_tensor(64.0) if value == "tensor" else value)
    assert scaler.drain_events() == [ScaleChange(1, 8.0, 64.0, "set")]
    assert (int(scaler.attempted_steps), int(scaler.skipped_steps)) == (2, 1)
    assert run(scaler, "T", parts) == [128.0]
    scaler.update(32)  # without a step
    assert (scaler.get_scale(), int(scaler.attempted_steps)) == (32.0, 3)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, -1.0, 2.0**25])
def test_a_scale_out_of_bounds_is_refused(value):
    """By its name, and without effect."""
    scaler, parts = GradScaler(rule=RULE), pair()
    step(scaler, *parts, 1.0, 1.0)
    with pytest.raises(ValueError, match="new_scale must be a finite float32 number"):
        scaler.update(value)
    scaler.update()
    assert scaler.get_scale() == 8.0


# Saving.


@pytest.mark.parametrize("rule", [None, 128, DynamicScale(growth_interval=3, hysteresis=2), LogMaxScale()], ids=str)
def test_a_restored_scaler_goes_on_as_if_nothing_had_happened(rule):
    """By way of JSON, into one made with other arguments; counters too."""
    trace, rest = "TTFTFFT", "TTFTTTTFTT"
    whole = GradScaler(rule=rule)
    run(whole, trace)
    saved = json.loads(json.dumps(whole.state_dict()))
    restored = GradScaler(init_scale=2.0)
    restored.load_state_dict(saved)
    assert restored.state_dict() == saved
    assert run(restored, rest) == run(whole, rest)
    assert int(restored.skipped_steps) == int(whole.skipped_steps) == 5


@pytest.mark.parametrize("again", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_is_copied_and_pickled(again, enabled):
    """Used or not, it goes on as the other does."""
    scaler = GradScaler(64.0, growth_interval=2, enabled=enabled, max_consecutive_skips=7, event_capacity=3)
    assert again(scaler).get_scale() == scaler.get_scale()
    if enabled:
        run(scaler, "TTF")
    other = again(scaler)
    assert (other.max_consecutive_skips, other.event_capacity, other.is_enabled()) == (7, 3, enabled)
    assert other.state_dict() == scaler.state_dict()
    if enabled:
        assert run(other, "TFT") == run(scaler, "TFT")


PYTORCHS = {"scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 5, "_growth_tracker": 3}


def test_a_state_of_pytorchs_is_loaded():
    """Its factors too, as in PyTorch; and it is found again in what is saved."""
    scaler = GradScaler()
    scaler.load_state_dict(PYTORCHS)
    assert PYTORCHS.items() <= scaler.state_dict().items()
    assert run(scaler, "TTF") == [1024.0, 4096.0, 1024.0]


def test_a_state_of_another_rule_brings_its_rule():
    """With all that this one remembers, where a scaler was in use that remembers less."""
    scaler, other = GradScaler(rule=2.0), GradScaler(rule=RULE)
    run(scaler, "TF")
    assert run(other, "TTT") == [8.0, 16.0, 16.0]
    scaler.load_state_dict(other.state_dict())
    assert run(scaler, "TF") == run(other, "TF") == [32.0, 16.0]


def test_an_entry_of_pytorchs_counts_where_two_say_the_same():
    """Whoever edits the scale of a saved state gets it."""
    scaler = GradScaler()
    scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0, "growth_interval": 2, "_growth_tracker": 1})
    assert run(scaler, "T") == [8.0]


BROKEN = {
    "empty": (lambda _: {}, r"must hold 'scale', received \[\]: a scaler that is not enabled"),
    "no scale": (lambda saved: saved.pop("scale") and saved, r"must hold 'scale', received \['_growth_tracker'"),
    "no tracker": (lambda saved: saved.pop("_growth_tracker") and saved, "must hold '_growth_tracker'"),
    "scale 0": (lambda saved: {**saved, "scale": 0.0}, "scale must be .* above 0, received 0.0"),
    "scale inf": (lambda saved: {**saved, "scale": np.inf}, "scale must be a finite .* received inf"),
    "scale above the rule's": (
        lambda saved: {**saved, "rule": DynamicScale().get_config(), "scale": 2.0**30},
        r"scale must be .* at most 1\.67772e\+07, received 1073741824\.0",
    ),
    "factor": (lambda saved: {**saved, "growth_factor": 0.5}, "growth_factor must be .* above 1 .* received 0.5"),
    "interval": (lambda saved: {**saved, "growth_interval": 1.5}, "growth_interval must be a whole number"),
    "tracker": (lambda saved: {**saved, "_growth_tracker": "3"}, "_growth_tracker must be a whole number"),
    "rule": (lambda saved: {**saved, "rule": {"rule": "Nonsense"}}, "rule must be one of"),
    "rule type": (lambda saved: {**saved, "rule": 3}, r"state_dict\['rule'\] must be a dictionary, received 3"),
    "state type": (lambda saved: {**saved, "state": []}, r"state_dict\['state'\] must be a dictionary"),
    "state": (lambda saved: {**saved, "state": {}}, "must hold '.*', received"),
}


@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_state_is_refused_whole(broken, message):
    """By the name of the entry; nothing of it is loaded."""
    scaler = GradScaler(8.0)
    run(scaler, "TF")
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict(broken({**PYTORCHS}))
    assert scaler.state_dict() == before


def test_loading_forgets_an_iteration_that_was_begun():
    """A step before it is none of the loaded run."""
    scaler, parts = GradScaler(8.0), pair()
    saved = scaler.state_dict()
    step(scaler, *parts, 1.0, np.inf)
    scaler.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="update must follow unscale or step"):
        scaler.update()
    assert run(scaler, "T", parts) == [8.0]


# Not enabled, and what is refused.


def test_a_scaler_that_is_not_enabled_passes_all_through():
    """No order, no check, nothing saved."""
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


class LossScaleFreeSGD(keras.optimizers.SGD):
    """Scales nothing, whatever its name."""


def test_an_optimizer_is_not_refused_for_its_name():
    """What counts is what it can do."""
    assert step(GradScaler(), LossScaleFreeSGD(), pair()[1], 1.0, 1.0)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda scaler: scaler.step("adam", []), "optimizer must be an optimizer, .* received 'adam'"),
        (lambda scaler: scaler.step(keras.optimizers.SGD, []), "optimizer must be an optimizer, .* received <class"),
        (lambda scaler: scaler.step(pair()[0], [ops.ones(2)]), "must hold pairs of a gradient and its variable"),
        (lambda scaler: scaler.step(pair()[0], [(pair()[1], ops.ones(2))]), r"pass zip\(grads, variables\)"),
        (lambda scaler: scaler.unscale(pair()[0], [(ops.ones(2), pair()[1])]), r"grads must hold tensors, .* received"),
        (lambda scaler: scaler.unscale(pair()[0], [4.0]), r"grads must hold tensors, .* received 4\.0"),
    ],
)
def test_what_is_no_gradient_or_optimizer_is_refused_by_name(act, message):
    """Before anything is done."""
    with pytest.raises(TypeError, match=message):
        act(GradScaler())


def scales_itself():
    optimizer = keras.optimizers.SGD()
    optimizer.loss_scale_factor = 8.0
    return optimizer


def a_part_scales():
    part = keras.optimizers.SGD()
    optimizer = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(part))
    part.loss_scale_factor = 8.0
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossScaleOptimizer("sgd"), "must not scale the loss itself, received a LossScaleOptimizer: pass the"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "auto_scale_loss=False"),
        (scales_itself, r"optimizer\.loss_scale_factor must be None, received 8\.0"),
        *[(a_part_scales, "received 8.0 of a SGD")] * hasattr(keras.optimizers, "MultiOptimizer"),  # from Keras 3.15 on
    ],
)
def test_optimizers_that_scale_by_themselves_are_refused(make, message):
    """Or gradients would be unscaled twice."""
    for act in (
        lambda scaler: scaler.step(make(), [(ops.ones(2), pair()[1])]),
        lambda scaler: scaler.unscale(make(), [ops.ones(2)]),
    ):
        with pytest.raises(ValueError, match=message):
            act(GradScaler())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0.0}, r"init_scale must be .* above 0, received 0\.0"),
        ({"init_scale": "cuda"}, "init_scale must be .* received 'cuda': .* by name and ignored, device='cuda'"),
        ({"rule": "deepspeed"}, r"rule must be a rule, received 'deepspeed': pass tfmixed\.scaling\.like"),
        ({"growth_factor": 1.0}, "growth_factor must be .* above 1"),
        ({"backoff_factor": 1.0}, "backoff_factor must be .* below 1"),
        ({"growth_interval": 0}, "growth_interval must be a whole number, at least 1"),
        ({"rule": "nonsense"}, "scale must be"),
        ({"rule": 8, "growth_factor": 4.0}, "rule and PyTorch's four numbers exclude each other, received 8 and"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips must be"),
        ({"event_capacity": 0}, "event_capacity must be"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    """Each by its name."""
    with pytest.raises(ValueError, match=message):
        GradScaler(**arguments)


# Events and the logger.


def test_events_are_those_of_the_optimizer():
    """Growth, overflow, and what the ring could not hold."""
    scaler = GradScaler(rule=RULE, event_capacity=2)
    parts = pair()
    run(scaler, "TTFT", parts)
    path = parts[1].path
    assert scaler.drain_events() == [ScaleChange(1, 8.0, 16.0, "growth"), ScaleChange(2, 16.0, 8.0, "overflow", path)]
    assert scaler.drain_events() == []
    run(scaler, "FFF", parts)
    assert scaler.drain_events()[0] == EventsLost(1, before_step=5)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_run_that_is_stuck_names_the_variables_of_all_optimizers(by_hand):
    """Only of this row of skipped steps: an earlier one is forgotten, of optimizers that do not step any more too."""
    scaler = GradScaler(rule=DynamicScale(initial_scale=4.0), max_consecutive_skips=6)
    first, second, gone = pair("first"), pair("second"), pair("gone")

    def iteration(*steps):
        for (optimizer, weight), value in steps:
            grads = [scaled(scaler, value, 1.0)]
            grads = scaler.unscale(optimizer, grads) if by_hand else grads
            scaler.step(optimizer, zip(grads, [weight], strict=True))
        scaler.update()

    for _ in range(3):
        iteration((first, np.nan), (gone, np.nan))
    iteration((first, 1.0))
    for number in range(6):
        scaler.raise_if_exhausted()
        iteration((first, np.nan if number % 2 else 1.0), (second, np.inf))
    with pytest.raises(
        LossScaleExhausted, match=r"All 6 steps since step 4 .*often: second \(6 times\), first \(3 times\)\."
    ):
        scaler.raise_if_exhausted()


def test_the_logger_logs_a_loop(tmp_path, capsys):
    """The hooks are called by hand: the same lines, the same logs."""
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
    assert [each for each in records.read_log(path) if isinstance(each, ScaleChange)] == [
        ScaleChange(1, 8.0, 16.0, "growth", epoch=0),
        ScaleChange(2, 16.0, 8.0, "overflow", "w", epoch=0),
        ScaleChange(4, 8.0, 16.0, "growth", epoch=1),
        ScaleChange(5, 16.0, 8.0, "overflow", "w", epoch=1),
    ]
    assert (logs["loss_scale"], logs["skipped_steps"]) == (8.0, 2.0)
    assert "step 2: loss scale 2^4 -> 2^3 (overflow)  w" in capsys.readouterr().out


def test_only_what_scales_can_be_watched():
    """A mistake is told at once."""
    with pytest.raises(TypeError, match=r"scaler must be a tfmixed\.GradScaler, received 3"):
        LossScaleLogger().watch(3)


def test_the_logger_ends_a_loop_that_is_stuck():
    """Where it collects."""
    scaler = GradScaler(rule=DynamicScale(initial_scale=1.0), max_consecutive_skips=3)
    logger = LossScaleLogger(every=1, verbose=0).watch(scaler)
    logger.on_epoch_begin(0)
    parts = pair()
    for batch in range(2):
        run(scaler, "F", parts)
        logger.on_train_batch_end(batch, {})
    run(scaler, "F", parts)
    with pytest.raises(LossScaleExhausted, match="All 3 steps since step 0"):
        logger.on_train_batch_end(2, {})


def test_the_logger_warns_of_a_loop_that_mostly_skipped():
    """At its end, of the steps since it began."""
    scaler, parts = GradScaler(rule=DynamicScale(initial_scale=2.0**12)), pair()
    run(scaler, "FFFF", parts)
    logger = LossScaleLogger(verbose=0).watch(scaler)
    logger.on_epoch_begin(0)
    run(scaler, "FFFTFF", parts)
    with pytest.warns(UserWarning, match=r"^5 of the 6 steps since step 4 .* last 2 .* since step 8.* w \(2 times\)"):
        logger.on_train_end()


def test_gradients_of_a_real_loss():
    """The loop of the class docstring, on the backend's own gradients: the weights of a loop without a scaler."""
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
