from __future__ import annotations

from dataclasses import replace

import pytest

from tfmixed import scaling
from tfmixed.records import EventsLost, Progress, RunRecord, ScaleChange
from tfmixed.scaling import ConstantScale, DynamicScale, LogMaxScale, ScaleHistory
from tfmixed.scaling.replay import Trace, parse, replay

RUN = RunRecord(0, 8.0, "now", "model", "mixed_float16", {}, "Adam", [], {})
HISTORY = ScaleHistory(
    8.0, 10, (ScaleChange(2, 8.0, 4.0, "overflow", "a"), EventsLost(1, 5), ScaleChange(5, 4.0, 8.0, "growth"))
)


def logged(rule, limits):
    """Returns the log of a run under a rule in which step i overflows at scales of at least limits[i]."""
    state, log, skipped = rule.start(), [RunRecord(0, float(rule.start().scale), "", "", "", {}, "", [], {})], 0
    for step, limit in enumerate(limits):
        before, finite = float(state.scale), float(state.scale) < limit
        state, skipped = rule.next(state, finite), skipped + (not finite)
        if float(state.scale) != before:
            reason = "growth" if finite else "overflow"
            log.append(ScaleChange(step, before, float(state.scale), reason, None if finite else "a", 0))
    return [*log, Progress(len(limits) - 1, 0, float(state.scale), skipped)]


@pytest.mark.parametrize("letters", ["FFTTTTTTFTTTT", "T", "F" * 40, "TTTF" * 9])
@pytest.mark.parametrize("rule", [DynamicScale(growth_interval=3), ConstantScale(8.0), scaling.like("torch")])
def test_letters_are_replayed_as_they_are(rule, letters):
    """The scales are those of `simulate`, and every F is a skipped step."""
    outcome = replay(rule, Trace.of_letters(letters))
    assert [*outcome.scales[1:], outcome.final_scale] == scaling.simulate(rule, letters)
    assert outcome.skipped == tuple(step for step, letter in enumerate(letters) if letter == "F")
    assert (outcome.above, outcome.below) == (0, 0)


def test_the_recorded_rule_repeats_the_record():
    """No step leaves the record."""
    rule = DynamicScale(initial_scale=64.0, growth_interval=5)
    trace = Trace.of_log(logged(rule, [32.0] * 50))
    outcome = replay(rule, trace)
    assert outcome.scales == trace.scales
    assert outcome.skipped == tuple(step for step, finite in enumerate(trace.finite) if not finite)
    assert (outcome.above, outcome.below, trace.unlisted) == (0, 0, 0)


def test_a_step_overflows_at_its_scale_and_above():
    """A lower scale passes every step, a higher one skips the same, and steps beyond the record are counted."""
    trace = Trace((True, False, True, True), (8.0, 8.0, 4.0, 4.0))
    low, same, high = (replay(ConstantScale(scale), trace) for scale in (4.0, 8.0, 16.0))
    assert (low.skipped, low.above, low.below) == ((), 0, 1)
    assert (same.skipped, same.above, same.below) == ((1,), 2, 0)
    assert (high.skipped, high.above, high.below) == ((1,), 3, 0)


def test_skipped_steps_without_a_scale_change_are_counted_as_unlisted():
    """A constant scale, or one with hysteresis left, does not change at an overflow."""
    trace = Trace.of_log(logged(ConstantScale(8.0), [16.0, 4.0, 16.0, 4.0]))
    assert (trace.finite, trace.scales, trace.unlisted) == ((True,) * 4, (8.0,) * 4, 2)
    patient = Trace.of_log(logged(DynamicScale(initial_scale=8.0, hysteresis=2), [4.0, 4.0, 16.0]))
    assert (patient.finite, patient.unlisted) == ((True, False, True), 1)


def test_a_step_of_unknown_scale_is_beyond_the_record():
    """It counts as above the recorded scale."""
    assert replay(ConstantScale(2.0), Trace((True, True), (None, 4.0))).above == 1


