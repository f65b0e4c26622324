"""Observers: they watch tensors and conclude scales. Importing this package registers all of them."""

from .base import ACTIVATIONS, BASE_NAMES, NonFiniteError, Observer, QParamsDict, flatten_for_calibration, fuse
from .histogram import EntropyObserver, HistogramMSEObserver, HistogramObserver, PercentileObserver
from .imatrix import IMatrixMSEObserver, NVFP4ExpandedIMatrixObserver
from .minmax import MemorylessMinMaxObserver, MinMaxObserver, StaticMinMaxObserver
from .mse import FourOverSixObserver, MemorylessMSEObserver, MSEObserver, NVFP4ExpandedMSEObserver

__all__ = [
    "ACTIVATIONS",
    "BASE_NAMES",
    "EntropyObserver",
    "FourOverSixObserver",
    "HistogramMSEObserver",
    "HistogramObserver",
    "IMatrixMSEObserver",
    "MSEObserver",
    "MemorylessMSEObserver",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "NVFP4ExpandedIMatrixObserver",
    "NVFP4ExpandedMSEObserver",
    "NonFiniteError",
    "Observer",
    "PercentileObserver",
    "QParamsDict",
    "StaticMinMaxObserver",
    "flatten_for_calibration",
    "fuse",
]
