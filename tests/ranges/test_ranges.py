from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from exact_ranges import counted
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmixed import records
from tfmixed._probe.rounding_model import Losses, largest_scale, losses, needed_scale, percent
from tfmixed._utils import rich_text
from tfmixed.ranges import GradientRanges
from tfmixed.records import RangesRecord

TEXT = Path(__file__).parents[1] / "data" / "ranges.txt"
POWERS = [2.0**power for power in range(-24, 56)]


def planted(**gradients):
    """Returns the ranges of gradients: lists of values by layer."""
    found = [counted(values, f"{layer}/kernel") for layer, values in gradients.items()]
    return GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "planted", found))


def rounded(values, scale, dtype="float16"):
    """Returns the losses when NumPy multiplies and rounds."""
    with np.errstate(over="ignore"):
        half = np.abs((np.asarray(values, "float64") * scale).astype("float32").astype(dtype).astype("float64"))
    normal = float(ml_dtypes.finfo(dtype).smallest_normal)
    return Losses(
        len(values), int((half == 0).sum()), int(((half > 0) & (half < normal)).sum()), int(np.isinf(half).sum())
    )


# The rounding limits of float16 with their neighbours.
EDGES = [
    np.nextafter(np.float32(edge), np.float32(toward))
    for edge in (2.0**-25, 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14, 65504, 65520, 65536, 1.0)
    for toward in (0, edge, np.inf)
]


def test_losses_are_exact_at_powers_of_two():
    """As NumPy rounds, also for values at the limits."""
    for scale in POWERS:
        values = [float(np.float32(edge) / np.float32(scale)) for edge in EDGES]
        assert losses(counted(values).octaves, scale) == rounded(values, scale), scale


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(2.0**-100, 2.0**40, width=32), min_size=1, max_size=50),
    st.sampled_from(POWERS),
)
def test_losses_of_random_values_are_exact(values, scale):
    """As NumPy rounds, at random powers of two."""
    assert losses(counted(values).octaves, scale) == rounded(values, scale)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(2.0**-120, 2.0**120, width=32), min_size=1, max_size=50))
def test_bfloat16_loses_no_normal_numbers(values):
    """It has the exponents of float32."""
    assert losses(counted(values).octaves, 1.0, "bfloat16") == rounded(values, 1.0, "bfloat16") == Losses(len(values))


def test_a_scale_between_powers_of_two_is_interpolated():
    """Values are taken to be spread evenly over the logarithm of an octave."""
    values = 2.0 ** (-25 + (np.arange(1000) + 0.5) / 1000)
    found = losses(counted(values / 2).octaves, 1.5)
    assert found.zero == pytest.approx(rounded(values / 2, 1.5).zero, abs=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(2.0**-60, 2.0**30, width=32), min_size=1, max_size=50))
def test_limits_of_working_scales(values):
    """Beyond them, NumPy flushes too many values to 0 or overflows."""
    range_ = counted(values)
    low, high = needed_scale(range_, tolerance=0.1), largest_scale(range_)
    assert rounded(values, low).zero <= 0.1 * len(values) < rounded(values, low / 2).zero
    assert rounded(values, high).overflow == 0 < rounded(values, high * 2).overflow


def test_limits_of_working_scales_are_exact():
    """The tolerance is included. 65,520 is the first magnitude that overflows."""
    assert needed_scale(counted([2.0**-30, *[2.0**-26] * 9]), tolerance=0.1) == 2.0**2
    assert largest_scale(counted([65520.0])) == 0.5


