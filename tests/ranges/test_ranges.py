from __future__ import annotations

import dataclasses
import math
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tfmixed import records
from tfmixed._probe.rounding_model import Losses, largest_scale, losses, needed_scale, percent
from tfmixed.ranges import GradientRanges
from tfmixed.records import GradientRange, RangesRecord

POWERS = [2.0**power for power in range(-24, 56)]


def counted(values, name="layer/kernel", dtype="float16", kind="weight"):
    """Counts with numpy's own arithmetic, value by value: nothing here is shared with the package."""
    values = np.abs(np.asarray(values, "float64"))
    finite = values[np.isfinite(values)]
    nonzero = finite[finite > 0]
    octaves = {}
    for value in nonzero:
        octave = math.floor(math.log2(value))
        octave -= value < 2.0**octave
        mantissa = value / 2.0**octave
        part = 0 if mantissa == 1 else 1 if mantissa < 2 - 2.0**-10 else 2 if mantissa < 2 - 2.0**-11 else 3
        octaves.setdefault(octave, [0, 0, 0, 0])[part] += 1
    return GradientRange(
        name,
        kind,
        name.rpartition("/")[0] or name,
        dtype,
        int((finite == 0).sum()),
        int(values.size - finite.size),
        float(nonzero.max(initial=0)),
        float(nonzero.min()) if nonzero.size else 0.0,
        {int(octave): tuple(parts) for octave, parts in octaves.items()},
    )


def planted(**gradients):
    """Gradients by layer, each a list of values."""
    found = [counted(values, f"{layer}/kernel") for layer, values in gradients.items()]
    return GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "planted", found))


def rounded(values, scale, dtype="float16"):
    """What really happens: numpy multiplies and rounds."""
    with np.errstate(over="ignore"):
        half = np.abs((np.asarray(values, "float64") * scale).astype("float32").astype(dtype).astype("float64"))
    normal = float(ml_dtypes.finfo(dtype).smallest_normal)
    return Losses(
        len(values), int((half == 0).sum()), int(((half > 0) & (half < normal)).sum()), int(np.isinf(half).sum())
    )


# Every rounding limit of float16, at all scales, from both sides, and what lies between.
EDGES = [
    np.nextafter(np.float32(edge), np.float32(toward))
    for edge in (2.0**-25, 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14, 65504, 65520, 65536, 1.0)
    for toward in (0, edge, np.inf)
]


@pytest.mark.parametrize("scale", POWERS)
def test_losses_are_what_numpy_rounds_at_each_power_of_two(scale):
    """Exact counts, at the very limits too."""
    values = [float(np.float32(edge) / np.float32(scale)) for edge in EDGES]
    assert losses(counted(values).octaves, scale) == rounded(values, scale)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(2.0**-100, 2.0**40, width=32), min_size=1, max_size=50),
    st.sampled_from(POWERS),
)
def test_losses_are_what_numpy_rounds_whatever_the_values(values, scale):
    """Random magnitudes, random powers of two."""
    assert losses(counted(values).octaves, scale) == rounded(values, scale)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(2.0**-120, 2.0**120, width=32), min_size=1, max_size=50))
def test_bfloat16_loses_nothing_of_normal_numbers(values):
    """It has float32's exponents."""
    assert losses(counted(values).octaves, 1.0, "bfloat16") == rounded(values, 1.0, "bfloat16") == Losses(len(values))


def test_a_scale_between_powers_cuts_an_octave_by_its_logarithm():
    """Sixteen values spread evenly over the octave of the limit: at 1.5 times the power, 0.585 of them are gone."""
    values = 2.0 ** (-25 + (np.arange(1000) + 0.5) / 1000)
    found = losses(counted(values / 2).octaves, 1.5)
    assert found.zero == pytest.approx(rounded(values / 2, 1.5).zero, abs=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(2.0**-60, 2.0**30, width=32), min_size=1, max_size=50))
