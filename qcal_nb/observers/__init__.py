"""Observers: they watch tensors and conclude scales. Importing this package registers all of them."""

from .base import ACTIVATIONS, BASE_NAMES, NonFiniteError, Observer, QParamsDict, flatten_for_calibration, fuse
from .minmax import MemorylessMinMaxObserver, MinMaxObserver, StaticMinMaxObserver
from .mse import FourOverSixObserver, MemorylessMSEObserver, MSEObserver, NVFP4ExpandedMSEObserver

__all__ = [
    "ACTIVATIONS",
    "BASE_NAMES",
    "FourOverSixObserver",
    "MSEObserver",
    "MemorylessMSEObserver",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "NVFP4ExpandedMSEObserver",
    "NonFiniteError",
    "Observer",
    "QParamsDict",
    "StaticMinMaxObserver",
    "flatten_for_calibration",
    "fuse",
]
