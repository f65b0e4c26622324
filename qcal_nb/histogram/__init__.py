"""Histograms that add up exactly, whatever the order of the data."""

from ..stats.histogram import Distribution, Histogram

__all__ = [
    "Distribution",
    "Histogram",
]