def test_an_outcome_is_a_row_of_numbers():
    """The scales are those of the steps, and the final scale is that of the next step."""
    row = replay(DynamicScale(initial_scale=8.0), Trace.of_letters("FTFF")).as_dict()
    assert row["final_scale"] == 1.0
    assert (row["lowest_scale"], row["highest_scale"], row["mean_log2_scale"]) == (2.0, 8.0, (3 + 2 + 2 + 1) / 4)
    assert (row["steps"], row["skipped_steps"], row["share_skipped"]) == (4, 3, 0.75)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("dynamic", DynamicScale()),
        ("dynamic:growth_interval=500,hysteresis=2", DynamicScale(growth_interval=500, hysteresis=2)),
        ("dynamic:min_scale=None,refill=finite", DynamicScale(min_scale=None, refill="finite")),
        ("1024", ConstantScale(1024.0)),
        ("2^10", ConstantScale(1024.0)),
        ("0.5", ConstantScale(0.5)),
        ("constant:value=2**10", ConstantScale(1024.0)),
        ("logmax:beta1=0.9", LogMaxScale(beta1=0.9)),
        ("torch", scaling.like("torch")),
        ("apex:growth_interval=1000", scaling.like("apex", growth_interval=1000)),
        ("deepspeed:consecutive_hysteresis=True", scaling.like("deepspeed", consecutive_hysteresis=True)),
    ],
)
def test_rules_are_parsed_from_text(text, rule):
    """Accepts a name with parameters, a peer, or a number."""
    assert parse(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "nonsense"),
        ("dynamic:interval=5", "Received: interval"),
        ("apex:scale_window=5", "Received: scale_window"),
        ("dynamic:growth_interval=0", "`growth_interval`"),
        ("dynamic:hysteresis", "name=value"),
        ("constant", "ConstantScale"),
        ("-5", "`value`"),
        ("", "`rule`"),
        ("-8^0.5", "`rule`"),
        ("True", "`rule`"),
    ],
)
def test_other_rules_are_refused(text, message):
    """The error names the rule or the parameter."""
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("letters", ["", "  \n", "TFX", "tf"])
def test_other_letters_are_refused(letters):
    """An empty trace is refused as well."""
    with pytest.raises(ValueError, match="`trace`"):
        Trace.of_letters(letters)


def test_rules_and_logs_without_a_replay_are_refused():
    """Covers a rule that needs gradients, and logs with no or too many steps."""
    with pytest.raises(ValueError, match="LogMaxScale"):
        replay(LogMaxScale(), Trace.of_letters("TF"))
    with pytest.raises(ValueError, match="at least one step"):
        Trace.of_log([RUN])
    with pytest.raises(ValueError, match="100,000,000"):
        Trace.of_log([RUN, Progress(2**53, 0, 8.0, 0)])


def test_a_history_is_a_line_from_the_first_step_to_the_last():
    """A scale holds from the step after its change."""
    assert HISTORY.points() == ([0, 3, 6, 10], [8.0, 4.0, 8.0, 8.0])
    assert [change.step for change in HISTORY.overflows()] == [2]
    assert ScaleHistory(8.0, 0, ()).points() == ([0, 1], [8.0, 8.0])


def test_a_history_has_gaps():
    """Steps in a gap have no scale. Other steps have that of the last change."""
    log = [RUN, ScaleChange(2, 8.0, 4.0, "overflow"), EventsLost(2, 5), ScaleChange(5, 2.0, 4.0, "growth")]
    history = ScaleHistory.of([*log, Progress(7, 0, 4.0, 1)])
    assert history.scale_of_each_step() == [8.0, 8.0, 8.0, None, None, 2.0, 4.0, 4.0]
    assert list(history.gaps()) == [(3, 5)]
    back = [RUN, EventsLost(2, 5), ScaleChange(5, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 2)]
    assert ScaleHistory.of(back).scale_of_each_step() == [None] * 5 + [8.0, 4.0]


def test_a_history_without_a_run_record_begins_with_its_first_change():
    """The beginning of the log may be lost."""
    history = ScaleHistory.of([ScaleChange(4, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 1)])
    assert (history.first, history.scale_of_each_step()) == (4, [8.0, 4.0, 4.0])


def test_skipped_steps_of_an_earlier_log_are_not_unlisted():
    """The counter of a resumed run includes them."""
    assert Trace.of_log([ScaleChange(4, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 9)]).unlisted == 0
    assert Trace.of_log([RUN, ScaleChange(4, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 3)]).unlisted == 2


def test_a_step_can_change_the_scale_twice():
    """It may be set by hand before a step that overflows. A change that is logged twice counts once."""
    by_hand, lowered = ScaleChange(4, 8.0, 64.0, "set"), ScaleChange(4, 64.0, 32.0, "overflow")
    again = [replace(change, epoch=1) for change in (by_hand, lowered)]  # as read from a log
    history = ScaleHistory.of([RUN, *again, by_hand, lowered, Progress(6, 0, 32.0, 1)])
    assert history.changes == (by_hand, lowered)
    assert history.points()[1] == [8.0, 64.0, 32.0, 32.0]
    assert history.scale_of_each_step() == [8.0] * 4 + [64.0] + [32.0] * 2
