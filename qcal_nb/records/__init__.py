"""One pass over the data, kept: what was seen of every tensor, what observers concluded, and files."""

from .calibration_record import About, CalibrationRecord, ResultKey, Key, forget_answers, record_equal
from .calibration_record import unequal_parts
from .collect import Collector
from .conclude import input_costs, recorded_args, result_of, same_args, with_input_costs, without_observer
from .gradient_collector import GradientCollector
from .kept_forecasts import Forecasts, InputCosts, ModuleCost, NO_COST
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
from .module_costs import RECORDED, RowBlock, costs_of, quantized_rows, row_blocks, unit_costs, units_among
from .module_costs import weight_cost, why_no_forecast
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
    "Forecasts",
    "GradientCollector",
    "InputCosts",
    "Key",
    "LiveResults",
    "Memory",
    "ModuleCost",
    "NEVER_SEEN",
    "NO_COST",
    "ObserverResult",
    "RECORDED",
    "ResultKey",
    "RowBlock",
    "all_ranks",
    "args_by_tensor",
    "attention_open",
    "check_base_names",
    "check_flag",
    "check_observers",
    "costs_of",
    "counts_of",
    "follows_from_stats",
    "forget_answers",
    "input_costs",
    "kept_of",
    "modules_to_record",
    "new_collector",
    "new_gradients",
    "new_record",
    "observer_result",
    "observers_from_stats",
    "one_pass",
    "quantized_rows",
    "recipe_to_record",
    "record",
    "record_equal",
    "recorded_args",
    "result_from_stats",
    "result_of",
    "results_together",
    "row_blocks",
    "running_context",
    "same_args",
    "selected",
    "statistics_from",
    "tensors_to_record",
    "unequal_parts",
    "unit_costs",
    "units_among",
    "weight_cost",
    "why_no_forecast",
    "with_input_costs",
    "without_observer",
]