def test_limits_of_scales_are_the_first_and_last_that_serve(values):
    """Beside them, numpy flushes too much or overflows."""
    range_ = counted(values)
    low, high = needed_scale(range_, tolerance=0.1), largest_scale(range_)
    assert rounded(values, low).zero <= 0.1 * len(values) < rounded(values, low / 2).zero
    assert rounded(values, high).overflow == 0 < rounded(values, high * 2).overflow


def test_limits_of_scales_are_exact():
    """A share of as much as is tolerated is tolerated; 65,520 is the first magnitude that overflows."""
    assert needed_scale(counted([2.0**-30, *[2.0**-26] * 9]), tolerance=0.1) == 2.0**2
    assert largest_scale(counted([65520.0])) == 0.5


def test_any_scale_of_a_range_works():
    """2^-30 needs 2^6 to become the smallest number of float16; 2^-2 overflows at 2^18."""
    found = planted(small=[2.0**-30] * 99, large=[2.0**-2])
    assert found.working_scales() == (2.0**6, 2.0**17)
    assert found.verdict() == "any scale from 2^6 to 2^17 works."
    assert found.best_scales() == (2.0**16, 2.0**17)


def test_no_scale_is_needed_for_what_fits():
    """All normal numbers at scale 1."""
    found = planted(a=[1e-3, 0.1], b=[0.0, 2.0])
    assert found.verdict() == "no scale is needed."
    assert found.losses() == Losses(3)


def test_no_single_scale_works_where_layers_are_too_far_apart():
    """The one that overflows is put aside, and the others get a range."""
    found = planted(conv1=[2.0**-45], conv2=[2.0**-40], head=[2.0**3])
    assert found.working_scales() is None
    assert found.verdict() == (
        "no single scale works: `conv1/kernel` needs 2^21 at least, `head/kernel` overflows above 2^12; put `head` in "
        "float32, and any scale from 2^21 to 2^55 works."
    )


def test_the_fewer_layers_are_put_aside():
    """Two heads overflow, one stem underflows."""
    assert "put `stem` in float32, and" in planted(stem=[2.0**-45], head1=[8.0], head2=[8.0]).verdict()


def test_no_more_layers_are_put_aside_than_must_be():
    """One needs much, one allows little, and what lies between suits most; all that go are named."""
    between = {f"c{index}": [2.0**-37] * 99 + [2.0**-3] for index in range(5)}
    found = planted(a=[2.0**-44], b=[2.0**3], **between)
    assert "put `a`, `b` in float32, and any scale from 2^13 to 2^18 works." in found.verdict()


def test_a_single_scale_is_told_as_one():
    """From and to are the same."""
    found = planted(a=[2.0**-30], b=[2.0**9])
    assert found.verdict() == "the scale 2^6 works."
    assert found.working_scales() == (2.0**6, 2.0**6)


def test_names_are_printed_as_they_are():
    """Brackets are no markup."""
    found = planted(**{"d[bold]": [2.0**-45], "e": [8.0]})
    assert "d[bold]/kernel" in printed(found)
    assert "`d[bold]/kernel` needs" in printed(found)


def test_a_layer_that_needs_more_than_float16_has_goes_by_itself():
    """Its own values are 2^60 apart."""
    verdict = planted(wild=[2.0**-50, 2.0**10], tame=[2.0**-26] * 3).verdict()
    assert verdict.endswith("put `wild` in float32, and any scale from 2^2 to 2^41 works.")


def test_bfloat16_needs_no_scale_and_says_why():
    """float16 would need one."""
    found = planted(a=[2.0**-40, 2.0**20])
    assert found.verdict("bfloat16") == (
        "no scale is needed: bfloat16 has the exponents of float32, and these gradients go from 2^-40 to 2^20."
    )
    assert found.verdict().startswith("no single scale works")


def test_what_is_not_finite_in_float32_is_said_first():
    """No scale mends it, and none is suggested."""
    found = planted(a=[np.inf, 1.0], b=[1.0])
    assert found.verdict() == "no scale mends gradients that are not finite in float32: `a/kernel`."
    with pytest.raises(ValueError, match=r"gradients must be finite to choose a scale.*a/kernel"):
        found.suggest_constant_scale()


