"""A whole model through initialize, start, end, and back; the recipe as an object."""

from .config import check_on_uncalibrated, observers_with_gradients
from .coverage import Coverage, extreme_scales, made_for_zeros, suspicious_scales
from .undo_log import (
    UndoLog,
    LifecycleError,
    at_work,
    borrowed,
    experts_apart,
    is_interrupted,
    undo_log_of,
    phase_of,
    recoverable,
    reset_quantization,
    unfuse_experts,
)
from .match import QUANTIZABLE, check_schemes, observed_names, quantizes, reaches_experts, schemes_by_module
from .match import warn_uncalled, warn_unmatched
from .report import Match, match_report
from .snapshots import Edit, ModuleChange, Snapshot, StepEdits, changes, edits, restore, snapshot, step_edits
from .snapshots import take_back, undo
from .steps import (
    compute_remaining,
    compute_scales,
    end_calibration,
    initialize_quantization,
    lacking_data,
    start_calibration,
    uncomputed,
)
from .modifier import Event, EventType, QuantizationMixin, QuantizationModifier, State

__all__ = [
    "Coverage",
    "Edit",
    "Event",
    "EventType",
    "LifecycleError",
    "Match",
    "ModuleChange",
    "QUANTIZABLE",
    "QuantizationMixin",
    "QuantizationModifier",
    "Snapshot",
    "State",
    "StepEdits",
    "UndoLog",
    "at_work",
    "borrowed",
    "changes",
    "check_on_uncalibrated",
    "check_schemes",
    "compute_remaining",
    "compute_scales",
    "edits",
    "end_calibration",
    "experts_apart",
    "extreme_scales",
    "initialize_quantization",
    "is_interrupted",
    "lacking_data",
    "made_for_zeros",
    "match_report",
    "observed_names",
    "observers_with_gradients",
    "phase_of",
    "quantizes",
    "reaches_experts",
    "recoverable",
    "reset_quantization",
    "restore",
    "schemes_by_module",
    "snapshot",
    "start_calibration",
    "step_edits",
    "suspicious_scales",
    "take_back",
    "uncomputed",
    "undo",
    "undo_log_of",
    "unfuse_experts",
    "warn_uncalled",
    "warn_unmatched",
]
