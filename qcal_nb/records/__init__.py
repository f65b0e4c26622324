"""One pass over the data, kept: what was seen of every tensor, what observers concluded, and files."""

from .calibration_record import About, CalibrationRecord, ResultKey, Key, forget_answers, record_equal
from .calibration_record import unequal_parts
from .collect import Collector
from .gradient_collector import GradientCollector
from .live_results import LiveResults
from .results import (
    ObserverResult,
    NEVER_SEEN,
    result_from_stats,
    observer_result,
    counts_of,
    follows_from_stats,
    observers_from_stats,
    results_together,
    statistics_from,
)
from .observing import Attached, Memory
from .run import (
    all_ranks,
    args_by_tensor,
    attention_open,
    check_base_names,
    check_flag,
    check_observers,
    modules_to_record,
    new_collector,
    new_gradients,
    new_record,
    one_pass,
    recipe_to_record,
    record,
    running_context,
    tensors_to_record,
)
from .tokens import kept_of, selected

__all__ = [
    "About",
    "Attached",
    "CalibrationRecord",
    "Collector",
    "GradientCollector",
    "Key",
    "LiveResults",
    "Memory",
    "NEVER_SEEN",
    "ObserverResult",
    "ResultKey",
    "all_ranks",
    "args_by_tensor",
    "attention_open",
    "check_base_names",
    "check_flag",
    "check_observers",
    "counts_of",
    "follows_from_stats",
    "forget_answers",
    "kept_of",
    "modules_to_record",
    "new_collector",
    "new_gradients",
    "new_record",
    "observer_result",
    "observers_from_stats",
    "one_pass",
    "recipe_to_record",
    "record",
    "record_equal",
    "result_from_stats",
    "results_together",
    "running_context",
    "selected",
    "statistics_from",
    "tensors_to_record",
    "unequal_parts",
]
