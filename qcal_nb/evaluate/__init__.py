"""Questions that need the model: what a scheme, a layer or an observer costs its predictions."""

from .best import (
    RUNNING,
    TABLE_ORDERS,
    TENSOR_COLUMNS,
    UNKNOWN,
    ZEROS,
    best_by_tensor,
    best_observers,
    compare_in_pieces,
    comparison,
    in_order,
    observers_to_compare,
    own_of,
    scheme_args_by_module,
    schemes_of_record,
)
from .divergence import check_causal
from .observers import compare_observers
from .schemes import compare_schemes, evaluate, named_schemes, unfit_schemes
from .sensitivities import sensitivity

__all__ = [
    "RUNNING",
    "TABLE_ORDERS",
    "TENSOR_COLUMNS",
    "UNKNOWN",
    "ZEROS",
    "best_by_tensor",
    "best_observers",
    "check_causal",
    "compare_in_pieces",
    "compare_observers",
    "compare_schemes",
    "comparison",
    "evaluate",
    "in_order",
    "named_schemes",
    "observers_to_compare",
    "own_of",
    "scheme_args_by_module",
    "schemes_of_record",
    "sensitivity",
    "unfit_schemes",
]
