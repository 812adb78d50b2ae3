"""Records of a training run, and logs of them in JSON lines."""

from tfmixed.records.json_lines import NewerFormatError, from_line, read_changes, read_log, to_line
from tfmixed.records.record_types import (
    Change,
    EventsLost,
    FidelityRecord,
    GradientError,
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

__all__ = [
    "Change",
    "EventsLost",
    "FidelityRecord",
    "GradientError",
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
    "read_log",
    "short",
    "to_line",
]
