"""Questions that need the model: what a scheme, a layer or an observer costs its predictions."""

from .best import (
    DAMAGED,
    RUNNING,
    TABLE_ORDERS,
    TENSOR_COLUMNS,
    UNKNOWN,
    ZEROS,
    best_by_tensor,
    best_observers,
    compare_for_recipe,
    compare_in_pieces,
    in_production,
    observers_to_compare,
    rows_by_scheme,
    scheme_args_by_module,
    scheme_observers,
    sort_rows,
)
from .budget import Allocation, allocate, allocation_within, bytes_in, frontier_of, model_choices, pareto
from .divergence import Divergence, divergences
from .forecasts import STATES, STATE_WORDS, forecast, forecast_modules
from .observers import compare_observers
from .schemes import compare_schemes, evaluate, named_schemes, unfit_schemes
from .sensitivities import sensitivity
from .sparing import Spared, spare

__all__ = [
    "Allocation",
    "DAMAGED",
    "Divergence",
    "RUNNING",
    "STATES",
    "STATE_WORDS",
    "Spared",
    "TABLE_ORDERS",
    "TENSOR_COLUMNS",
    "UNKNOWN",
    "ZEROS",
    "allocate",
    "allocation_within",
    "best_by_tensor",
    "best_observers",
    "bytes_in",
    "compare_for_recipe",
    "compare_in_pieces",
    "compare_observers",
    "compare_schemes",
    "divergences",
    "evaluate",
    "forecast",
    "forecast_modules",
    "frontier_of",
    "in_production",
    "model_choices",
    "named_schemes",
    "observers_to_compare",
    "pareto",
    "rows_by_scheme",
    "scheme_args_by_module",
    "scheme_observers",
    "sensitivity",
    "sort_rows",
    "spare",
    "unfit_schemes",
]
