from __future__ import annotations

import json

import pytest

from tfmixed import records
from tfmixed.records import EventsLost, ScaleChange

OVERFLOW = ScaleChange(1234, 32768.0, 16384.0, "overflow", "dense_1/kernel", 3)


@pytest.mark.parametrize("record", [OVERFLOW, ScaleChange(0, 1.0, 1.1, "growth"), EventsLost(3, 7, 1)], ids=str)
def test_a_line_gives_the_record_back(record):
    """One line, no line feed, nothing lost."""
    line = records.to_line(record)
    assert "\n" not in line
    assert records.from_line(line) == record


def test_a_scale_change_is_the_documented_json():
    """Key for key."""
    assert json.loads(records.to_line(OVERFLOW)) == {
        "event": "scale_change",
        "step": 1234,
        "epoch": 3,
        "old_scale": 32768.0,
        "new_scale": 16384.0,
        "reason": "overflow",
        "variable": "dense_1/kernel",
    }


def test_records_read_as_sentences():
    """Powers of two as such, other scales as numbers."""
    assert str(OVERFLOW) == "step 1234: loss scale 2^15 -> 2^14 (overflow)  dense_1/kernel"
    assert str(ScaleChange(1, 3.0, 6.5, "set")) == "step 1: loss scale 3 -> 6.5 (set)"


DEEP = pytest.param('{"event": ' + "[" * 10**5, id="deep")


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", '{"event": "other"}', '{"event": "scale_change", "step": 1}', DEEP]
)
def test_a_line_that_is_no_record_is_named(line):
    """The error shows the line."""
    with pytest.raises(ValueError, match="line must be a record of a tfmixed log, received"):
        records.from_line(line)


@pytest.mark.parametrize("change", [{"reason": "bogus"}, {"step": "1"}, {"old_scale": None}], ids=str)
def test_a_line_that_to_line_could_not_have_written_is_refused(change):
    """Another reason, another type."""
    line = json.dumps({**json.loads(records.to_line(OVERFLOW)), **change})
    with pytest.raises(ValueError, match="line must be a record of a tfmixed log, received"):
        records.from_line(line)


RANGE = {"zeros": 1, "nonfinite": 0, "largest": 4.0, "smallest": 1.0, "octaves": {"0": [1, 0, 0, 1], "2": [1, 0, 0, 0]}}


def ranges_line(**change):
    of = {"name": "a", "kind": "weight", "layer": "a", "dtype": "float16", **RANGE, **change}
    whole = {"event": "gradient_ranges", "step": 3, "epoch": 0, "precision": "float32", "scale": 1.0, "batches": 1}
    return json.dumps({**whole, "model": "m", "ranges": [of]})


@pytest.mark.parametrize(
    "change",
    [
        {"largest": float("inf")},
        {"largest": float("nan")},
        {"smallest": -1.0},
        {"smallest": -1},
        {"smallest": 0.0},
        {"largest": 0.5},
        {"largest": 1e300},
        {"zeros": -1},
        {"zeros": 10**30},
        {"octaves": {"400": [1, 0, 0, 0]}},
        {"octaves": {"0": [1, 0, 0, 10**30]}},
        {"octaves": {"0": [1, 0, 0]}},
        {"octaves": {"0": [1, 0, 0, 1.5]}},
    ],
    ids=str,
)
def test_ranges_that_nothing_could_have_measured_are_refused(change):
    """Magnitudes are finite, above 0 and in order; counts are counts."""
    assert records.from_line(ranges_line()).ranges[0].nonzeros == 3
    with pytest.raises(ValueError, match="line must be a record of a tfmixed log, received"):
        records.from_line(ranges_line(**change))


@pytest.mark.parametrize(
    "change", [{"step": 10**30}, {"step": -1}, {"old_scale": float("inf")}, {"new_scale": -1}], ids=str
)
def test_numbers_out_of_range_are_refused(change):
    """A step that no run reaches, a scale that is none."""
    line = json.dumps({**json.loads(records.to_line(OVERFLOW)), **change})
    with pytest.raises(ValueError, match="line must be a record of a tfmixed log, received"):
        records.from_line(line)


def test_half_a_character_is_replaced_on_reading():
    """JSON can spell half of a surrogate pair, which nothing can show; whole pairs stay."""
    line = records.to_line(ScaleChange(1, 2.0, 1.0, "overflow", "\ud800 \U0001f600"))
    assert records.from_line(line).variable == "? \U0001f600"


def test_a_loss_can_be_negative():
    """As the likelihood of a density is."""
    progress = records.Progress(1, 0, 8.0, 0, 1.0, -3.5)
    assert records.from_line(records.to_line(progress)) == progress


