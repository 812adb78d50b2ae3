from __future__ import annotations

import dataclasses
import json

import pytest

from tfmixed import records
from tfmixed.records import EventsLost, Progress, RunRecord, ScaleChange

OVERFLOW = ScaleChange(1234, 32768.0, 16384.0, "overflow", "dense_1/kernel", 3)
START = RunRecord(0, 8.0, "2026-01-01T00:00:00+00:00", "net", "mixed_float16", {"a": None}, "Adam", ["CPU"], {})
RANGE = {"zeros": 1, "nonfinite": 0, "largest": 4.0, "smallest": 1.0, "octaves": {"0": [1, 0, 0, 1], "2": [1, 0, 0, 0]}}


def ranges_line(**change):
    gradient = {"name": "a", "kind": "weight", "layer": "a", "dtype": "float16", **RANGE, **change}
    record = {"event": "gradient_ranges", "step": 3, "epoch": 0, "precision": "float32", "scale": 1.0, "batches": 1}
    return json.dumps({**record, "model": "m", "ranges": [gradient]})


def changed(record, **change):
    return json.dumps({**json.loads(records.to_line(record)), **change})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


@pytest.mark.parametrize(
    "record",
    [
        OVERFLOW,
        ScaleChange(0, 1.0, 1.1, "growth"),
        EventsLost(3, 7, 1),
        START,
        Progress(1, 0, 8.0, 0, 1.0, -3.5),  # a loss can be negative
        records.from_line(ranges_line()),
        records.from_line(ranges_line(largest=0.0, smallest=0.0, octaves={})),
    ],
    ids=str,
)
def test_round_trip(record):
    """`from_line` restores the record that `to_line` wrote as one line."""
    line = records.to_line(record)
    assert "\n" not in line
    assert records.from_line(line) == record


def test_json_of_a_scale_change():
    """The keys and values are the documented ones."""
    assert json.loads(records.to_line(OVERFLOW)) == {
        "event": "scale_change",
        "step": 1234,
        "epoch": 3,
        "old_scale": 32768.0,
        "new_scale": 16384.0,
        "reason": "overflow",
        "variable": "dense_1/kernel",
    }


def test_records_print_as_text():
    """Powers of two are short, other scales are numbers."""
    assert str(OVERFLOW) == "step 1234: loss scale 2^15 -> 2^14 (overflow)  dense_1/kernel"
    assert str(ScaleChange(1, 3.0, 6.5, "set")) == "step 1: loss scale 3 -> 6.5 (set)"


def test_records_are_dataclasses():
    """`dataclasses.replace` works, also for users of the package."""
    assert dataclasses.replace(OVERFLOW, epoch=4).epoch == 4


REFUSED = {
    "nothing": "",
    "incomplete": "{",
    "list": "[]",
    "number": "3",
    "deep": '{"event": ' + "[" * 10**5,
    "unknown event": '{"event": "other"}',
    "missing field": '{"event": "scale_change", "step": 1}',
    "unknown reason": changed(OVERFLOW, reason="bogus"),
    "text for a number": changed(OVERFLOW, step="1"),
    "null for a number": changed(OVERFLOW, old_scale=None),
    "large step": changed(OVERFLOW, step=10**30),
    "negative step": changed(OVERFLOW, step=-1),
    "infinite scale": changed(OVERFLOW, old_scale=float("inf")),
    "negative scale": changed(OVERFLOW, new_scale=-1),
    "scale of 0": changed(OVERFLOW, new_scale=0.0),
    "scale above float32": changed(OVERFLOW, new_scale=1e300),
    "large parameter of a rule": changed(START, rule={"growth_interval": 10**400}),
    **{f"format {value}": changed(START, format=value) for value in ("2", None, 1.0, 1.5, True, -1)},
    "infinite magnitude": ranges_line(largest=float("inf")),
    "NaN": ranges_line(largest=float("nan")),
    "negative magnitude": ranges_line(smallest=-1),
    "smallest of 0": ranges_line(smallest=0.0),
    "largest below smallest": ranges_line(largest=0.5),
    "magnitude above float32": ranges_line(largest=1e300),
    "negative count": ranges_line(zeros=-1),
    "large count": ranges_line(zeros=10**30),
    "exponent above float32": ranges_line(octaves={"400": [1, 0, 0, 0]}),
    "large count in an octave": ranges_line(octaves={"0": [1, 0, 0, 10**30]}),
    "three counts": ranges_line(octaves={"0": [1, 0, 0]}),
    "fraction of a count": ranges_line(octaves={"0": [1, 0, 0, 1.5]}),
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED)
def test_invalid_lines_are_refused(line):
    """Lines that `to_line` could not have written raise an error that shows the line."""
    with pytest.raises(ValueError, match="must be a record") as error:
        records.from_line(line)
    assert repr(line[:200]) in str(error.value)


