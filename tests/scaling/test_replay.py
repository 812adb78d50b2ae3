from __future__ import annotations

import re
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
    """Returns the log of a run under a rule, in which step i overflows at scales from limits[i] on."""
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
    """The scales are those of `simulate`, and each F is a skipped step."""
    outcome = replay(rule, Trace.of_letters(letters))
    assert [*outcome.scales[1:], outcome.final_scale] == scaling.simulate(rule, letters)
    assert outcome.skipped == tuple(step for step, letter in enumerate(letters) if letter == "F")
    assert (outcome.above, outcome.below) == (0, 0)


def test_the_rule_that_was_recorded_does_again_what_it_did():
    """With nothing beyond the record."""
    rule = DynamicScale(initial_scale=64.0, growth_interval=5)
    trace = Trace.of_log(logged(rule, [32.0] * 50))
    outcome = replay(rule, trace)
    assert outcome.scales == trace.scales
    assert outcome.skipped == tuple(step for step, finite in enumerate(trace.finite) if not finite)
    assert (outcome.above, outcome.below, trace.unlisted) == (0, 0, 0)


def test_a_step_overflows_at_its_scale_and_above_alone():
    """A lower rule passes all, a higher one skips the same, and what no log vouches for is counted."""
    trace = Trace((True, False, True, True), (8.0, 8.0, 4.0, 4.0))
    low, same, high = (replay(ConstantScale(scale), trace) for scale in (4.0, 8.0, 16.0))
    assert (low.skipped, low.above, low.below) == ((), 0, 1)
    assert (same.skipped, same.above, same.below) == ((1,), 2, 0)
    assert (high.skipped, high.above, high.below) == ((1,), 3, 0)


def test_skipped_steps_that_left_the_scale_are_counted_and_not_placed():
    """A constant scale, or one with hysteresis left, changes nothing that could be logged."""
    trace = Trace.of_log(logged(ConstantScale(8.0), [16.0, 4.0, 16.0, 4.0]))
    assert (trace.finite, trace.scales, trace.unlisted) == ((True,) * 4, (8.0,) * 4, 2)
    patient = Trace.of_log(logged(DynamicScale(initial_scale=8.0, hysteresis=2), [4.0, 4.0, 16.0]))
    assert (patient.finite, patient.unlisted) == ((True, False, True), 1)


def test_of_a_step_of_unknown_scale_nothing_is_vouched_for():
    """Each rule is beyond the record there."""
    assert replay(ConstantScale(2.0), Trace((True, True), (None, 4.0))).above == 1


def test_an_outcome_is_a_row_of_numbers():
    """Scales are those that steps ran at, and the final one that of the step to come."""
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
def test_rules_are_written_as_people_write_them(text, rule):
    """A name and its parameters, or a number."""
    assert parse(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "rule must be a number or one of dynamic, constant, logmax, torch, .*received 'nonsense'"),
        ("dynamic:interval=5", "parameters of dynamic must be among initial_scale, .*received interval"),
        ("apex:scale_window=5", "params of apex must be among .*growth_interval.*received scale_window"),
        ("dynamic:growth_interval=0", "growth_interval must be a whole number, at least 1"),
        ("dynamic:hysteresis", "a parameter must be written name=value, received 'hysteresis'"),
        ("constant", "constant must have a value, as in constant:value=1024"),
        ("-5", "value must be a finite float32 number above 0"),
        ("", "rule must be a number or one of"),
        ("-8^0.5", "rule must be a number or one of"),
        ("True", "rule must be a number or one of"),
    ],
)
def test_other_rules_are_refused(text, message):
    """The error names what there is."""
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("letters", ["", "  \n", "TFX", "tf"])
def test_other_letters_are_refused(letters):
    """The error names the first of them."""
    with pytest.raises(ValueError, match="trace must hold one T"):
        Trace.of_letters(letters)


def test_what_a_trace_cannot_answer_is_refused():
    """A rule of the largest gradient, and a log without steps."""
    with pytest.raises(ValueError, match=re.escape("which no trace holds; LogMaxScale needs it")):
        replay(LogMaxScale(), Trace.of_letters("TF"))
    with pytest.raises(ValueError, match="trace must be a log with at least one step"):
        Trace.of_log([RUN])
    with pytest.raises(ValueError, match="trace must be a log of at most 100,000,000 steps, received one of"):
        Trace.of_log([RUN, Progress(2**53, 0, 8.0, 0)])


def test_a_history_is_a_line_from_the_first_step_to_the_last():
    """Each scale holds from the step after its change."""
    assert HISTORY.points() == ([0, 3, 6, 10], [8.0, 4.0, 8.0, 8.0])
    assert [change.step for change in HISTORY.overflows()] == [2]
    assert ScaleHistory(8.0, 0, ()).points() == ([0, 1], [8.0, 8.0])


def test_a_history_knows_what_it_does_not_know():
    """Steps in a gap have no scale; those without a change have that of their neighbours."""
    log = [RUN, ScaleChange(2, 8.0, 4.0, "overflow"), EventsLost(2, 5), ScaleChange(5, 2.0, 4.0, "growth")]
    history = ScaleHistory.of([*log, Progress(7, 0, 4.0, 1)])
    assert history.scale_of_each_step() == [8.0, 8.0, 8.0, None, None, 2.0, 4.0, 4.0]
    assert list(history.gaps()) == [(3, 5)]
    back = [RUN, EventsLost(2, 5), ScaleChange(5, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 2)]
    assert ScaleHistory.of(back).scale_of_each_step() == [None] * 5 + [8.0, 4.0]


def test_a_history_without_a_first_line_begins_with_its_records():
    """As a log whose begin is lost does."""
    history = ScaleHistory.of([ScaleChange(4, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 1)])
    assert (history.first, history.scale_of_each_step()) == (4, [8.0, 4.0, 4.0])


def test_skipped_steps_of_an_earlier_log_are_not_missed():
    """A counter that the run began with tells of steps that this log does not speak of."""
    assert Trace.of_log([ScaleChange(4, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 9)]).unlisted == 0
    assert Trace.of_log([RUN, ScaleChange(4, 8.0, 4.0, "overflow"), Progress(6, 0, 4.0, 3)]).unlisted == 2


def test_a_step_can_change_the_scale_twice():
    """Set by hand before a step that overflows; a change that is logged twice counts once."""
    by_hand, lowered = ScaleChange(4, 8.0, 64.0, "set"), ScaleChange(4, 64.0, 32.0, "overflow")
    again = [replace(each, epoch=1) for each in (by_hand, lowered)]  # as a log has them that was read
    history = ScaleHistory.of([RUN, *again, by_hand, lowered, Progress(6, 0, 32.0, 1)])
    assert history.changes == (by_hand, lowered)
    assert history.points()[1] == [8.0, 64.0, 32.0, 32.0]
    assert history.scale_of_each_step() == [8.0] * 4 + [64.0] + [32.0] * 2