# Gradients by the one thing that their text says.
NOISE = dataclasses.replace(counted([2.0**-40]), noise=True)
WITH_NOISE = GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "m", [counted([2.0**10], "a"), NOISE]))
ISLAND = GradientRanges(
    RangesRecord(None, None, "float32", 1.0, 1, "m", [counted([1e-3]), counted([1e9], "head/kernel", "float32")])
)
OUTPUTS = GradientRanges(
    RangesRecord(None, None, "float32", 1.0, 1, "m", [counted([1.0], "a"), counted([1.0], "a", kind="activation")])
)
CASES = {
    "no scale is needed": planted(a=[1e-3, 0.1], b=[0.0, 2.0]),
    "a range of scales works": planted(small=[2.0**-30] * 99, large=[2.0**-2]),
    "one scale works": planted(a=[2.0**-30], b=[2.0**9]),
    "only bfloat16 works": planted(a=[2.0**-40, 2.0**20]),
    "a suggestion that cannot save all": planted(a=[2.0**-30] * 40 + [2.0**-50] * 10, b=[0.25] * 50),
    "layers are too far apart": planted(conv1=[2.0**-45], conv2=[2.0**-40], head=[2.0**3]),
    "the fewer layers are put in float32": planted(stem=[2.0**-45], head1=[8.0], head2=[8.0]),
    "both ends are put in float32": planted(
        a=[2.0**-44], b=[2.0**3], **{f"c{index}": [2.0**-37] * 99 + [2.0**-3] for index in range(5)}
    ),
    "one layer exceeds float16 by itself": planted(wild=[2.0**-50, 2.0**10], tame=[2.0**-26] * 3),
    "names with brackets": planted(**{"d[bold]": [2.0**-45], "e": [8.0]}),
    "a gradient of zeros": planted(a=[2.0**-45], b=[2.0**9], zeros=[0.0, 0.0]),
    "only zeros": planted(a=[0.0, 0.0]),
    "not finite": planted(a=[np.inf, 1.0], b=[1.0]),
    "rounding noise is ignored": WITH_NOISE,
    "float32 is ignored": ISLAND,
    "outputs and weights": OUTPUTS,
    "updates lost": GradientRanges(
        RangesRecord(
            *(None, None, "float32", 1.0, 1, "m"),
            [
                dataclasses.replace(counted([1.0], "a"), updates={"bfloat16": {-2: (3, 0.75), -1: (1, 0.25)}}),
                dataclasses.replace(counted([1.0], "b"), updates={"bfloat16": {}}),
                counted([1.0], "c", kind="activation"),
            ],
        )
    ),
}


def text():
    """Returns the printed ranges of all cases, and a comparison of two."""
    parts = [f"[{name}]\n{found}\n" for name, found in CASES.items()]
    beside = rich_text.text(planted(a=[2.0**-30, 1.0]).beside(planted(a=[0.0, np.inf])))
    lines = "\n".join([*parts, f"[beside another precision]\n{beside}\n"]).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def test_text_is_the_stored_one():
    """`python tests/ranges/test_ranges.py` writes the file."""
    assert text() == TEXT.read_text(encoding="utf-8")


def test_working_and_best_scales():
    """2^-30 needs 2^6 to become the smallest number of float16. 2^-2 overflows at 2^18."""
    found = CASES["a range of scales works"]
    assert found.working_scales() == (2.0**6, 2.0**17)
    assert found.best_scales() == (2.0**16, 2.0**17)
    assert CASES["one scale works"].working_scales() == (2.0**6, 2.0**6)
    assert CASES["layers are too far apart"].working_scales() is None


@pytest.mark.parametrize("name", ["only zeros", "not finite"])
def test_no_scale_is_suggested_for_zeros_and_nonfinite_gradients(name):
    """`suggest_constant_scale` raises, and the text and the JSON have no suggestion."""
    found = CASES[name]
    with pytest.raises(ValueError, match="Gradients must"):
        found.suggest_constant_scale()
    assert found.suggested() is found.as_dict()["suggested_scale"] is None


@pytest.mark.parametrize("headroom", [1.0, 2.0, 3.0, 1000.0])
@pytest.mark.parametrize("largest", [65504.0, 1.0, 0.7, 3e-5, 1e6])
def test_the_suggestion_is_the_largest_power_of_two_with_headroom(largest, headroom):
    """It is below 65,504 / (headroom * max|g|), and twice of it is not."""
    scale = planted(a=[largest]).suggest_constant_scale(headroom)
    assert scale * headroom * largest < 65504 <= 2 * scale * headroom * largest
    assert math.log2(scale).is_integer()


