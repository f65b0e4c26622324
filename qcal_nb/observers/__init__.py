"""Observers: they watch tensors and conclude scales. Importing this package registers all of them."""

from .base import ACTIVATIONS, BASE_NAMES, NonFiniteError, Observer, QParamsDict, flatten_for_calibration, fuse
from .minmax import MemorylessMinMaxObserver, MinMaxObserver, StaticMinMaxObserver

__all__ = [
    "ACTIVATIONS",
    "BASE_NAMES",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "NonFiniteError",
    "Observer",
    "QParamsDict",
    "StaticMinMaxObserver",
    "flatten_for_calibration",
    "fuse",
]