def test_a_whole_number_can_stand_for_a_float():
    """Other programs that write JSON drop the ".0"."""
    assert records.from_line(records.to_line(OVERFLOW).replace("32768.0", "32768")) == OVERFLOW


def test_gradients_that_are_all_zero_are_a_record():
    """They have no magnitudes."""
    (range_,) = records.from_line(ranges_line(largest=0.0, smallest=0.0, octaves={})).ranges
    assert (range_.nonzeros, range_.zeros, range_.largest) == (0, 1, 0.0)


def test_a_torn_last_line_is_left_out(tmp_path):
    """A process killed while it wrote costs the last line at most; a broken line elsewhere, not empty, is an error."""
    path = tmp_path / "log.jsonl"
    whole = records.to_line(OVERFLOW) + "\n"
    path.write_text(whole + "\n" + whole + whole[:20])
    assert records.read_log(path) == [OVERFLOW, OVERFLOW]
    path.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(ValueError, match="must be a record"):
        records.read_log(path)


def test_a_whole_last_line_without_a_line_feed_is_read(tmp_path):
    """Also one of a newer format, which is an error."""
    path = tmp_path / "log.jsonl"
    path.write_text(records.to_line(BEGIN))
    assert records.read_log(path) == [BEGIN]
    path.write_text(records.to_line(BEGIN)[:-1])
    assert records.read_log(path) == []
    path.write_text(records.to_line(BEGIN).replace('"format": 1', '"format": 2'))
    with pytest.raises(records.NewerFormatError):
        records.read_log(path)


def test_events_of_a_later_version_are_left_out(tmp_path):
    """Not where one begins a file: other programs write lines with an event too."""
    path, news = tmp_path / "log.jsonl", '{"event": "news", "step": 3}\n'
    path.write_text(f"{records.to_line(BEGIN)}\n{news}{records.to_line(OVERFLOW)}\n")
    assert records.read_log(path) == [BEGIN, OVERFLOW]
    path.write_text(news + records.to_line(BEGIN) + "\n")
    with pytest.raises(ValueError, match="must be a record"):
        records.read_log(path)


def test_a_missing_log_is_an_error(tmp_path):
    """As with any file."""
    with pytest.raises(FileNotFoundError):
        records.read_log(tmp_path / "none.jsonl")


def test_a_file_says_its_format():
    """In the line that begins a run, and in ranges, which may be a file by themselves; a line without one is of 1."""
    assert json.loads(records.to_line(BEGIN))["format"] == records.record_types.FORMAT == 1
    assert json.loads(records.to_line(records.from_line(ranges_line())))["format"] == 1
    values = json.loads(records.to_line(BEGIN))
    del values["format"]
    assert records.from_line(json.dumps(values)) == BEGIN


BEGIN = records.RunRecord(0, 8.0, "2026-01-01T00:00:00+00:00", "net", "mixed_float16", {}, "Adam", ["CPU"], {})


def test_fields_come_and_go():
    """A field with a default may be missing, and one that is unknown is ignored, within ranges too."""
    change = {"event": "scale_change", "step": 1, "old_scale": 2.0, "new_scale": 1.0, "reason": "overflow"}
    assert records.from_line(json.dumps({**change, "device": [1]})) == ScaleChange(1, 2.0, 1.0, "overflow")
    line = json.loads(ranges_line(octaves={}, share=0.5))
    del line["ranges"][0]["octaves"]
    assert records.from_line(json.dumps(line)).ranges[0].octaves == {}


@pytest.mark.parametrize("format_", [2, 10**6])
def test_a_newer_format_is_refused_by_its_number(tmp_path, format_):
    """Whatever else the line holds."""
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "news", "format": format_}) + "\n")
    with pytest.raises(ValueError, match=f"format must be at most 1 .*update.*format={format_}"):
        records.read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("format_", ["2", None, 1.0, 1.5, True, -1])
def test_a_format_that_is_no_number_is_refused(format_):
    """As other values are."""
    with pytest.raises(ValueError, match="line must be a record"):
        records.from_line(json.dumps({**json.loads(records.to_line(BEGIN)), "format": format_}))


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["bom", "crlf"]
)
def test_what_editors_do_to_a_file_does_not_matter(tmp_path, change):
    """A byte order mark before the first line, or the line ends of another system."""
    (tmp_path / "log.jsonl").write_bytes(change(f"{records.to_line(BEGIN)}\n{records.to_line(OVERFLOW)}\n").encode())
    assert records.read_log(tmp_path / "log.jsonl") == [BEGIN, OVERFLOW]


def test_zeros_at_the_end_of_a_log_are_left_out(tmp_path):
    """As a machine that lost its power leaves them."""
    (tmp_path / "log.jsonl").write_text(records.to_line(OVERFLOW) + "\n" + "\0" * 50)
    assert records.read_log(tmp_path / "log.jsonl") == [OVERFLOW]
