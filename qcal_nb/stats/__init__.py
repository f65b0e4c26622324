"""What is counted of a tensor: histograms that add up, moments, extremes, and what a scale would cost."""

from .compiled import bits_of, float_of, in_parts, shared_out
from .histogram import (
    Distribution,
    Histogram,
    N_BUCKETS,
    bucket_counts,
    cells,
    count_buckets,
    dense_counts,
    is_bfloat16,
    sum_of,
)
from .nonfinite import NonFinite, NonFiniteError, check_policy, current_batch, find_nonfinite
from .quality import Quality, effective_bits, outer_limits, quality_of, sqnr_db
from .reading import N_EXTREMES
from .tensor import (
    Extreme,
    Level,
    TensorStats,
    Timeline,
    dtype_of,
    first_place,
    level_of,
    measure,
    same_stats,
)

__all__ = [
    "Distribution",
    "Extreme",
    "Histogram",
    "Level",
    "N_BUCKETS",
    "N_EXTREMES",
    "NonFinite",
    "NonFiniteError",
    "Quality",
    "TensorStats",
    "Timeline",
    "bits_of",
    "bucket_counts",
    "cells",
    "check_policy",
    "count_buckets",
    "current_batch",
    "dense_counts",
    "dtype_of",
    "effective_bits",
    "find_nonfinite",
    "first_place",
    "float_of",
    "in_parts",
    "is_bfloat16",
    "level_of",
    "measure",
    "outer_limits",
    "quality_of",
    "same_stats",
    "shared_out",
    "sqnr_db",
    "sum_of",
]