def test_gradients_that_are_all_zero_say_nothing():
    """Another batch may."""
    found = planted(a=[0.0, 0.0])
    assert found.verdict() == "all gradients are 0: measure on other batches."
    with pytest.raises(ValueError, match="gradients must not all be 0"):
        found.suggest_constant_scale()


@pytest.mark.parametrize("headroom", [1.0, 2.0, 3.0, 1000.0])
@pytest.mark.parametrize("largest", [65504.0, 1.0, 0.7, 3e-5, 1e6])
def test_the_suggestion_is_the_largest_power_of_two_with_headroom(largest, headroom):
    """Below 65,504 / (headroom * max|g|), and twice of it would not be."""
    scale = planted(a=[largest]).suggest_constant_scale(headroom)
    assert scale * headroom * largest < 65504 <= 2 * scale * headroom * largest
    assert math.log2(scale).is_integer()


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.inf, 1.0]], ids=["zeros", "not finite"])
def test_what_suggests_no_scale_is_printed_without_one(values):
    """The verdict says why; as JSON too."""
    found = planted(a=values)
    assert found.suggested() is found.as_dict()["suggested_scale"] is None
    assert f"float16: {found.verdict()} bfloat16: " in printed(found)


def test_gradients_of_zeros_need_nothing():
    """Not even where the others need something, or where no single scale suits them."""
    zeros = {"zeros": [0.0, 0.0]}
    assert planted(a=[2.0**-40, 2.0**20], **zeros).verdict("bfloat16").endswith("go from 2^-40 to 2^20.")
    assert planted(a=[2.0**-45, 2.0**9], **zeros).verdict().endswith("put `a` in float32.")
    assert "zeros/kernel all 0 100 % 0 % 0 % 0 % any" in printed(planted(a=[1.0], **zeros))


def test_a_suggestion_says_what_it_saves_and_what_it_cannot():
    """It is a float, also after pickling, and tells what is lost before and after."""
    scale = planted(a=[2.0**-30] * 40 + [2.0**-50] * 10, b=[0.25] * 50).suggest_constant_scale()
    assert scale == 2.0**16
    assert (scale.before, scale.after) == (Losses(100, 50, 0), Losses(100, 10, 0))
    assert scale.explanation == (
        "At 2^16, float16 flushes 10.0 % (50.0 % at scale 1) of all values other than 0 to 0, and holds 0 % (0 % at "
        "scale 1) with less than its full precision."
    )
    assert pickle.loads(pickle.dumps(scale)).after == scale.after


def test_only_what_the_model_holds_in_half_precision_counts():
    """An island in float32 neither overflows nor needs a scale."""
    island = counted([1e9], "head/kernel", "float32")
    found = GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "m", [counted([1e-3]), island]))
    assert found.verdict() == "no scale is needed."
    assert found.losses(layer="head").overflow == 1
    assert re.search(r"head/kernel 2\^29 .. 2\^29 0 % float32 ", printed(found))


def test_where_none_is_held_in_half_precision_all_count():
    """As they would if the model's policy were another."""
    found = GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "m", [counted([2.0**-30], dtype="float32")]))
    assert found.verdict() == "any scale from 2^6 to 2^45 works."


def test_noise_decides_nothing_and_is_flagged():
    """Unless it overflowed: such a step is skipped whatever the gradient should have been."""
    real, tiny = counted([2.0**10], "real"), dataclasses.replace(counted([2.0**-40], "tiny"), noise=True)

    def of(*ranges):
        return GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "m", list(ranges)))

    assert of(real, dataclasses.replace(tiny, noise=False)).working_scales() is None
    assert of(real, tiny).working_scales() == of(real).working_scales()
    assert of(real, tiny).verdict() == of(real).verdict()
    assert of(real, tiny).losses() == of(real).losses()
    assert not of(tiny).losses(layer="tiny").nonzeros
    assert "Rounding noise, which decides nothing: `tiny`" in str(of(real, tiny))
    assert "not finite" in of(real, dataclasses.replace(tiny, nonfinite=1)).verdict()


