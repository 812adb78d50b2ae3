"""Figures of records, drawn with matplotlib. No window is opened: a figure is returned, or saved.

Each figure has a light and a dark theme, and a layout for a page and for a phone.
"""

from tfmixed.plotting.heatmap import plot_layers
from tfmixed.plotting.histogram import plot_ranges
from tfmixed.plotting.output import format_of, save, save_sheet, svg
from tfmixed.plotting.scale import plot_scale, plot_simulations
from tfmixed.plotting.style import Theme
from tfmixed.plotting.timeline import plot_timeline
from tfmixed.plotting.times import plot_times
from tfmixed.scaling import ScaleHistory

__all__ = [
    "ScaleHistory",
    "Theme",
    "format_of",
    "plot_layers",
    "plot_ranges",
    "plot_scale",
    "plot_simulations",
    "plot_timeline",
    "plot_times",
    "save",
    "save_sheet",
    "svg",
]