def test_a_suggestion_has_the_losses_before_and_after():
    """It is a float, also after pickling."""
    scale = CASES["a suggestion that cannot save all"].suggest_constant_scale()
    assert scale == 2.0**16
    assert (scale.before, scale.after) == (Losses(100, 50, 0), Losses(100, 10, 0))
    assert pickle.loads(pickle.dumps(scale)).after == scale.after


def test_losses_of_a_layer():
    """Also of a layer in float32, which does not count otherwise."""
    assert ISLAND.losses() == Losses(1)
    assert ISLAND.losses(layer="head").overflow == 1
    assert ISLAND.underflow() == 0


def test_all_gradients_count_if_none_is_in_half_precision():
    """As if the model had a half-precision policy."""
    found = GradientRanges(RangesRecord(None, None, "float32", 1.0, 1, "m", [counted([2.0**-30], dtype="float32")]))
    assert found.working_scales() == (2.0**6, 2.0**45)


def test_noise_counts_only_if_it_overflowed():
    """A step with an overflow is skipped even if the gradient should have been 0."""
    real, noise = WITH_NOISE
    assert WITH_NOISE.losses() == Losses(1)
    assert not WITH_NOISE.losses(layer=noise.layer).nonzeros
    for changed, works in (({"noise": False}, False), ({}, True)):
        record = dataclasses.replace(WITH_NOISE.record, ranges=[real, dataclasses.replace(noise, **changed)])
        assert (GradientRanges(record).working_scales() is not None) == works
    record = dataclasses.replace(WITH_NOISE.record, ranges=[real, dataclasses.replace(noise, nonfinite=1)])
    assert "not finite" in GradientRanges(record).verdict()


def test_scales_stay_within_float32():
    """Also if a smaller or a larger scale would be needed."""
    assert needed_scale(counted([2.0**-149])) == 2.0**125
    assert largest_scale(counted([2.0**-149])) == largest_scale(counted([0.0])) == 2.0**127
    assert largest_scale(counted([2.0**127]), "bfloat16") == 1.0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda found: found.losses(0), "scale"),
        (lambda found: found.losses(1.0, "float64"), "precision"),
        (lambda found: found.losses(layer="b"), "layer"),
        (lambda found: found.working_scales(tolerance=1.5), "tolerance"),
        (lambda found: found.verdict(tolerance=-1), "tolerance"),
        (lambda found: found.suggest_constant_scale(0.5), "headroom"),
        (lambda found: found.beside(planted(b=[1.0])), "other"),
    ],
)
def test_invalid_arguments(call, name):
    """The error names the argument."""
    with pytest.raises(ValueError, match=name):
        call(planted(a=[1.0]))


def test_ranges_are_saved_and_loaded(tmp_path):
    """The file is a line of a log. Of several lines, the last one is loaded."""
    found, path = planted(a=[2.0**-30, 0.0, np.nan], b=[65520.0]), tmp_path / "new" / "ranges.jsonl"
    found.save(path)
    assert GradientRanges.load(path) == found
    assert [entry.name for entry in path.parent.iterdir()] == ["ranges.jsonl"]
    later = planted(a=[1.0])
    path.write_text(path.read_text() + records.to_line(later.record) + "\n")
    assert GradientRanges.load(path) == later


def test_a_log_without_ranges_is_refused(tmp_path):
    """`load` raises."""
    path = tmp_path / "log.jsonl"
    path.write_text(records.to_line(records.ScaleChange(0, 2.0, 1.0, "overflow")) + "\n")
    with pytest.raises(ValueError, match="path must"):
        GradientRanges.load(path)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.0001, "< 0.1 %"), (0.9999, "> 99.9 %"), (0.125, "12.5 %")]
)
def test_shares_never_round_to_all_or_nothing(share, text):
    """Only 0 is "0 %"."""
    assert percent(share) == text


if __name__ == "__main__":
    TEXT.write_text(text(), encoding="utf-8")
