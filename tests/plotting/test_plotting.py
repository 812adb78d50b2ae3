from __future__ import annotations

import numpy as np
import pytest
from thorough import few

from tfmixed import plotting, ranges
from tfmixed.plotting import ScaleHistory, zones
from tfmixed.records import EventsLost, GradientRange, RangesRecord, ScaleChange

HISTORY = ScaleHistory(
    8.0, 10, (ScaleChange(2, 8.0, 4.0, "overflow", "a"), EventsLost(1, 5), ScaleChange(5, 4.0, 8.0, "growth"))
)
WIDTHS = [plotting.style.WIDE, plotting.style.NARROW]


def gradient(name, kind="weight", center=-20.0, dtype="float16", seed=0, zeros=3):
    """Returns the record of 400 magnitudes around 2^center."""
    magnitudes = 2.0 ** np.random.default_rng(seed).normal(center, 5, 400)
    octaves = {}
    for magnitude in magnitudes:
        mantissa, exponent = np.frexp(magnitude)
        part = np.searchsorted(
            [1.0, 2 - 2.0**-10, 2 - 2.0**-11], 2 * mantissa, side="right" if mantissa > 0.5 else "left"
        )
        counts = list(octaves.get(int(exponent) - 1, (0, 0, 0, 0)))
        counts[int(part)] += 1
        octaves[int(exponent) - 1] = tuple(counts)
    layer = name.rpartition("/")[0] or name
    return GradientRange(name, kind, layer, dtype, zeros, 0, magnitudes.max(), magnitudes.min(), octaves)


def snapshot(layers=3, step=0):
    kinds = (("", "activation"), ("/kernel", "weight"))
    of = [gradient(f"layer_{i}{end}", kind, -25 + i, seed=i) for i in range(layers) for end, kind in kinds]
    return RangesRecord(step, 0, "float32", 1.0, 1, "model", of)


