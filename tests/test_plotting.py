from __future__ import annotations

import pytest

from tfmixed import plotting
from tfmixed.plotting import ScaleHistory
from tfmixed.records import EventsLost, ScaleChange

HISTORY = ScaleHistory(
    8.0, 10, (ScaleChange(2, 8.0, 4.0, "overflow", "a"), EventsLost(1, 5), ScaleChange(5, 4.0, 8.0, "growth"))
)


def test_a_history_is_a_line_from_the_first_step_to_the_last():
    """Each scale holds from the step after its change."""
    assert HISTORY.points() == ([0, 3, 6, 10], [8.0, 4.0, 8.0, 8.0])
    assert [change.step for change in HISTORY.overflows()] == [2]
    assert ScaleHistory(8.0, 0, ()).points() == ([0, 1], [8.0, 8.0])


def test_the_picture_holds_the_data():
    """One line a run, overflows at the scale that overflowed, both axes labelled."""
    figure = plotting.plot_scale({"dynamic": HISTORY, "constant": ScaleHistory(2.0, 10, ())})
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["dynamic"] == [[0, 8], [3, 4], [6, 8], [10, 8]]
    assert lines["constant"] == [[0, 2], [10, 2]]
    assert lines["overflow: step skipped"] == [[2, 8]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("attempted step", "loss scale (factor on the loss)")


def test_save_writes_the_whole_picture(tmp_path):
    """A PNG in a new folder, and nothing beside it."""
    path = tmp_path / "new" / "scale.png"
    plotting.save(plotting.plot_scale({"run": HISTORY}), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["scale.png"]


@pytest.mark.parametrize("name", ["scale", "scale.nonsense"])
def test_a_path_without_a_format_leaves_nothing_behind(tmp_path, name):
    """The error names the format or the path, and there is no partial file."""
    with pytest.raises(ValueError, match=r"nonsense|scale"):
        plotting.save(plotting.plot_scale({"run": HISTORY}), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
