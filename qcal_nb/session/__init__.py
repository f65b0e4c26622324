"""The workbench without a face: steps and back, feeding, replay, and the session as Python."""

from .scales import module_statuses, scales_table
from .session import (
    PHASES_IN_WORDS,
    Past,
    Progress,
    Saved,
    Session,
    SessionError,
    ended_in_time,
    in_background,
    pause,
    resume,
    stop,
    weight_lookup,
)
from .state import FORMATS, SHOWN, WorkbenchState, args_for

__all__ = [
    "FORMATS",
    "PHASES_IN_WORDS",
    "Past",
    "Progress",
    "SHOWN",
    "Saved",
    "Session",
    "SessionError",
    "WorkbenchState",
    "args_for",
    "ended_in_time",
    "in_background",
    "module_statuses",
    "pause",
    "resume",
    "scales_table",
    "stop",
    "weight_lookup",
]