def test_ranges_of_earlier_versions_are_read():
    """They say nothing of noise."""
    record = planted(w=[1.0]).record
    line = records.to_line(record).replace(', "noise": false', "")
    assert "noise" not in line
    assert records.from_line(line) == record


def test_scales_stay_within_float32():
    """Whatever would be needed or allowed beyond."""
    assert needed_scale(counted([2.0**-149])) == 2.0**125
    assert largest_scale(counted([2.0**-149])) == largest_scale(counted([0.0])) == 2.0**127
    assert largest_scale(counted([2.0**127]), "bfloat16") == 1.0


def test_outputs_are_told_from_weights():
    """Both may have one name."""
    found = [counted([1.0], "a"), counted([1.0], "a", kind="activation")]
    text = printed(GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "m", found)))
    assert "a 2^0 .. 2^0" in text
    assert "a (output) 2^0 .. 2^0" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.losses(0), "scale must be .* above 0, received 0"),
        (lambda found: found.losses(1.0, "float64"), "precision must be .*, received 'float64'"),
        (lambda found: found.losses(layer="b"), r"layer must be one of \['a'\], received 'b'"),
        (lambda found: found.working_scales(tolerance=1.5), "tolerance must be .* at most 1, received 1.5"),
        (lambda found: found.verdict(tolerance=-1), "tolerance must be .* at least 0 .*, received -1"),
        (lambda found: found.suggest_constant_scale(0.5), "headroom must be .* at least 1, received 0.5"),
        (lambda found: found.beside(planted(b=[1.0])), "other must hold the gradients of the same model, received"),
    ],
)
def test_bad_arguments_are_named(call, message):
    """With what was received."""
    with pytest.raises(ValueError, match=message):
        call(planted(a=[1.0]))


def test_ranges_are_saved_whole_and_loaded(tmp_path):
    """The file is a line of a log; the last of several is taken."""
    found, path = planted(a=[2.0**-30, 0.0, np.nan], b=[65520.0]), tmp_path / "new" / "ranges.jsonl"
    found.save(path)
    assert GradientRanges.load(path) == found
    assert [entry.name for entry in path.parent.iterdir()] == ["ranges.jsonl"]
    later = planted(a=[1.0])
    path.write_text(path.read_text() + records.to_line(later.record) + "\n")
    assert GradientRanges.load(path) == later


def test_a_log_without_ranges_is_an_error(tmp_path):
    """The message says what the file must be."""
    path = tmp_path / "log.jsonl"
    path.write_text(records.to_line(records.ScaleChange(0, 2.0, 1.0, "overflow")) + "\n")
    with pytest.raises(ValueError, match=r"path must be a file of GradientRanges.save or a log with ranges, received"):
        GradientRanges.load(path)


def printed(renderable):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(renderable)
    return " ".join(capture.get().split())


def test_it_prints_a_table_with_the_verdicts():
    """Magnitudes and shares by gradient, then sentences."""
    text = printed(planted(a=[2.0**-30, 2.0**-20, 0.0, 0.0], b=[0.25]))
    assert "a/kernel 2^-30 .. 2^-20 50.0 % 50.0 % 50.0 % 0 % 2^6 .. 2^35" in text
    assert "float16: any scale from 2^6 to 2^17 works." in text
    assert "At 2^16, float16 flushes 0 %" in text


def test_half_precision_is_laid_beside_float32():
    """What really was lost."""
    table = planted(a=[2.0**-30, 1.0]).beside(planted(a=[0.0, np.inf]))
    assert "a/kernel 2^-30 .. 2^0 all 0 0 % 100 % 1" in printed(table)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.0001, "< 0.1 %"), (0.9999, "> 99.9 %"), (0.125, "12.5 %")]
)
def test_shares_never_round_to_all_or_nothing(share, text):
    """Only 0 is "0 %"."""
    assert percent(share) == text
