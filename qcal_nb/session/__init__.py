"""The workbench without a face: steps and back, feeding, replay, and the session as Python."""

from .feed import Working, run_in_background
from .progress import PHASES_IN_WORDS, Past, Progress, SessionError, ended_in_time
from .recorded import weight_lookup
from .saved import Saved
from .scales import module_statuses, scales_table
from .session import Session
from .state import FORMATS, SHOWN, WorkbenchState, args_for
from .trial import Trial

__all__ = [
    "FORMATS",
    "PHASES_IN_WORDS",
    "Past",
    "Progress",
    "SHOWN",
    "Saved",
    "Session",
    "SessionError",
    "Trial",
    "WorkbenchState",
    "Working",
    "args_for",
    "ended_in_time",
    "module_statuses",
    "run_in_background",
    "scales_table",
    "weight_lookup",
]