def test_a_lone_surrogate_is_replaced():
    """JSON can escape half of a surrogate pair, but nothing can display it. Whole pairs stay."""
    line = records.to_line(ScaleChange(1, 2.0, 1.0, "overflow", "\ud800 \U0001f600"))
    assert records.from_line(line).variable == "? \U0001f600"


def test_an_integer_is_a_valid_scale():
    """Other programs that write JSON drop the ".0"."""
    assert records.from_line(records.to_line(OVERFLOW).replace("32768.0", "32768")) == OVERFLOW


def test_an_incomplete_last_line_is_left_out(path):
    """A killed process loses at most the last line. Elsewhere an incomplete line is an error."""
    line = records.to_line(OVERFLOW) + "\n"
    path.write_text(line + "\n" + line + line[:20])
    assert records.read_log(path) == [OVERFLOW, OVERFLOW]
    path.write_text(line + "\0" * 50)  # after a loss of power
    assert records.read_log(path) == [OVERFLOW]
    path.write_text(line[:20] + "\n" + line)
    with pytest.raises(ValueError, match="record"):
        records.read_log(path)


def test_a_complete_last_line_without_a_line_feed_is_read(path):
    """A newer format in it is an error too."""
    path.write_text(records.to_line(START))
    assert records.read_log(path) == [START]
    path.write_text(records.to_line(START)[:-1])
    assert records.read_log(path) == []
    path.write_text(changed(START, format=2))
    with pytest.raises(records.NewerFormatError):
        records.read_log(path)


def test_unknown_events_are_left_out(path):
    """In the first line they are an error: other programs write lines with an event too."""
    news = '{"event": "news", "step": 3}\n'
    path.write_text(f"{records.to_line(START)}\n{news}{records.to_line(OVERFLOW)}\n")
    assert records.read_log(path) == [START, OVERFLOW]
    path.write_text(news + records.to_line(START) + "\n")
    with pytest.raises(ValueError, match="record"):
        records.read_log(path)


def test_a_missing_log_is_an_error(path):
    """`read_log` raises the usual exception."""
    with pytest.raises(FileNotFoundError):
        records.read_log(path)


def test_the_format_is_written():
    """The first line of a run and ranges, which may be a file by themselves, have a format. Without one it is 1."""
    assert json.loads(records.to_line(START))["format"] == 1
    assert json.loads(records.to_line(records.from_line(ranges_line())))["format"] == 1
    values = json.loads(records.to_line(START))
    del values["format"]
    assert records.from_line(json.dumps(values)) == START


def test_unknown_fields_are_ignored():
    """Fields with a default may be missing, also within ranges."""
    change = {"event": "scale_change", "step": 1, "old_scale": 2.0, "new_scale": 1.0, "reason": "overflow"}
    assert records.from_line(json.dumps({**change, "device": [1]})) == ScaleChange(1, 2.0, 1.0, "overflow")
    line = json.loads(ranges_line(share=0.5))
    del line["ranges"][0]["octaves"]
    assert records.from_line(json.dumps(line)).ranges[0].octaves == {}


@pytest.mark.parametrize("newer", [2, 10**6])
def test_a_newer_format_is_refused(path, newer):
    """The error names the format, also if the line is otherwise invalid."""
    path.write_text(json.dumps({"event": "news", "format": newer}) + "\n")
    with pytest.raises(records.NewerFormatError, match=f"format={newer}"):
        records.read_log(path)


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["bom", "crlf"]
)
def test_changes_by_editors_are_accepted(path, change):
    """A byte order mark, or the line ends of Windows."""
    path.write_bytes(change(f"{records.to_line(START)}\n{records.to_line(OVERFLOW)}\n").encode())
    assert records.read_log(path) == [START, OVERFLOW]