def test_scale_of_several_runs():
    """One line per run, overflows at the scale that overflowed, both axes labelled."""
    figure = plotting.plot_scale({"dynamic": HISTORY, "constant": ScaleHistory(2.0, 10, ())})
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["dynamic"] == [[0, 8], [3, 4], [6, 8], [10, 8]]
    assert lines["constant"] == [[0, 2], [10, 2]]
    assert lines["overflow: step skipped"] == [[2, 8]]
    assert lines["growth"] == [[5, 4]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("attempted step", "loss scale (factor on the loss)")


def test_a_growth_that_overflows_at_once_is_visible():
    """Its mark is not behind the mark of the overflow."""
    changes = (ScaleChange(4, 8.0, 16.0, "growth"), ScaleChange(5, 16.0, 8.0, "overflow", "a"))
    (axes,) = plotting.plot_scale({"run": ScaleHistory(8.0, 10, changes)}).axes
    _, growth, overflow = (line.get_xydata().tolist() for line in axes.get_lines())
    assert (growth, overflow) == ([[4, 8]], [[5, 16]])


def test_thousands_of_changes_are_drawn_in_bins():
    """The lowest and the highest scale and a few marks. Labels count all changes, and the title names the bins."""
    pairs = [
        (ScaleChange(3 * i, 8.0, 4.0, "overflow", "a"), ScaleChange(3 * i + 1, 4.0, 8.0, "growth")) for i in range(9000)
    ]
    figure = plotting.plot_scale({"run": ScaleHistory(8.0, 27000, tuple(change for pair in pairs for change in pair))})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == ["growth", "overflow: a (9,000)"]
    assert all(len(line.get_xdata()) == 80 for line in axes.get_lines())
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert set(heights) == {4.0, 8.0}
    assert "of each kind one mark in 338 steps" in axes.get_title()
    assert len(plotting.svg(figure)) < 200_000


def test_a_long_name_keeps_both_ends():
    """The layer at its start and the variable at its end."""
    assert plotting.style.shorten("encoder/block_1/attention/kernel", 15) == "encoder…/kernel"
    assert plotting.style.shorten("kernel", 6) == "kernel"


def test_limits_are_visible_on_dark_cells():
    """Each line is drawn on a wider line in the color of the paper."""
    *_, weights, _ = plotting.plot_layers(snapshot(4)).axes
    style = plotting.style.STYLES["light"]
    drawn = [(line.get_color(), line.get_linewidth()) for line in weights.get_lines()][1:]
    assert drawn == [(style.paper, 3.0), (style.ink, 1.0)] * 3


def test_overflows_are_colored_by_variable_and_rare_ones_are_grey():
    """Each of the four most frequent variables has its own color and marker."""
    names = [name for count, name in enumerate("gfedcba", start=1) for _ in range(count)]
    changes = tuple(ScaleChange(step, 8.0, 4.0, "overflow", name) for step, name in enumerate(names))
    (axes,) = plotting.plot_scale({"run": ScaleHistory(8.0, 40, changes)}).axes
    marks = [line for line in axes.get_lines() if line.get_label().startswith("overflow")]
    labels = {"overflow: a (7)", "overflow: b (6)", "overflow: c (5)", "overflow: d (4)", "overflow: 3 others (6)"}
    assert {mark.get_label() for mark in marks} == labels
    assert len({mark.get_markerfacecolor() for mark in marks}) == len({mark.get_marker() for mark in marks}) == 5


@pytest.mark.parametrize("scale", [1.0, 2.0**-3, 2.0**12, 2.0**25, 1000.0])
def test_zones_count_as_the_table_of_ranges_does(scale):
    """Exactly at powers of two, and to within a value at other scales, also for magnitudes on the limits."""
    edges = {-25: (5, 0, 0, 1), -15: (1, 2, 3, 4), 15: (1, 2, 3, 4), 16: (1, 0, 0, 0)}
    of = [gradient("a"), GradientRange("b", "weight", "b", "float16", 0, 0, 2.0**16, 2.0**-25, edges)]
    lost = ranges.GradientRanges(RangesRecord(0, 0, "float32", 1.0, 1, "model", of)).losses(scale)
    got = zones.shares(zones.pooled(of), scale)
    counts = [lost.zero, lost.subnormal, lost.nonzeros - lost.zero - lost.subnormal - lost.overflow, lost.overflow]
    wanted = [lost.share(count) for count in counts]
    slack = 0 if np.frexp(scale)[0] == 0.5 else 2 / lost.nonzeros
    assert list(got.values()) == pytest.approx(wanted, abs=1e-12 + slack)


def test_ranges_are_drawn_before_and_after_scaling():
    """Two panels with the same values, shifted by the scale, and the losses. Gradients in float32 do not count."""
    record = RangesRecord(0, 0, "float32", 1.0, 1, "m", [gradient("a"), gradient("b", center=30.0, dtype="float32")])
    before, after = plotting.plot_ranges(record, 2.0**15).axes
    (first,), (second,) = before.patches[-1:], after.patches[-1:]
    edges = [panel.patches[0].get_data().edges for panel in (before, after)]
    np.testing.assert_array_equal(edges[1], np.asarray(edges[0]) + 15)
    assert sum(before.patches[0].get_data().values) == pytest.approx(100)
    assert max(edges[0]) < 10
    assert "become 0" in before.get_title(loc="left")
    assert "loss scale 2^15" in after.get_title(loc="left")
    assert first is not second


def test_heat_map_shows_layers_and_zeros():
    """The shares of each row add up to 100 %."""
    activations, weights, *_ = plotting.plot_layers(snapshot(4)).axes
    zeros, cells = (mesh.get_array().filled(0) for mesh in weights.collections[:2])
    np.testing.assert_allclose(zeros.sum(1) + cells.sum(1), 100)
    np.testing.assert_allclose(zeros.ravel(), 100 * 3 / 403)
    assert [label.get_text() for label in activations.get_yticklabels()] == [f"layer_{i}" for i in range(4)]


def test_timeline_shows_the_largest_magnitude_and_the_limits():
    """Values below 2^-25 divided by the scale of the step become 0."""
    records = [snapshot(step=step) for step in (0, 5)]
    (axes,) = plotting.plot_timeline(records, HISTORY).axes
    largest = axes.get_lines()[0].get_xydata()
    top = np.log2(max(gradient.largest for gradient in records[0].ranges))
    assert largest.tolist() == [[0, pytest.approx(top)], [5, pytest.approx(top)]]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {-25 - 3.0, -25 - 2.0} <= set(corners[:, 1])


EMPTY = RangesRecord(None, None, "float32", 1.0, 1, "model", [])
FIGURES = {
    "scale": lambda **look: plotting.plot_scale({"run": HISTORY}, **look),
    "scale of nothing": lambda **look: plotting.plot_scale({"run": ScaleHistory.of([])}, **look),
    "scale of one step": lambda **look: plotting.plot_scale({"run": ScaleHistory(8.0, 1, ())}, **look),
    "simulations": lambda **look: plotting.plot_simulations({"a": [8.0, 4.0], "b": []}, {"a": [0], "b": []}, **look),
    "ranges": lambda **look: plotting.plot_ranges(snapshot(), 8.0, snapshot(2), **look),
    "no ranges": lambda **look: plotting.plot_ranges(EMPTY, 8.0, **look),
    "layers": lambda **look: plotting.plot_layers(snapshot(5), 8.0, **look),
    "150 layers": lambda **look: plotting.plot_layers(snapshot(150), 8.0, **look),
    "no layers": lambda **look: plotting.plot_layers(EMPTY, 8.0, **look),
    "timeline": lambda **look: plotting.plot_timeline([snapshot()], HISTORY, **look),
    "no timeline": lambda **look: plotting.plot_timeline([], None, **look),
}


def overlaps(figure):
    """Returns pairs of overlapping texts of a figure, and texts that reach beyond its edge."""
    canvas = plotting.output.FigureCanvasAgg(figure)
    canvas.draw()
    found = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text().strip()]
    shown = [text for text in found if text.get_visible() and in_view(text, figure)]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown]
    boxes = list({(name, tuple(box.extents.round())): (name, box.padded(-1)) for name, box in boxes}.values())
    beyond = [name for name, box in boxes if box.x0 < -2 or box.x1 > figure.bbox.x1 + 2]
    return beyond + [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[i + 1 :] if one.overlaps(two)]


