"""The workbench without a face: steps and back, feeding, replay, and the session as Python."""

from .progress import PHASES_IN_WORDS, Past, Progress, SessionError, ended_in_time
from .scales import module_statuses, scales_table
from .session import Saved, Session, in_background, pause, resume, run_in_background, stop, weight_lookup
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
    "run_in_background",
    "scales_table",
    "stop",
    "weight_lookup",
]
