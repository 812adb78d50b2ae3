"""What happened in a run, as frozen records and as JSON lines."""

from tfmixed.records.kinds import (
    FORMAT,
    Change,
    EventsLost,
    GradientRange,
    Kind,
    Progress,
    RangesRecord,
    Reason,
    Record,
    RunRecord,
    ScaleChange,
    short,
)
from tfmixed.records.lines import NewerFormatError, from_line, read_changes, read_lines, read_log, text_of, to_line

__all__ = [
    "FORMAT",
    "Change",
    "EventsLost",
    "GradientRange",
    "Kind",
    "NewerFormatError",
    "Progress",
    "RangesRecord",
    "Reason",
    "Record",
    "RunRecord",
    "ScaleChange",
    "from_line",
    "read_changes",
    "read_lines",
    "read_log",
    "short",
    "text_of",
    "to_line",
]
