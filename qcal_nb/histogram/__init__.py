"""Histograms that add up exactly, whatever the order of the data."""

from ..stats import Distribution, Histogram

__all__ = [
    "Distribution",
    "Histogram",
]