def in_view(text, figure):
    """Returns False for tick labels beyond the limits of their axis, which are not drawn."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            if text in labels or text in [tick.label2 for tick in axis.get_major_ticks()]:
                low, high = sorted(axis.get_view_interval())
                where = text.get_position()[0 if axis is axes.xaxis else 1]
                return low <= where <= high and axis.get_visible()
    return True


@pytest.mark.parametrize("width", few(["narrow"], {"wide": 8.0, "narrow": 4.2}))
@pytest.mark.parametrize("draw", few(["scale", "ranges", "layers", "timeline"], FIGURES))
def test_texts_do_not_overlap(draw, width):
    """Nor are they cut off, at the width of a page and of a phone, for empty and for large records."""
    assert overlaps(draw(width=width)) == []


@pytest.mark.parametrize("draw", few(["scale", "layers"], FIGURES))
def test_dark_theme(draw):
    """Text is light on dark, also that of ticks, which matplotlib creates late."""
    figure = draw(theme="dark")
    plotting.output.FigureCanvasAgg(figure).draw()
    assert sum(figure.get_facecolor()[:3]) < 0.5
    for axes in figure.axes:
        for text in [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.title]:
            assert text.get_color() == plotting.style.STYLES["dark"].ink


def test_a_name_is_not_a_formula():
    """A pair of `$` stands for itself."""
    name = r"o$\a$"
    changes = (ScaleChange(2, 8.0, 4.0, "overflow", name),)
    figures = [
        plotting.plot_scale({name: ScaleHistory(8.0, 9, changes)}, name),
        plotting.plot_layers(RangesRecord(0, 0, "float32", 1.0, 1, "m", [gradient(name)])),
        plotting.plot_simulations({name: [8.0]}, {name: [0]}, name),
    ]
    assert all("<svg" in plotting.svg(figure) for figure in figures[:2])
    assert "2³" in [label.get_text() for label in figures[0].axes[0].get_yticklabels()]


def test_an_unknown_theme_is_refused():
    """The error names the known ones."""
    with pytest.raises(ValueError, match="light, dark"):
        plotting.plot_scale({"run": HISTORY}, theme="blue")


def test_save_writes_a_file(tmp_path):
    """A PNG in a new folder, without a partial file beside it."""
    path = tmp_path / "new" / "scale.png"
    plotting.save(plotting.plot_scale({"run": HISTORY}), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["scale.png"]


def test_a_sheet_has_figures_of_several_sizes(tmp_path):
    """Smaller figures and rows are padded."""
    wide, narrow = (plotting.plot_scale({"run": HISTORY}, width=width) for width in WIDTHS)
    plotting.save_sheet([[wide], [narrow, narrow]], tmp_path / "sheet.png")
    header = (tmp_path / "sheet.png").read_bytes()[16:24]
    size = int.from_bytes(header[:4]), int.from_bytes(header[4:])
    assert size == (2 * 630, round(150 * (4.2 + 4.6)))
    with pytest.raises(ValueError, match=r"\.png"):
        plotting.save_sheet([[wide]], "sheet.svg")


def test_svg_is_reproducible():
    """It has no date and no random names."""
    assert plotting.svg(plotting.plot_scale({"run": HISTORY})) == plotting.svg(plotting.plot_scale({"run": HISTORY}))


@pytest.mark.parametrize("name", ["scale", "scale.nonsense"])
def test_a_path_without_a_format_leaves_nothing_behind(tmp_path, name):
    """There is no partial file."""
    with pytest.raises(ValueError, match="path"):
        plotting.save(plotting.plot_scale({"run": HISTORY}), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
